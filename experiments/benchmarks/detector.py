"""False alarms, power and coverage of the hop detector on simulated trajectories.

  python -m experiments.benchmarks.detector --out=/tmp/detector --n_series=2000

Four kinds of trajectories have no hop: `constant` (nothing but sampling and contexts), `rise`
(logistic, at least a quarter of the trajectory long), `drift` (slow waves through the center) and
`noise` (levels near the center under autocorrelated checkpoint noise); all but the first have
that noise. `hops` have one of --shift in margin that lasts --dwell checkpoints, in the first
dataset. A false alarm is a trajectory in which a hop is called in any dataset at any checkpoint.
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
import time

from absl import flags
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np
from scipy import stats

from experiments.benchmarks import command_line, noise_estimates, simulated_scores as simulated
from experiments.benchmarks.estimates import table
from research.dynamics import detector
from research.dynamics.states import over_contexts
from research.errors import UserError
from research.reports.palette import LIGHT

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

NULLS = {'constant': simulated.constant, 'rise': simulated.smooth_rise,
         'drift': simulated.slow_drift, 'noise': simulated.near_the_center}
KINDS = (*NULLS, 'hops')
BATCH = 20


def simulate_batch(kind: str, size: simulated.Size, noise: simulated.Noise, shift: float,
                   dwell: int, n: int, random: np.random.Generator) -> dict[str, float]:
  """Returns counts over n trajectories: alarms, naive alarms, hops found, intervals that cover.

  In trajectories with a hop an alarm is a call more than one checkpoint off its two edges.
  """
  deviation = simulated.spread(noise)
  start = None
  if kind == 'hops':
    levels, start = simulated.planted_hops(size, deviation, n, random, shift, dwell)
  else:
    levels = NULLS[kind](size, deviation, n, random)
  scores = simulated.draw(levels, noise, size, random)
  weights = np.full(size.n_contexts, 1 / size.n_contexts)
  found = detector.windows(detector.series_of_contexts(scores.margin_BKTC, weights)).is_hop
  at_edge = np.zeros_like(found)
  hit = np.zeros(n, bool)
  if start is not None:
    center = np.arange(found.shape[-1]) + detector.DWELL
    near = lambda edge: np.abs(center - (edge[:, None] - 0.5)) <= 1.5
    hit = np.any(found[:, 0] & near(start), -1)
    at_edge[:, 0] = near(start) | near(start + dwell)
  counts = {'n': n, 'alarms': np.sum(np.any(found & ~at_edge, (1, 2))), 'hits': np.sum(hit)}
  above = scores.accuracy_BKTC.mean(-1) > 0.5
  crossed = above[..., 1:] != above[..., :-1]
  counts['naive'] = np.sum(np.any(crossed, (1, 2)))
  counts['naive_calls'] = np.sum(crossed)
  for name, values, truth in (('margin', scores.margin_BKTC, scores.truth_BKT),
                              ('accuracy', scores.accuracy_BKTC, scores.accuracy_truth_BKT)):
    low, high = over_contexts(values, weights).interval()
    counts[f'{name}_covered'] = np.sum((low <= truth) & (truth <= high)) / truth[0].size
  return {name: float(value) for name, value in counts.items()}


def run_kind(kind: str, path: pathlib.Path) -> dict[str, float]:
  """Returns the totals of a kind, computing the batches that the file does not have."""
  size = simulated.Size(N_CHECKPOINTS.value, N_DATASETS.value, N_CONTEXTS.value, N_ITEMS.value)
  values = {name: flag.value for name, flag in NOISE.items()}
  values['common_step'] = {'constant': 0.0, 'hops': CALM.value}.get(kind, values['common_step'])
  noise = simulated.Noise(**values)
  rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  n_batches, n_before, began = -(-N_SERIES.value // BATCH), len(rows), time.monotonic()
  for i in range(n_before, n_batches):
    random = np.random.default_rng([SEED.value, KINDS.index(kind), i])
    rows.append(simulate_batch(kind, size, noise, SHIFT.value, DWELL.value, BATCH, random))
    with path.open('a') as file:
      file.write(json.dumps(rows[-1]) + '\n')
    left = (time.monotonic() - began) / (i + 1 - n_before) * (n_batches - i - 1)
    print(f'\r{kind}: {(i + 1) * BATCH} of {n_batches * BATCH}, {left:.0f} s left  ', end='',
          flush=True)
  print()
  rows = rows[:n_batches]
  return {name: sum(row[name] for row in rows) for name in rows[0]}


def share(count: float, n: float) -> tuple[float, float, float]:
  """Returns a share with its Clopper-Pearson (1934) 95% interval."""
  low = stats.beta.ppf(0.025, count, n - count + 1) if count else 0.0
  high = stats.beta.ppf(0.975, count + 1, n - count) if count < n else 1.0
  return count / n, float(low), float(high)


def draw_figure(totals: dict[str, dict[str, float]], path: pathlib.Path) -> None:
  """Draws false alarms and power with intervals, the naive rule beside them, and coverage."""
  figure = Figure(figsize=(9, 3.2), layout='constrained')
  left, right = figure.subplots(1, 2)
  names = list(totals)
  for offset, key, color in ((-0.12, None, 'generalizing'), (0.12, 'naive', 'shortcut')):
    for i, name in enumerate(names):
      count = totals[name][key or ('hits' if name == 'hops' else 'alarms')]
      value, low, high = share(count, totals[name]['n'])
      left.errorbar(i + offset, value, [[value - low], [high - value]], fmt='o',
                    color=LIGHT[color], label=(key or 'detector') if not i else None)
  left.axhline(0.05, color=LIGHT['soft'], linewidth=0.8)
  left.set(title='calls a hop (of hops: the right one)', ylabel='share of trajectories')
  left.legend(frameon=False)
  for offset, key, color in ((-0.1, 'margin', 'generalizing'), (0.1, 'accuracy', 'second')):
    right.plot(np.arange(len(names)) + offset,
               [totals[name][f'{key}_covered'] / totals[name]['n'] for name in names], 'o',
               color=LIGHT[color], label=key)
  right.axhspan(0.93, 0.97, color=LIGHT['grid'])
  right.set(title='coverage of 95% intervals', ylim=(0.85, 1))
  right.legend(frameon=False)
  for axis in (left, right):
    axis.set_xticks(range(len(names)), names)
  FigureCanvasAgg(figure).print_png(path, metadata={'Software': None})


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
              if flag in flags.FLAGS.get_key_flags_for_module('__main__')
              and name not in ('out', 'n_series', 'estimate')}
  settings |= {'thresholds': [detector.DWELL, detector.ALLOWANCE, detector.FALSE_DISCOVERIES,
                              detector.CONFIDENCE]}
  digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
  out = pathlib.Path(OUT.value) / digest
  out.mkdir(parents=True, exist_ok=True)
  (out / 'settings.json').write_text(json.dumps(settings, indent=1))
  totals = {kind: run_kind(kind, out / f'{kind}.jsonl') for kind in KINDS}
  percent = lambda count, n: '{:.1%} ({:.1%} to {:.1%})'.format(*share(count, n))
  rows = [[kind, f'{t["n"]:.0f}', percent(t['alarms'], t['n']),
           percent(t['hits'], t['n']) if kind == 'hops' else '', f'{t["naive"] / t["n"]:.1%}',
           f'{t["naive_calls"] / t["n"]:.1f}', f'{t["margin_covered"] / t["n"]:.1%}',
           f'{t["accuracy_covered"] / t["n"]:.1%}'] for kind, t in totals.items()]
  print(table(['kind', 'series', 'false alarms', 'hops found', 'naive alarms', 'naive calls each',
               'margin covered', 'accuracy covered'], rows))
  draw_figure(totals, out / 'detector.png')
  print(f'{out / "detector.png"}')


if __name__ == '__main__':
  command_line.run(main)
