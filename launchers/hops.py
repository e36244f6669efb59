"""Says when each monitored dataset hopped between pattern and general rule, with error rates.

  python -m launchers.hops --run_dir=runs/quickstart
  python -m launchers.hops --run_dir=runs/series --metric=accuracy      # of launchers.monitor

Prints every dataset's state at each checkpoint, its hops between two steps, in how many prompt
variants each is found, the least hop that could have been seen, the rate of hops per billion
tokens, and what float32 and bfloat16 scores disagree about, which is measured once and bounds
what may be a hop. Writes hops.json and states.parquet into the run directory and rebuilds its
report, which shows margins.
"""

from absl import flags

from launchers import flags as shared
from research.dynamics import findings as findings_lib
from research.dynamics.analysis import analyze
from research.dynamics.curves import read_variants
from research.dynamics.hops import METRICS, check_enough
from research.dynamics.parity_scoring import parity_of
from research.errors import UserError
from research.reports.report import build_report
from research.run_dir import RunDir

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of a monitored run or series')
METRIC = flags.DEFINE_enum('metric', 'margin', list(METRICS), 'what is looked at; the report '
                          'shows margins')
PARITY_STEPS = flags.DEFINE_list('parity_steps', [], 'snapshots to score in float32 and bfloat16; '
                                 'default: what was measured before, else four')


def main() -> None:
  run_dir = RunDir(RUN_DIR.value)
  if not RUN_DIR.value or not run_dir.monitor_items.exists():
    raise UserError(f'--run_dir={RUN_DIR.value!r} is not the directory of a monitored run')
  if not all(step.isdecimal() for step in PARITY_STEPS.value):
    raise UserError(f'--parity_steps={",".join(PARITY_STEPS.value)} must be whole numbers')
  curves = read_variants(run_dir.monitor_items, run_dir.monitor_scores)
  check_enough(curves)
  parity = parity_of(run_dir, [int(step) for step in PARITY_STEPS.value])
  analysis = analyze(curves, parity.tolerance(METRIC.value) if parity else None, METRIC.value)
  tokens = findings_lib.tokens_by_step(run_dir)
  found = findings_lib.findings(analysis, tokens, METRIC.value, parity)
  findings_lib.write_findings(run_dir, analysis, found)
  print(findings_lib.told(analysis, found))
  report = f', {build_report(run_dir)}' if METRIC.value == 'margin' else ''
  print(f'written: {run_dir.hops_json}, {run_dir.states_parquet}{report}')


if __name__ == '__main__':
  shared.run(main)
