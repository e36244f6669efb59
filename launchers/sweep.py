"""Runs every member of a sweep, each in a process of its own, and ends with a table over all runs.

  python -m launchers.sweep --experiment=hop_seeds
  python -m launchers.sweep --experiment=hop_seeds --only=quickstart-seed1,quickstart-seed2
  python -m launchers.sweep --experiment=hop_seeds --jobs=2     # two at a time, half the cores each

A sweep is a module of experiments/ with get_configs(). Each member is `--experiment=<sweep>/<name>`
for launchers.pretrain and writes to <root>/<sweep>/<name>. Repeating the command resumes: finished
members are skipped, an interrupted one goes on.
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
from research.errors import UserError
from research.reports.seeds import seeds_report
from research.run_dir import RunDir
from research.training.logs import duration

EXPERIMENT = flags.DEFINE_string('experiment', 'hop_seeds', 'a sweep: a module with get_configs()')
ROOT = flags.DEFINE_string('root', 'runs', 'the sweep is written to <root>/<sweep>')
ONLY = flags.DEFINE_list('only', [], 'names of the members to run; default all')
JOBS = flags.DEFINE_integer('jobs', 1, 'members that run at a time, each on its own share of the '
                            'cores', lower_bound=1)


def run_all(members: dict[str, RunDir]) -> list[str]:
  """Runs the members, JOBS at a time; returns the names of those that failed."""
  cores, shares = sorted(os.sched_getaffinity(0)), queue.SimpleQueue()
  for i in range(JOBS.value):
    shares.put(cores[i::JOBS.value])
  began, n_done = time.monotonic(), 0

  def run(name: str) -> int:
    return subprocess.run(
        [sys.executable, '-m', 'launchers.pretrain', f'--run_dir={members[name].whole}',
         f'--experiment={EXPERIMENT.value}/{name}', *shared.override_arguments()],
        check=False).returncode

  failed = []
  # A worker thread takes its share of the cores for itself, and its child processes inherit it.
  with concurrent.futures.ThreadPoolExecutor(
      JOBS.value, initializer=lambda: os.sched_setaffinity(0, shares.get())) as pool:
    futures = {pool.submit(run, name): name for name in members}
    for future in _finished(pool, futures):
      n_done += 1
      left = (time.monotonic() - began) / n_done * (len(members) - n_done)
      name = futures[future]
      failed += [name] if future.result() else []
      print(f'[{n_done}/{len(members)}] {name} {"FAILED" if future.result() else "done"}; '
            f'ETA of the sweep {duration(left)}', flush=True)
  return failed


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
    raise UserError(f'--jobs={JOBS.value} is more than the {len(os.sched_getaffinity(0))} cores')
  folder = pathlib.Path(ROOT.value) / EXPERIMENT.value
  members = {name: RunDir(folder / name) for name in names}
  if failed := run_all(members):
    raise UserError(f'{", ".join(failed)} failed; mend it and repeat the command, finished runs are '
                    'kept')
  print(seeds_report(list(members.values())))


if __name__ == '__main__':
  shared.run(main)
