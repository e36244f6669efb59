"""What the hop detector does on simulated trajectories: batches, totals, shares, their picture."""

import dataclasses
import json
import pathlib
import time

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np
from scipy import stats

from experiments.benchmarks import simulated_scores as simulated
from research.dynamics import detector
from research.dynamics.states import over_contexts
from research.reports.palette import LIGHT

NULLS = {'constant': simulated.constant, 'rise': simulated.smooth_rise,
         'drift': simulated.slow_drift, 'noise': simulated.near_the_center}
KINDS = (*NULLS, 'hops')
BATCH = 20


@dataclasses.dataclass(frozen=True)
class Trial:
  """What is simulated.

  Attributes:
    size: of every trajectory.
    noise: of trajectories without hops; the constant ones have no common noise.
    hop_noise: common noise of a checkpoint in trajectories with a hop.
    shift: margin between both levels of a hop.
    dwell: checkpoints for which it lasts.
    seed: of everything random.
  """

  size: simulated.Size
  noise: simulated.Noise
  hop_noise: float
  shift: float
  dwell: int
  seed: int

  def noise_of(self, kind: str) -> simulated.Noise:
    """Returns the noise of trajectories of a kind."""
    common = {'constant': 0.0, 'hops': self.hop_noise}.get(kind, self.noise.common_step)
    return dataclasses.replace(self.noise, common_step=common)


def run_kind(kind: str, trial: Trial, n_series: int, path: pathlib.Path) -> dict[str, float]:
  """Returns the totals of a kind, computing the batches that the file does not have."""
  rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
  n_batches, n_before, began = -(-n_series // BATCH), len(rows), time.monotonic()
  for i in range(n_before, n_batches):
    random = np.random.default_rng([trial.seed, KINDS.index(kind), i])
    rows.append(simulate_batch(kind, trial, BATCH, random))
    with path.open('a') as file:
      file.write(json.dumps(rows[-1]) + '\n')
    left = (time.monotonic() - began) / (i + 1 - n_before) * (n_batches - i - 1)
    print(f'\r{kind}: {(i + 1) * BATCH} of {n_batches * BATCH}, {left:.0f} s left  ', end='',
          flush=True)
  print()
  rows = rows[:n_batches]
  return {name: sum(row[name] for row in rows) for name in rows[0]}


def simulate_batch(kind: str, trial: Trial, n: int, random: np.random.Generator
                   ) -> dict[str, float]:
  """Returns counts over n trajectories: alarms, hops found, intervals that cover.

  In trajectories with a hop an alarm is a call more than one checkpoint off its two edges. `steps`
  counts trajectories with a sudden step whatever the states beside it, `naive` those of the rule.
  """
  size, noise = trial.size, trial.noise_of(kind)
  deviation = simulated.spread(noise)
  start = None
  if kind == 'hops':
    levels, start = simulated.planted_hops(size, deviation, n, random, trial.shift,
                                           trial.dwell)
  else:
    levels = NULLS[kind](size, deviation, n, random)
  scores = simulated.draw(levels, noise, size, random)
  weights = np.full(size.n_contexts, 1 / size.n_contexts)
  windows = detector.windows(detector.series_of_contexts(scores.margin_BKTC, weights))
  found = windows.is_hop
  at_edge = np.zeros_like(found)
  hit = np.zeros(n, bool)
  if start is not None:
    center = np.arange(found.shape[-1]) + detector.DWELL
    near = lambda edge: np.abs(center - (edge[:, None] - 0.5)) <= 1.5
    hit = np.any(found[:, 0] & near(start), -1)
    at_edge[:, 0] = near(start) | near(start + trial.dwell)
  counts = {'n': n, 'alarms': np.sum(np.any(found & ~at_edge, (1, 2))), 'hits': np.sum(hit)}
  steps = windows.adjusted_p <= detector.FALSE_DISCOVERIES
  counts['steps'] = np.sum(np.any(steps, (1, 2)))
  above = scores.accuracy_BKTC.mean(-1) > 0.5
  crossed = above[..., 1:] != above[..., :-1]
  counts['naive'] = np.sum(np.any(crossed, (1, 2)))
  counts['naive_calls'] = np.sum(crossed)
  for name, values, truth in (('margin', scores.margin_BKTC, scores.truth_BKT),
                              ('accuracy', scores.accuracy_BKTC, scores.accuracy_truth_BKT)):
    low, high = over_contexts(values, weights).interval()
    counts[f'{name}_covered'] = np.sum((low <= truth) & (truth <= high)) / truth[0].size
  return {name: float(value) for name, value in counts.items()}


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
