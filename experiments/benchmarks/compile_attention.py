"""Compiles attention, forward and backward, for TPUs with no TPU at hand, beside JAX's own kernels.

  python -m experiments.benchmarks.compile_attention --out=runs/compiled.jsonl
  python -m experiments.benchmarks.compile_attention --cases=covering --out=runs/covering.jsonl

Takes libtpu (pip install -e '.[test]' or '.[tpu]'). Causal attention inside shard_map on a whole
topology, one row and four query heads (two key heads) per device; in half of the cases with a
window. Contenders: modehop's `flash_tpu`, `jax.nn` (jax.nn.dot_product_attention), `jax flash` and
`jax splash` (jax.experimental.pallas.ops.tpu, in blocks of 512). MB are the compiler's temporary
bytes per device with all temporaries in HBM. Milliseconds are its estimate (optimal_seconds); it
sees into a kernel only as far as the kernel's CostEstimate goes, which splash lacks and jax flash
has for its forward pass alone, so there only flash_tpu and jax.nn compare. Every case is a line of
--out with the commit (and a hash of uncommitted changes), JAX and libtpu that made it; a repeated
command goes on where it stopped, and compiles again what another commit or version of these made.
"""

import importlib.metadata
import json
import os
import pathlib
import time
from typing import Any

from absl import flags

from experiments.benchmarks import command_line, tpu_programs
from experiments.benchmarks.estimates import machine, table
from parallelism.topologies import EXAMPLES, compile_only_devices
from research.errors import UserError
from research.training import manifest

OUT = flags.DEFINE_string('out', 'runs/compile_attention.jsonl', 'where cases are kept, one a line')
CASES = flags.DEFINE_enum('cases', 'all', ['all', 'covering'],
                          'all, or 24 of flash_tpu in which every two values meet, which takes '
                          'neither --contenders nor --topologies')
NAMES = flags.DEFINE_list('contenders', list(tpu_programs.CONTENDERS), 'who is compiled, by name')
TOPOLOGIES = flags.DEFINE_list('topologies', list(EXAMPLES), 'for which TPUs')
BEGINNING = b'{"topology": '  # of every line of --out


def _made_by() -> dict[str, str]:
  """Returns what the programs depend on besides the case."""
  return {'commit': manifest.code_version(),
          **{name: importlib.metadata.version(name) for name in ('jax', 'libtpu')}}


def _known(path: pathlib.Path) -> dict[tpu_programs.Case, dict[str, Any]]:
  """Returns the records of earlier commands by case, of a repeated case the last one.

  Cuts off a last line without an end: its command was stopped while it wrote.

  Raises:
    UserError: a line is not a record.
  """
  lines = path.read_bytes().split(b'\n') if path.exists() else [b'']
  records = {}
  for i, line in enumerate(lines[:-1], 1):
    try:
      record = json.loads(line)
      fields = tpu_programs.Case.__dataclass_fields__
      records[tpu_programs.Case(**{name: record[name] for name in fields})] = record
    except (ValueError, KeyError, TypeError) as error:
      raise UserError(f'{path}, line {i} is not a case of this benchmark; '
                      'choose another --out or remove the line') from error
  if lines[-1]:
    if not lines[-1].startswith(BEGINNING[:len(lines[-1])]):
      raise UserError(f'{path}, line {len(lines)} is not a case of this benchmark; '
                      'choose another --out or remove the line')
    os.truncate(path, path.stat().st_size - len(lines[-1]))
    print(f'{path}: line {len(lines)} was half-written and is cut off', flush=True)
  return records


def _compile_all(cases: list[tpu_programs.Case], path: pathlib.Path
                 ) -> dict[tpu_programs.Case, dict[str, Any]]:
  """Compiles what is not in the file yet; returns the records of all cases."""
  records, made_by = _known(path), _made_by()
  current = {case for case, record in records.items() if made_by.items() <= record.items()}
  left = [case for case in cases if case not in current]
  print(f'{len(cases) - len(left)} of {len(cases)} cases are in {path}', flush=True)
  if n := sum(case in records for case in left):
    print(f'{n} more are of another commit or version and are compiled again', flush=True)
  path.parent.mkdir(parents=True, exist_ok=True)
  began = time.perf_counter()
  with path.open('a', encoding='utf-8') as file:
    for i, case in enumerate(left, 1):
      records[case] = {**tpu_programs.compiled_case(case, tpu_programs.IN_HBM), **made_by}
      print(json.dumps(records[case]), file=file, flush=True)
      seconds = time.perf_counter() - began
      print(f'{i}/{len(left)}  {case.name}  {_megabytes(records[case])}  '
            f'{records[case]["seconds"]:.1f} s  ETA {seconds / i * (len(left) - i):.0f} s',
            flush=True)
  return {case: records[case] for case in cases}


def _megabytes(record: dict[str, Any]) -> str:
  """Returns a record's temporary megabytes, or why it has none."""
  return record['error'] if 'error' in record else f'{record["temporary_bytes"] / 1e6:.1f}'


def _milliseconds(record: dict[str, Any]) -> str:
  """Returns the compiler's estimate of a record in milliseconds."""
  return '' if 'error' in record else f'{record["optimal_seconds"] * 1e3:.2f}'


def _table(records: dict[tpu_programs.Case, dict[str, Any]], topology: str) -> str:
  """Returns the table of a topology: temporary MB of everyone, and estimates that compare."""
  here = {case: record for case, record in records.items() if case.topology == topology}
  names = list(dict.fromkeys(case.contender for case in here))
  timed = [name for name in ('flash_tpu', 'jax.nn') if name in names]
  problems = dict.fromkeys((c.length, c.width, c.dtype, c.window) for c in here)
  rows = []
  for problem in problems:
    found = {name: here[tpu_programs.Case(topology, name, *problem)] for name in names
             if tpu_programs.Case(topology, name, *problem) in here}
    L, E, dtype, window = problem
    rows.append([f'L {L:,}, E {E}, {dtype}{f", window {window:,}" if window else ""}',
                 *(_megabytes(found[name]) if name in found else '' for name in names),
                 *(_milliseconds(found[name]) if name in found else '' for name in timed)])
  return table([topology, *(f'{name} MB' for name in names), *(f'{name} ms' for name in timed)],
               rows)


def _cases() -> list[tpu_programs.Case]:
  """Returns the cases of the flags; raises UserError for names that are not known."""
  if CASES.value == 'all':
    return tpu_programs.all_cases(command_line.chosen(NAMES, tpu_programs.CONTENDERS),
                                  command_line.chosen(TOPOLOGIES, EXAMPLES))
  for flag in (NAMES, TOPOLOGIES):
    if flag.present:
      raise UserError(f'--{flag.name} does not go with --cases=covering, whose cases are of '
                      'flash_tpu on all topologies; leave one of the two out')
  return tpu_programs.covering_cases()


def main() -> None:
  cases = _cases()
  try:
    compile_only_devices(cases[0].topology)
  except ValueError as error:
    raise UserError(str(error)) from error
  print(machine(), flush=True)
  records = _compile_all(cases, pathlib.Path(OUT.value))
  for topology in dict.fromkeys(case.topology for case in cases):
    print(f'\n{_table(records, topology)}', flush=True)


if __name__ == '__main__':
  command_line.run(main)
