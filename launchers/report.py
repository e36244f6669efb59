"""Rebuilds the report of a run from its directory.

  python -m launchers.report --run_dir=runs/quickstart
"""

from absl import flags

from launchers import flags as shared
from research.errors import UserError
from research.reports.report import build_report
from research.run_dir import RunDir

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of a run, finished or not')


def main() -> None:
  run_dir = RunDir(RUN_DIR.value)
  if not RUN_DIR.value or not run_dir.config_json.exists():
    raise UserError(f'--run_dir={RUN_DIR.value!r} is not a run directory: it has no config.json')
  print(f'report: {build_report(run_dir).resolve()}')


if __name__ == '__main__':
  shared.run(main)
