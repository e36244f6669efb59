"""Measures what captures cost a run in which nothing hops, beyond the monitoring itself.

  python -m experiments.benchmarks.capture_cost
  python -m experiments.benchmarks.capture_cost --rounds=1 --steps=60 --skip=20    (a smoke run)

Runs launchers.pretrain with monitors.captures=0 and with --captures, all else equal, in
interleaved rounds, each run alone; full checkpoints are closer than the experiment's (--every), so
that there is something to keep. Prints wall time with minus without, between two rows of the run
(step --skip and the last) and of the whole command, which ends with the search for what to capture;
that search alone, timed again, as a share of the command; what may be captured and what was, none
where nothing hops; and how many full checkpoints were left beside --keep. Goal: under 2%. In a run
of fewer steps the detector cannot judge a steep rise, which is then captured, and that is said.
"""

import json
import pathlib
import time

from absl import flags

from experiments.benchmarks import command_line
from experiments.benchmarks.estimates import estimate, machine, table
from experiments.benchmarks.timing_rows import interleaved, pretrain, window
from research.dynamics import captures
from research.errors import UserError
from research.run_dir import RunDir, write_whole
from research.training.logs import read_rows

EXPERIMENT = flags.DEFINE_string('experiment', 'quickstart_plain', 'a module of experiments/')
STEPS = flags.DEFINE_integer('steps', 2400, 'steps of each run', lower_bound=2)
SKIP = flags.DEFINE_integer('skip', 100, 'first steps that are not counted', lower_bound=1)
EVERY = flags.DEFINE_integer('every', 200, 'steps between full checkpoints', lower_bound=1)
KEEP = flags.DEFINE_integer('keep', 2, 'latest full checkpoints that stay', lower_bound=1)
CAPTURES = flags.DEFINE_integer('captures', 3, 'budget of captures', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 3, 'interleaved rounds of two runs', lower_bound=1)
JSON = flags.DEFINE_string('json', '', 'also write everything measured to this file')


def run(way: str, run_dir: RunDir) -> dict[str, float]:
  """Returns the seconds of one run and what it left."""
  whole = pretrain(EXPERIMENT.value, run_dir, {
      'n_steps': STEPS.value, 'checkpoints.every': EVERY.value, 'checkpoints.keep': KEEP.value,
      'monitors.captures': CAPTURES.value if way == 'with' else 0})
  began = time.perf_counter()
  n_chosen = len(captures.chosen(run_dir))
  searched = time.perf_counter() - began
  made = json.loads(run_dir.captures_json.read_text()) if run_dir.captures_json.exists() else []
  return {'window': window(read_rows(run_dir.timings_jsonl), SKIP.value), 'command': whole,
          'search': searched, 'chosen': n_chosen, 'captures': len(made),
          'checkpoints': len([path for path in run_dir.checkpoints.iterdir()
                              if path.name.isdigit()])}


def shares(rounds: list[dict[str, dict[str, float]]], of: str) -> list[float]:
  """Returns the overhead per round: (time with captures - time without) / time without."""
  return [row['with'][of] / row['without'][of] - 1 for row in rounds]


def report(rounds: list[dict[str, dict[str, float]]]) -> str:
  """Returns the table."""
  def told(values: list[float], unit: str) -> str:
    found = estimate(values)
    return f'{found.median:{unit}} ({found.low:{unit}} to {found.high:{unit}})'
  last = rounds[-1]['with']
  return table(['captures, where nothing hops', f'median of {len(rounds)} rounds (interval)'], [
      [f'steps {SKIP.value + 1} to {STEPS.value}, with / without - 1',
       told(shares(rounds, 'window'), '+.2%')],
      ['whole command, with / without - 1', told(shares(rounds, 'command'), '+.2%')],
      ['the search at the end / whole command',
       told([row['with']['search'] / row['without']['command'] for row in rounds], '.2%')],
      ['seconds of the whole command without',
       told([row['without']['command'] for row in rounds], '.1f')],
      ['hops, and changes that the detector cannot judge', f'{last["chosen"]}'],
      [f'captures made, of at most {CAPTURES.value}', f'{last["captures"]}'],
      [f'full checkpoints beside the latest {KEEP.value}',
       f'{max(0, last["checkpoints"] - KEEP.value)}']])


def main() -> None:
  if SKIP.value >= STEPS.value:
    raise UserError(f'--skip={SKIP.value} leaves none of --steps={STEPS.value}')
  facts = machine()
  print(facts, flush=True)
  rounds = interleaved(('with', 'without'), ROUNDS.value, run)
  print(report(rounds))
  if any(row['with']['captures'] for row in rounds):
    print('Something was captured: these figures are not of a run in which nothing hops.')
  if JSON.value:
    write_whole(pathlib.Path(JSON.value), json.dumps(
        {'machine': facts, 'experiment': EXPERIMENT.value, 'rounds': rounds}, indent=2) + '\n')


if __name__ == '__main__':
  command_line.run(main)
