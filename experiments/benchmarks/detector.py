"""False alarms, power and coverage of the hop detector on simulated trajectories.

  python -m experiments.benchmarks.detector --out=/tmp/detector --n_series=2000

Four kinds of trajectories have no hop: `constant` (nothing but sampling and contexts), `rise`
(logistic, at least a quarter of the trajectory long), `drift` (slow waves through the center) and
`noise` (levels near the center under autocorrelated checkpoint noise); all but the first have
that noise. `hops` have one of --shift in margin that lasts --dwell checkpoints, in the first
dataset. A false alarm is a trajectory in which a hop is called in any dataset at any checkpoint,
a false step one with a significant step whatever the states beside it.
`naive` calls one wherever a dataset's accuracy crosses 0.5. Coverage is that of the 95% intervals
of a single checkpoint's accuracy and margin over demonstration contexts.

The defaults of the noise are medians over the datasets of a quickstart run that do not hop, in
log-odds over the second half of the run (--estimate=RUN/monitors prints them). The detector's
thresholds are constants of research/dynamics/detector.py. Batches that are done are kept in
--out: the same command goes on where it stopped. A table is printed, detector.png is drawn.
"""

import hashlib
import json
import pathlib
import sys

from absl import flags

from experiments.benchmarks import command_line, detector_trials, noise_estimates
from experiments.benchmarks.detector_trials import KINDS, share
from experiments.benchmarks.estimates import table
from experiments.benchmarks.simulated_scores import Noise, Size
from research.dynamics import detector
from research.errors import UserError

OUT = flags.DEFINE_string('out', None, 'folder of results; repeat the command to go on')
ESTIMATE = flags.DEFINE_string('estimate', None, 'monitors folder of a run: print its noise, end')
N_SERIES = flags.DEFINE_integer('n_series', 2000, 'trajectories of each kind')
SEED = flags.DEFINE_integer('seed', 2000, 'of the simulation; thresholds were chosen on seed 1')
N_CHECKPOINTS = flags.DEFINE_integer('n_checkpoints', 120, 'of a trajectory')
N_DATASETS = flags.DEFINE_integer('n_datasets', 4, 'of a trajectory')
N_CONTEXTS = flags.DEFINE_integer('n_contexts', 16, 'demonstration contexts of a dataset')
N_ITEMS = flags.DEFINE_integer('n_items', 50, 'of a context')
SHIFT = flags.DEFINE_float('shift', 0.3, 'margin between the two levels of a hop')
DWELL = flags.DEFINE_integer('dwell', 15, 'checkpoints for which a hop lasts')
_NOISE = {
    'item': (1.7, 'between items'), 'context': (0.35, 'between contexts'),
    'common_step': (0.45, 'of a checkpoint, all items together'),
    'context_step': (0.12, 'of a context at a checkpoint'),
    'item_step': (1.6, 'of an item at a checkpoint'),
    'common_correlation': (0.3, 'of neighboring checkpoints, of common_step'),
    'context_correlation': (0.3, 'of neighboring checkpoints, of context_step')}
NOISE = {name: flags.DEFINE_float(name, value, f'{text} (log-odds)' if 'corr' not in name else text)
         for name, (value, text) in _NOISE.items()}
CALM = flags.DEFINE_float('hop_common_step', 0.05, 'common_step of the trajectories with a hop')


def main() -> None:
  if ESTIMATE.value:
    print(noise_estimates.report(pathlib.Path(ESTIMATE.value)))
    return
  if not OUT.value:
    raise UserError('--out=FOLDER is needed for the results')
  if DWELL.value <= detector.DWELL or N_CHECKPOINTS.value < 4 * DWELL.value:
    raise UserError(f'--dwell={DWELL.value} must be above the {detector.DWELL} checkpoints for '
                    f'which the detector wants a state held, and at most a quarter of '
                    f'--n_checkpoints={N_CHECKPOINTS.value}')
  settings = {name: flag.value for name, flag in flags.FLAGS.__flags.items()
              if flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
              and name not in ('out', 'n_series', 'estimate')}
  settings |= {'thresholds': [detector.DWELL, detector.ALLOWANCE, detector.FALSE_DISCOVERIES,
                              detector.CONFIDENCE]}
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
  out = pathlib.Path(OUT.value) / digest
  out.mkdir(parents=True, exist_ok=True)
  (out / 'settings.json').write_text(json.dumps(settings, indent=1))
  trial = detector_trials.Trial(
      Size(N_CHECKPOINTS.value, N_DATASETS.value, N_CONTEXTS.value, N_ITEMS.value),
      Noise(**{name: flag.value for name, flag in NOISE.items()}), CALM.value, SHIFT.value,
      DWELL.value, SEED.value)
  totals = {kind: detector_trials.run_kind(kind, trial, N_SERIES.value, out / f'{kind}.jsonl')
            for kind in KINDS}
  percent = lambda count, n: '{:.1%} ({:.1%} to {:.1%})'.format(*share(count, n))
  rows = [[kind, f'{t["n"]:.0f}', percent(t['alarms'], t['n']),
           '' if kind == 'hops' else percent(t['steps'], t['n']),
           percent(t['hits'], t['n']) if kind == 'hops' else '', f'{t["naive"] / t["n"]:.1%}',
           f'{t["naive_calls"] / t["n"]:.1f}', f'{t["margin_covered"] / t["n"]:.1%}',
           f'{t["accuracy_covered"] / t["n"]:.1%}'] for kind, t in totals.items()]
  print(table(['kind', 'series', 'false alarms', 'false steps', 'hops found', 'naive alarms', 'naive calls each',
               'margin covered', 'accuracy covered'], rows))
  detector_trials.draw_figure(totals, out / 'detector.png')
  print(f'{out / "detector.png"}')


if __name__ == '__main__':
  command_line.run(main)
