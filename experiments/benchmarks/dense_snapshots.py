"""Measures what dense snapshots cost: 500 of the default model, in storage, files and time.

  python -m experiments.benchmarks.dense_snapshots
  python -m experiments.benchmarks.dense_snapshots --snapshots=50 --rounds=1    (a smoke run)

Trains the experiment without monitors, with a snapshot every --every steps and without any, in
interleaved rounds, each run alone. Prints wall time with minus without between step --skip and the
last; steps beside a snapshot against the other steps of the same run, which a machine whose pace
changes from run to run does not blur; what of it the run's own clock calls saving and hashing; the
bytes and files of the snapshots; and how long reading one tensor through time over all of them
takes in one call. A full checkpoint is written at the end of both, after the window.
"""

import json
import pathlib
import time
from typing import Any

from absl import flags

from experiments.benchmarks import command_line
from experiments.benchmarks.estimates import estimate, machine, table
from experiments.benchmarks.timing_rows import (
    NEVER, beside_snapshots, interleaved, pretrain, window)
from research.dynamics.trajectory import open_trajectory
from research.run_dir import RunDir, write_whole
from research.training.logs import read_rows

EXPERIMENT = flags.DEFINE_string('experiment', 'quickstart', 'a module of experiments/')
SNAPSHOTS = flags.DEFINE_integer('snapshots', 500, 'snapshots after the first', lower_bound=2)
EVERY = flags.DEFINE_integer('every', 5, 'steps between them', lower_bound=5)
SKIP = flags.DEFINE_integer('skip', 0, 'first steps that are not counted; 0: a twentieth')
ROUNDS = flags.DEFINE_integer('rounds', 3, 'interleaved rounds of two runs', lower_bound=1)
JSON = flags.DEFINE_string('json', '', 'also write everything measured to this file')


def skipped() -> int:
  """Returns the first steps that are not counted: a whole number of snapshots' worth."""
  if SKIP.value:
    return SKIP.value
  return max(1, SNAPSHOTS.value // 20) * EVERY.value


def run(way: str, run_dir: RunDir) -> dict[str, Any]:
  """Returns seconds between step --skip and the last of a run, in all and by phase."""
  every, n_steps = EVERY.value if way == 'with' else 0, SNAPSHOTS.value * EVERY.value
  settings = {'n_steps': n_steps, 'monitors.suite': 'none', 'evals.every': 0,
              'checkpoints.every': NEVER, 'checkpoints.snapshot_every': every}
  pretrain(EXPERIMENT.value, run_dir, settings)
  rows = read_rows(run_dir.timings_jsonl)
  hashing = ('hash_seconds', 'batch_hash_seconds')
  more = {'beside': beside_snapshots(rows, every, skipped()), 'storage': storage(run_dir)
          } if every else {}
  return {'window': window(rows, skipped()), 'save': window(rows, skipped(), 'save_seconds'),
          'hash': sum(window(rows, skipped(), phase) for phase in hashing), **more}


def storage(run_dir: RunDir) -> dict[str, Any]:
  """Returns bytes, files and the time of one tensor through all snapshots, of each tensor."""
  files = [path for path in run_dir.snapshots.rglob('*') if path.is_file()]
  trajectory = open_trajectory(run_dir.path)
  reads = {}
  for name in trajectory.names:
    seconds = []
    for _ in range(2):  # The first call for a shape compiles its hash.
      began = time.perf_counter()
      through = trajectory.leaf_through_time(name)
      seconds.append(time.perf_counter() - began)
    reads[name] = {'shape': list(through.shape), 'bytes': through.nbytes, 'first': seconds[0],
                   'second': seconds[1]}
  return {'bytes': sum(path.stat().st_size for path in files), 'files': len(files),
          'snapshots': len(trajectory.steps), 'reads': reads}


def report(rounds: list[dict[str, dict[str, Any]]]) -> str:
  """Returns the tables."""
  stored = rounds[-1]['with']['storage']
  n_counted = SNAPSHOTS.value - skipped() // EVERY.value
  def middle(of, unit: str) -> str:
    found = estimate([of(row['with'], row['without']) for row in rounds])
    return f'{found.median:{unit}} ({found.low:{unit}} to {found.high:{unit}})'
  costs = [
      ['wall time with / without - 1', middle(lambda a, b: a['window'] / b['window'] - 1, '+.1%')],
      ['steps beside a snapshot / others of the run - 1, over all steps',
       middle(lambda a, b: a['beside'], '+.1%')],
      ['ms per snapshot',
       middle(lambda a, b: 1e3 * (a['window'] - b['window']) / n_counted, '+.2f')],
      ["the run's own clock: saving", middle(lambda a, b: a['save'] / b['window'], '.2%')],
      ["the run's own clock: hashing, of snapshots and batches",
       middle(lambda a, b: a['hash'] / b['window'], '.2%')],
      ['snapshots', f'{stored["snapshots"]:,}'],
      ['bytes', f'{stored["bytes"]:,}'], ['files', f'{stored["files"]:,}']]
  reads = [[name, str(read['shape']), f'{1e3 * read["second"]:.0f}', f'{1e3 * read["first"]:.0f}']
           for name, read in stored['reads'].items()]
  return '\n\n'.join([
      table(['cost of snapshots', f'median of {len(rounds)} rounds (lowest to highest)'], costs),
      table(['one tensor through time, one call', 'shape', 'ms, hashes compared',
             'ms, the first time'], reads)])


def main() -> None:
  facts = machine()
  print(facts, flush=True)
  rounds = interleaved(('with', 'without'), ROUNDS.value, run)
  print(report(rounds))
  if JSON.value:
    write_whole(pathlib.Path(JSON.value), json.dumps(
        {'machine': facts, 'experiment': EXPERIMENT.value, 'rounds': rounds}, indent=2) + '\n')


if __name__ == '__main__':
  command_line.run(main)
