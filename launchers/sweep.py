"""Runs every member of a sweep, each in a process of its own, and ends with a table over all runs.

  python -m launchers.sweep --experiment=hop_seeds
  python -m launchers.sweep --experiment=hop_seeds --only=quickstart-seed1,quickstart-seed2
  python -m launchers.sweep --experiment=hop_seeds --jobs=2     # two at a time, half the cores each

A sweep is a module of experiments/ with get_configs(). Each member is `--experiment=<sweep>/<name>`
for launchers.pretrain and writes to <root>/<sweep>/<name>. Repeating the command resumes: finished
members are skipped, an interrupted one goes on. Ends with code 85 where members were stopped with
their state saved, and none failed.
"""

import concurrent.futures
import os
import pathlib
import queue
import subprocess
import sys
import time

from absl import flags

from launchers import flags as shared
from research.errors import PREEMPTED, Stopped, UserError
from research.reports.seeds import seeds_report
from research.run_dir import RunDir
from research.training.logs import duration

EXPERIMENT = flags.DEFINE_string('experiment', 'hop_seeds', 'a sweep: a module with get_configs()')
ROOT = flags.DEFINE_string('root', 'runs', 'the sweep is written to <root>/<sweep>')
ONLY = flags.DEFINE_list('only', [], 'names of the members to run; default all')
JOBS = flags.DEFINE_integer('jobs', 1, 'members that run at a time, each on its own share of the '
                            'cores', lower_bound=1)


def run_all(members: dict[str, RunDir]) -> tuple[list[str], list[str]]:
  """Runs the members, JOBS at a time; returns the names of those that failed, and were stopped."""
  cores, shares = sorted(os.sched_getaffinity(0)), queue.SimpleQueue()
  for i in range(JOBS.value):
    shares.put(cores[i::JOBS.value])
  began, n_done = time.monotonic(), 0

  def run(name: str) -> int:
    return subprocess.run(
        [sys.executable, '-m', 'launchers.pretrain', f'--run_dir={members[name].whole}',
         f'--experiment={EXPERIMENT.value}/{name}', *shared.override_arguments()],
        check=False).returncode

  ended = {'done': [], 'stopped': [], 'FAILED': []}
  # A worker thread takes its share of the cores for itself, and its child processes inherit it.
  with concurrent.futures.ThreadPoolExecutor(
      JOBS.value, initializer=lambda: os.sched_setaffinity(0, shares.get())) as pool:
    futures = {pool.submit(run, name): name for name in members}
    for future in _finished(pool, futures):
      n_done += 1
      left = (time.monotonic() - began) / n_done * (len(members) - n_done)
      name = futures[future]
      how = {0: 'done', PREEMPTED: 'stopped'}.get(future.result(), 'FAILED')
      ended[how].append(name)
      print(f'[{n_done}/{len(members)}] {name} {how}; ETA of the sweep {duration(left)}', flush=True)
  return ended['FAILED'], ended['stopped']


def _finished(pool, futures):
  """Yields futures as they end; an interrupt also takes back those that have not begun."""
  try:
    yield from concurrent.futures.as_completed(futures)
  except KeyboardInterrupt:
    pool.shutdown(wait=False, cancel_futures=True)
    raise


def main() -> None:
  names = list(shared.load_sweep(EXPERIMENT.value))
  unknown = sorted(set(ONLY.value) - set(names))
  if unknown:
    raise UserError(f'--only={unknown[0]}: not in {EXPERIMENT.value}; it has {", ".join(names)}')
  names = [name for name in names if not ONLY.value or name in ONLY.value]
  if JOBS.value > len(os.sched_getaffinity(0)):
    n_cores = len(os.sched_getaffinity(0))
    raise UserError(f'--jobs={JOBS.value} is more than the {n_cores} cores')
  folder = pathlib.Path(ROOT.value) / EXPERIMENT.value
  members = {name: RunDir(folder / name) for name in names}
  failed, stopped = run_all(members)
  if failed:
    raise UserError(f'{", ".join(failed)} failed; mend it and repeat the command, finished runs are '
                    'kept')
  if stopped:
    raise Stopped(f'{", ".join(stopped)} stopped, saved; repeat the command to go on', PREEMPTED)
  print(seeds_report(list(members.values())))


if __name__ == '__main__':
  shared.run(main)
