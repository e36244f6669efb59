"""Measures what monitoring and saving cost a run: wall time with minus wall time without.

  python -m experiments.benchmarks.run_cost
  python -m experiments.benchmarks.run_cost --rounds=3 --steps=400

Runs launchers.pretrain three ways at equal steps, in interleaved rounds, each run alone: as the
experiment is (with monitors and saving), with saving only (monitors.suite=none), with neither (no
snapshots; the one full checkpoint that ends every run stands outside the window). Steady state is
the wall time between two rows of the run, step --skip and the last, so imports and compilation do
not count; the cost of the whole command, start and report included, is printed beside it. Choose
--steps minus --skip a multiple of the cadences (quickstart: snapshots 20, held-out loss 100, full
checkpoints 600), so that the window holds everything in the right proportion.
"""

import json
import pathlib

from absl import flags

from experiments.benchmarks import command_line
from experiments.benchmarks.estimates import Estimate, estimate, machine, table
from experiments.benchmarks.timing_rows import NEVER, interleaved, pretrain, window
from research.errors import UserError
from research.run_dir import RunDir, write_whole
from research.training.logs import read_rows

EXPERIMENT = flags.DEFINE_string('experiment', 'quickstart', 'a module of experiments/')
STEPS = flags.DEFINE_integer('steps', 700, 'steps of each run', lower_bound=2)
SKIP = flags.DEFINE_integer('skip', 100, 'first steps that are not counted', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'interleaved rounds of three runs', lower_bound=1)
JSON = flags.DEFINE_string('json', '', 'also write everything measured to this file')

WITH, SAVING, NEITHER = 'monitors and saving', 'saving', 'neither'
WAYS = {
    WITH: {},
    SAVING: {'monitors.suite': 'none'},
    NEITHER: {'monitors.suite': 'none', 'checkpoints.snapshot_every': 0,
              'checkpoints.every': NEVER},
}
# What a cost is: the way that has it, the way that lacks it, its phase on the run's own clock.
COSTS = {'monitoring': (WITH, SAVING, 'monitor_seconds'),
         'saving': (SAVING, NEITHER, 'save_seconds')}


def _run(way: str, run_dir: RunDir) -> dict[str, float]:
  """Returns the seconds of one run: window, whole command, and each phase in the window."""
  whole = pretrain(EXPERIMENT.value, run_dir, {'n_steps': STEPS.value, **WAYS[way]})
  rows = read_rows(run_dir.timings_jsonl)
  return {'window': window(rows, SKIP.value), 'command': whole,
          **{phase: window(rows, SKIP.value, phase) for _, _, phase in COSTS.values()}}


def relative_costs(rounds: list[dict[str, dict[str, float]]], name: str, of: str) -> list[float]:
  """Returns the cost `name` per round: (time with - time without) / time without."""
  with_it, without_it, _ = COSTS[name]
  return [row[with_it][of] / row[without_it][of] - 1 for row in rounds]


def _span(value: Estimate) -> str:
  return f'{value.median:+.1%} ({value.low:+.1%} to {value.high:+.1%})'


def _report(rounds: list[dict[str, dict[str, float]]]) -> str:
  rows = []
  for name, (with_it, without_it, phase) in COSTS.items():
    added = estimate([row[with_it]['command'] - row[without_it]['command'] for row in rounds])
    own = estimate([row[with_it][phase] / row[without_it]['window'] for row in rounds])
    rows.append([name, _span(estimate(relative_costs(rounds, name, 'window'))), _span(own),
                 f'{added.median:+.1f} s ({added.low:+.1f} to {added.high:+.1f})'])
  times = [[way, f'{estimate([row[way]["window"] for row in rounds]).median:.1f}',
            f'{estimate([row[way]["command"] for row in rounds]).median:.1f}'] for way in WAYS]
  return '\n\n'.join([
      table(['cost', 'wall time with / without - 1', "the run's own clock", 'whole command'],
            rows),
      table(['run with', f'steps {SKIP.value + 1} to {STEPS.value}, s', 'whole command, s'],
            times)])


def main() -> None:
  if SKIP.value >= STEPS.value:
    raise UserError(f'--skip={SKIP.value} leaves none of --steps={STEPS.value}')
  facts = machine()
  print(facts, flush=True)
  rounds = interleaved(list(WAYS), ROUNDS.value, _run)
  coverage = estimate([0.0] * ROUNDS.value).coverage
  print(f'\n{EXPERIMENT.value}: medians of {ROUNDS.value} interleaved rounds; in brackets the '
        f'order-statistic interval that covers the median with probability {coverage:.1%}.\n')
  print(_report(rounds))
  if JSON.value:
    write_whole(pathlib.Path(JSON.value), json.dumps(
        {'machine': facts, 'experiment': EXPERIMENT.value, 'steps': STEPS.value, 'skip': SKIP.value,
         'rounds': rounds}, indent=2) + '\n')


if __name__ == '__main__':
  command_line.run(main)
