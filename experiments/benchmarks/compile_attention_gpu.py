"""Compiles attention for an H100 that need not be there, and says what the compiler says.

  python -m experiments.benchmarks.compile_attention_gpu
  python -m experiments.benchmarks.compile_attention_gpu --contenders=flash_gpu --lengths=131072

Takes JAX's CUDA plugin (pip install -e '.[cuda]'), no GPU. Forward and backward of a causal
problem in one program, in bfloat16: modehop's `flash_gpu` and `blockwise`, `jax`
(jax.nn.dot_product_attention) and `pallas_triton` (jax's shipped kernels). Temporary MB are XLA's.
Of modehop's kernels ptxas says how many bytes of registers it moved to memory ("spilled"), which
is slow where it happens in an inner loop.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from absl import flags

from experiments.benchmarks import command_line
from experiments.benchmarks.estimates import table
from parallelism.topologies import compile_only_gpu
from research.errors import UserError

CONTENDERS = ('flash_gpu', 'blockwise', 'jax', 'pallas_triton')
NAMES = flags.DEFINE_list('contenders', list(CONTENDERS), 'who is compiled, by name')
LENGTHS = flags.DEFINE_list('lengths', ['1024', '4096', '32768'], 'tokens per row')
WIDTHS = flags.DEFINE_list('widths', ['64', '128', '256'], 'widths of a head')
FEATURES = flags.DEFINE_list(
    'features', [''], "what is on beside causality, joined by +: window, segments, softcap, alibi")
JSON = flags.DEFINE_bool('json', False, 'print one JSON object per program instead of the table')
HEADS, KEY_HEADS, WINDOW, SOFTCAP = 8, 2, 1000, 30.0
KNOWN_FEATURES = ('window', 'segments', 'softcap', 'alibi')


@dataclasses.dataclass(frozen=True)
class Case:
  """One program: a row of `length` tokens, HEADS heads of `width`, a set of features."""

  contender: str
  length: int
  width: int
  features: tuple[str, ...]


@contextlib.contextmanager
def _output_of_compilers() -> Iterator[list[str]]:
  """Collects what is written to file descriptors 1 and 2; the list has it at the end."""
  collected: list[str] = []
  sys.stdout.flush()
  with tempfile.TemporaryFile() as file:
    saved = [os.dup(number) for number in (1, 2)]
    try:
      for number in (1, 2):
        os.dup2(file.fileno(), number)
      yield collected
    finally:
      for number, copy in zip((1, 2), saved, strict=True):
        os.dup2(copy, number)
        os.close(copy)
      file.seek(0)
      collected.append(file.read().decode(errors='replace'))


def _attend(case: Case):
  """Returns f(q, k, v, segments) -> output of a contender; raises ValueError for what it lacks."""
  import jax
  import jax.numpy as jnp

  from models.attention import configured_attention
  from models.config import ModelConfig
  from models.kernels.interface import Mask
  from models.positions import alibi_slopes
  if case.contender in ('flash_gpu', 'blockwise'):
    attend = configured_attention(ModelConfig(attention=case.contender))
    options = {'scale': case.width ** -0.5,
               'mask': Mask(window=WINDOW if 'window' in case.features else 0),
               'softcap': SOFTCAP if 'softcap' in case.features else 0.0,
               'alibi_slopes_H': alibi_slopes(HEADS) if 'alibi' in case.features else None}
    return lambda q, k, v, segments: attend(
        q, k, v, segment_ids_BL=segments if 'segments' in case.features else None,
        **options).out_BLHE
  if set(case.features) - {'window'} or (case.features and case.contender != 'jax'):
    raise ValueError(f'{case.contender} lacks {"+".join(case.features)}')
  if case.contender == 'jax':
    window = (WINDOW - 1, 0) if 'window' in case.features else None
    return lambda q, k, v, _: jax.nn.dot_product_attention(
        q, k, v, is_causal=True, local_window_size=window, implementation='xla')
  from jax.experimental.pallas.ops.gpu import attention
  n = HEADS // KEY_HEADS
  return lambda q, k, v, _: attention.mha(
      q, jnp.repeat(k, n, axis=2), jnp.repeat(v, n, axis=2), None, sm_scale=case.width ** -0.5,
      causal=True)


def _lowered(case: Case):
  """Returns forward and backward of a case, lowered for one H100."""
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import Mesh, NamedSharding, PartitionSpec

  attend = _attend(case)
  mesh = Mesh(np.array([compile_only_gpu()]), ('x',))
  whole = PartitionSpec()
  sharding = NamedSharding(mesh, whole)
  q, k = (jax.ShapeDtypeStruct((1, case.length, heads, case.width), jnp.bfloat16,
                               sharding=sharding) for heads in (HEADS, KEY_HEADS))
  segments = jax.ShapeDtypeStruct((1, case.length), jnp.int32, sharding=sharding)

  def both(q, k, v, g, segments):
    out, vjp = jax.vjp(lambda *qkv: attend(*qkv, segments), q, k, v)
    return out, vjp(g)

  mapped = jax.shard_map(both, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
  return jax.jit(mapped).lower(q, k, k, q, segments)


def _kernels(ptxas: str) -> dict[str, dict[str, int]]:
  """Returns what ptxas says of each kernel: registers per thread and spilled bytes."""
  pattern = (r"entry function '(\w+?)(?:_mosaic_gpu_kernel)?' for '(\w+)'.*?(\d+) bytes spill "
             r"stores, (\d+) bytes spill loads.*?Used (\d+) registers")
  return {name: {'architecture': architecture, 'spill_stores': int(stores),
                 'spill_loads': int(loads), 'registers': int(registers)}
          for name, architecture, stores, loads, registers
          in re.findall(pattern, ptxas, re.DOTALL)}


def compiled_case(case: Case) -> dict[str, Any]:
  """Returns the record of a case: what the compilers say, or why there is no program."""
  import jax
  began = time.perf_counter()
  record = dataclasses.asdict(case)
  try:
    with _output_of_compilers() as output:
      compiled = _lowered(case).compile()
  except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
    return {**record, 'error': ' '.join(str(error).split())[:120]}
  return {**record, 'temporary_bytes': compiled.memory_analysis().temp_size_in_bytes,
          'kernels': _kernels(output[0]), 'seconds': time.perf_counter() - began}


def _row(record: dict[str, Any]) -> list[str]:
  """Returns a table row of a record."""
  name = f'{record["contender"]} L={record["length"]:,} E={record["width"]}'
  name = ' '.join([name, *record['features']])
  if 'error' in record:
    return [f'{name} ({record["error"]})', '-', '-', '-']
  spilled = ', '.join(f'{kernel} {facts["spill_stores"]}'
                      for kernel, facts in record['kernels'].items() if facts['spill_stores'])
  spilled = spilled or ('none' if record['kernels'] else '-')
  return [name, f'{record["temporary_bytes"] / 1e6:.1f}', spilled, f'{record["seconds"]:.1f}']


def _cases() -> list[Case]:
  """Returns the cases of the flags; raises UserError for unknown names."""
  names = command_line.chosen(NAMES, CONTENDERS)
  sets = [tuple(x for x in text.split('+') if x) for text in FEATURES.value or ['']]
  for feature in {x for features in sets for x in features}:
    if feature not in KNOWN_FEATURES:
      raise UserError(f'--features={feature} is not one of {", ".join(KNOWN_FEATURES)}')
  lengths, widths = map(command_line.positive_numbers, (LENGTHS, WIDTHS))
  return [Case(*values) for values in itertools.product(names, lengths, widths, sets)]


def main() -> None:
  cases = _cases()
  try:
    compile_only_gpu()
  except ValueError as error:
    raise UserError(str(error)) from error
  os.environ['MOSAIC_GPU_DUMP_PTXAS'] = '1'
  records = []
  for i, case in enumerate(cases):
    print(f'{i + 1} of {len(cases)}: {case}', file=sys.stderr, flush=True)
    records.append(compiled_case(case))
    if JSON.value:
      print(json.dumps(records[-1]), flush=True)
  if not JSON.value:
    print(table(['program', 'temporary MB', 'spilled bytes', 'seconds'],
                [_row(record) for record in records]))


if __name__ == '__main__':
  command_line.run(main)
