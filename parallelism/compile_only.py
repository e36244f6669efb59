"""Compiles a program for absent devices in a process of its own: its HLO and what memory it takes.

The TPU compiler spends most of its time on generating code, after the passes over the HLO and the
assignment of buffers have settled all that the analysis needs; the process is ended there.
"""

import dataclasses
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax

JOB, RESULT, LOG = 'job.pickle', 'result.pickle', 'log.txt'
DUMPS = {'xla_dump_hlo_as_text': True}
# The compiler writes its dumps one after another, this one after those that are read.
LAST_DUMP = '*after_optimizations_after_buffer_assignment.txt'
POLL_SECONDS = 0.05
_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


@dataclasses.dataclass(frozen=True)
class Refusal:
  """What the compiler said of a program that does not fit: bytes of HBM, None where not named."""

  needed: int | None
  available: int | None
  message: str


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler made of a program.

  Bytes are those of one device's HBM: arguments (which donated results share), results that share
  nothing, temporaries and constants. seconds is what all of it took; code says whether code was
  generated, too.
  """

  text: str
  arguments: int
  results: int
  temporaries: int
  refusal: Refusal | None
  seconds: float
  code: bool

  @property
  def total(self) -> int:
    """Bytes of HBM that a device needs."""
    return self.arguments + self.results + self.temporaries


def compile_apart(lower: Callable[..., jax.stages.Lowered], *arguments: Any,
                  code: bool = False) -> Compiled:
  """Returns what the compiler makes of `lower(*arguments)`, called in a process of its own.

  Args:
    lower: a function of a module, which the process imports.
    arguments: picklable.
    code: whether to generate code, which takes ten times as long and finds what only that finds.

  Raises:
    ValueError: as `lower` raised.
    RuntimeError: the compiler or its process failed, with what it said.
  """
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    (folder / JOB).write_bytes(pickle.dumps((lower, arguments)))
    result = _result(folder, code)
    return _read(folder, result, code, time.perf_counter() - start)


def _result(folder: pathlib.Path, code: bool) -> tuple[str, str]:
  """Returns the kind and the text of the process's result, once that or the dumps are there."""
  environment = {**os.environ, 'JAX_PLATFORMS': 'cpu',
                 'PYTHONPATH': os.pathsep.join(path or os.getcwd() for path in sys.path)}
  with (folder / LOG).open('wb') as log:
    process = subprocess.Popen([sys.executable, '-m', __name__, str(folder)], env=environment,
                               stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
      while process.poll() is None:
        if not code and any(path.stat().st_size for path in folder.glob(LAST_DUMP)):
          return 'done', ''
        time.sleep(POLL_SECONDS)
    finally:
      process.kill()
      process.wait()
  if (folder / RESULT).exists():
    return pickle.loads((folder / RESULT).read_bytes())
  ended = signal.Signals(-process.returncode).name if process.returncode < 0 else (
      f'code {process.returncode}')
  lines = (folder / LOG).read_text(encoding='utf-8', errors='replace').strip().splitlines()
  return 'failed', f'the compiling process ended with {ended}: {" | ".join(lines[-3:])}'


def _read(folder: pathlib.Path, result: tuple[str, str], code: bool, seconds: float) -> Compiled:
  """Returns the record of a process's result and dumps."""
  kind, text = result
  if kind == 'invalid':
    raise ValueError(text)
  refused = refusal(text) if kind == 'failed' else None
  if kind == 'failed' and refused is None:
    raise RuntimeError(text)
  dumps = {name: list(folder.glob(f'*after_optimizations{name}.txt'))
           for name in ('', '-buffer-assignment')}
  if any(len(paths) != 1 for paths in dumps.values()):
    if refused:  # it would not even begin
      return Compiled('', 0, 0, refused.needed or 0, refused, seconds, code)
    raise RuntimeError(f'the compiler left dumps {[p.name for p in folder.glob("*.txt")]}, not one '
                       'of the optimized HLO and one of its buffers')
  hlo, buffers = (paths[0].read_text(encoding='utf-8') for paths in dumps.values())
  return Compiled(hlo, *assigned_bytes(buffers), refused, seconds, code)


def assigned_bytes(text: str) -> tuple[int, int, int]:
  """Returns a device's bytes of HBM for arguments, results and all else.

  Args:
    text: the compiler's dump of its buffer assignment. Other memories have a color; what is
      thread-local lies inside other buffers.
  """
  sums = {'arguments': 0, 'results': 0, 'rest': 0}
  for size, rest in re.findall(r'^allocation \d+: size (\d+),?(.*)$', text, re.MULTILINE):
    color = re.search(r'color (\d+)', rest)
    if 'thread-local' in rest or (color and color[1] != '0'):
      continue
    what = ('arguments' if re.search(r'\bparameter \d', rest) else
            'results' if 'maybe-live-out' in rest else 'rest')
    sums[what] += int(size)
  return sums['arguments'], sums['results'], sums['rest']


def refusal(message: str) -> Refusal | None:
  """Returns what the compiler's error says of HBM that does not suffice, None if it is another."""
  if 'RESOURCE_EXHAUSTED' not in message or not re.search(r'\bHBM\b', message, re.IGNORECASE):
    return None
  amount = r'([\d.]+)([KMGT]?)'
  for pattern in (rf'\({amount}\) exceeds available HBM \({amount}\)',
                  rf'Used {amount}i?B? of {amount}i?B? hbm'):
    if match := re.search(pattern, message):
      needed, available = (int(float(match[i]) * _UNITS[match[i + 1]]) for i in (1, 3))
      return Refusal(needed, available, message)
  return Refusal(None, None, message)


def _run(folder: pathlib.Path) -> None:
  """Runs the job of a folder and writes its result there."""
  try:
    lower, arguments = pickle.loads((folder / JOB).read_bytes())
    lowered = lower(*arguments)
    lowered.compile(compiler_options={'xla_dump_to': str(folder), **DUMPS})
    result = 'done', ''
  except ValueError as error:
    result = 'invalid', str(error)
  except Exception as error:  # its text is raised in the process that asked
    result = 'failed', f'{type(error).__name__}: {error}'
  part = folder / 'part'
  part.write_bytes(pickle.dumps(result))
  part.rename(folder / RESULT)


if __name__ == '__main__':
  _run(pathlib.Path(sys.argv[1]))
