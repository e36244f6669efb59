"""Worker processes that sit idle, blocked on a pipe, while others are timed.

A worker is `python -m experiments.benchmarks.workers ROLE SIZE N_ROWS FOLDER`. It says one JSON
line once it is ready, then answers every line of its input with one, until the input ends. Roles:
a contender's name; 'reference' (writes the common weights, measures the matmul roof); 'ablation'.
"""

import importlib
import json
import os
import pathlib
import subprocess
import sys
import time
from typing import Any

import numpy as np

from experiments.benchmarks import contenders, shapes
from research.errors import UserError

WEIGHTS = 'weights.npz'
N_BATCHES = 4
N_LOSSES = 3  # losses that are compared: before the first update and after one and two


class Worker:
  """The parent's end of a worker process; `ready` is what it said first."""

  def __init__(self, role: str, size: str, n_rows: int, folder: pathlib.Path):
    self._role = role
    # No caches of earlier runs: compile seconds are those of a first compilation.
    environment = {name: value for name, value in os.environ.items()
                   if name != 'JAX_COMPILATION_CACHE_DIR'}
    environment['TORCHINDUCTOR_CACHE_DIR'] = str(folder / 'inductor' / role)
    self._process = subprocess.Popen(
        [sys.executable, '-m', __spec__.name, role, size, str(n_rows), str(folder)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    self.ready = self._read()

  def _read(self) -> dict[str, Any]:
    line = self._process.stdout.readline()
    if not line:
      raise UserError(f'the worker {self._role} ended with code {self._process.wait()}; what it '
                      'said stands above')
    return json.loads(line)

  def ask(self, **request) -> dict[str, Any]:
    """Returns the worker's answer to a request; blocks until it is there."""
    self._process.stdin.write(json.dumps(request) + '\n')
    self._process.stdin.flush()
    return self._read()

  def close(self) -> None:
    """Ends the worker."""
    self._process.stdin.close()
    self._process.wait()
    self._process.stdout.close()


def memory() -> dict[str, float]:
  """Returns this process's resident memory, now and at its peak, in GB (10^9 bytes)."""
  status = pathlib.Path('/proc/self/status').read_text(encoding='ascii').splitlines()
  kilobytes = {line.split(':')[0]: line.split()[1] for line in status if line.startswith('Vm')}
  return {'resident_gb': int(kilobytes['VmRSS']) * 1024 / 1e9,
          'peak_gb': int(kilobytes['VmHWM']) * 1024 / 1e9}


def _reference(shape: shapes.Shape, n_rows: int, folder: pathlib.Path):
  """Writes the weights; returns facts of the shape and the measurement of the matmul roof."""
  modehop_step = importlib.import_module('experiments.benchmarks.modehop_step')
  counting = importlib.import_module('models.counting')
  hardware = importlib.import_module('parallelism.hardware')
  built = modehop_step.build(shape, n_rows, 'float32')
  np.savez(folder / WEIGHTS, **modehop_step.fresh_weights(built))
  facts = {'flops_per_token': counting.flops_per_token(built.config.model, shape.length),
           'parameters': counting.parameter_counts(built.config.model).total,
           'n_micro': built.n_micro}
  return facts, lambda request: {'flops': hardware.measured_peak(rounds=request['steps'])}


def _contender(name: str, shape: shapes.Shape, n_rows: int, folder: pathlib.Path):
  """Returns what starting a contender took and gave, and the measurement of its step."""
  feed = shapes.batches(shape, n_rows, N_BATCHES)
  with np.load(folder / WEIGHTS) as weights:
    step = contenders.start(name, shape, n_rows, dict(weights))
  began = time.perf_counter()
  losses = [step(feed[0])()]
  first = time.perf_counter() - began
  losses += [step(batch)() for batch in feed[1:N_LOSSES]]
  began = time.perf_counter()
  step(feed[0])()
  again = time.perf_counter() - began
  facts = {'losses': losses, 'compile_seconds': max(first - again, 0.0), 'step_seconds': again}

  def measure(request: dict[str, Any]) -> dict[str, Any]:
    step(feed[0])()  # Untimed: after idling, this one brings caches and clocks back.
    start = time.perf_counter()
    for i in range(request['steps']):
      read = step(feed[i % N_BATCHES])
    read()
    return {'seconds': (time.perf_counter() - start) / request['steps'], **memory()}
  return facts, measure


def _ablation(shape: shapes.Shape, n_rows: int, folder: pathlib.Path):
  """Returns the parts of the production step and the measurement of each."""
  ablation = importlib.import_module('experiments.benchmarks.ablation')
  feed = shapes.batches(shape, n_rows, N_BATCHES)
  with np.load(folder / WEIGHTS) as weights:
    runs = ablation.programs(shape, n_rows, dict(weights))
  for run in runs.values():
    run(feed[0])()

  def measure(request: dict[str, Any]) -> dict[str, Any]:
    seconds = {}
    for name, run in runs.items():
      run(feed[0])()
      start = time.perf_counter()
      for i in range(request['steps']):
        read = run(feed[i % N_BATCHES])
      read()
      seconds[name] = (time.perf_counter() - start) / request['steps']
    return {'seconds': seconds}
  parts = {'whole': ablation.STEP, 'nested': ablation.NESTED, 'variants': ablation.VARIANTS}
  return parts, measure


def main() -> None:
  role, size, n_rows, folder = sys.argv[1:]
  # Answers have a channel of their own; whatever a framework prints goes to stderr.
  answers = os.fdopen(os.dup(1), 'w', buffering=1, encoding='utf-8')
  os.dup2(2, 1)
  arguments = (shapes.SHAPES[size], int(n_rows), pathlib.Path(folder))
  if role in contenders.CONTENDERS:
    facts, measure = _contender(role, *arguments)
  else:
    facts, measure = {'reference': _reference, 'ablation': _ablation}[role](*arguments)
  print(json.dumps(facts), file=answers)
  for line in sys.stdin:
    print(json.dumps(measure(json.loads(line))), file=answers)


if __name__ == '__main__':
  main()
