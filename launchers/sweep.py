"""Runs every member of a sweep, one process after another, and ends with a table over all runs.

  python -m launchers.sweep --experiment=hop_seeds
  python -m launchers.sweep --experiment=hop_seeds --only=quickstart-seed1,quickstart-seed2

A sweep is a module of experiments/ with get_configs(). Each member is `--experiment=<sweep>/<name>`
for launchers.pretrain and writes to <root>/<sweep>/<name>. Repeating the command resumes: finished
members are skipped, an interrupted one goes on.
"""

import pathlib
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


def main() -> None:
  names = list(shared.load_sweep(EXPERIMENT.value))
  unknown = sorted(set(ONLY.value) - set(names))
  if unknown:
    raise UserError(f'--only={unknown[0]}: not in {EXPERIMENT.value}; it has {", ".join(names)}')
  names = [name for name in names if not ONLY.value or name in ONLY.value]
  run_dirs = [RunDir(pathlib.Path(ROOT.value) / EXPERIMENT.value / name) for name in names]
  began = time.monotonic()
  for i, (name, run_dir) in enumerate(zip(names, run_dirs, strict=True)):
    eta = duration((time.monotonic() - began) / i * (len(names) - i)) if i else 'unknown'
    print(f'[{i + 1}/{len(names)}] {name} (ETA of the sweep {eta})', flush=True)
    command = [sys.executable, '-m', 'launchers.pretrain', f'--run_dir={run_dir.path}',
               f'--experiment={EXPERIMENT.value}/{name}', *shared.override_arguments()]
    if subprocess.run(command, check=False).returncode:
      raise UserError(f'{name} failed; mend it and repeat the command, finished runs are kept')
  print(seeds_report(run_dirs))


if __name__ == '__main__':
  shared.run(main)
