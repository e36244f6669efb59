"""How noisy a real run's monitors are, in log-odds: the defaults of the detector's benchmark."""

import pathlib

import numpy as np
import pyarrow.parquet as pq

from experiments.benchmarks.estimates import table
from research.errors import UserError
from research.monitors import table as scores_table

COLUMNS = ('item', 'context', 'common_step', 'context_step', 'item_step', 'common_correlation',
           'context_correlation')


def estimates(odds_TI: np.ndarray, seed_of_item: np.ndarray) -> list[float]:
  """Returns estimates in the order of `COLUMNS` for one dataset without hops.

  Steps come from second differences (variance 1.5 times that of white noise), so that trends do
  not count; means of a context carry their items' share, which is taken off. Correlations are
  those of deviations from a parabola (common) and from the common curve (contexts).

  Args:
    odds_TI: log-odds of the generalizing answer by checkpoint and item.
    seed_of_item: (I,) the demonstration context of each item.
  """
  seeds = np.unique(seed_of_item)
  inside = [seed_of_item == seed for seed in seeds]
  differences_TI = odds_TI[1:-1] - (odds_TI[:-2] + odds_TI[2:]) / 2
  of_items = np.mean([differences_TI[:, at].var(1, ddof=1).mean() for at in inside])
  n_items = 1 / np.mean([1 / at.sum() for at in inside])
  contexts_TC = np.stack([odds_TI[:, at].mean(1) for at in inside], -1)
  steps_TC = np.stack([differences_TI[:, at].mean(1) for at in inside], -1)
  between = steps_TC.var(1, ddof=1).mean()
  of_contexts = max(between - of_items / n_items, 0)
  of_all = max(steps_TC.mean(1).var() - between / len(seeds), 0)
  levels = odds_TI.mean(0)
  time = np.arange(len(odds_TI))
  curve = odds_TI.mean(1)
  rest = curve - np.polyval(np.polyfit(time, curve, 2), time)
  own_TC = contexts_TC - contexts_TC.mean(1, keepdims=True)
  own_TC -= own_TC.mean(0)
  return [
      np.sqrt(np.mean([levels[at].var(ddof=1) for at in inside])),
      np.std([levels[at].mean() for at in inside], ddof=1),
      *np.sqrt(np.array([of_all, of_contexts, of_items]) / 1.5),
      np.corrcoef(rest[1:], rest[:-1])[0, 1],
      (own_TC[1:] * own_TC[:-1]).sum() / (own_TC**2).sum()]


def report(monitors: pathlib.Path) -> str:
  """Returns a table of every dataset's noise over the second half of a run."""
  steps = scores_table.score_steps(monitors / 'scores')
  if len(steps) < 16:
    raise UserError(f'{monitors} has scores of {len(steps)} checkpoints; 16 or more are needed')
  items = pq.read_table(monitors / 'items.parquet', columns=['item', 'dataset', 'seed'])
  items = items.sort_by('item')
  dataset, seed = items['dataset'].to_numpy(zero_copy_only=False), items['seed'].to_numpy()
  odds_TI = []
  for step in steps[len(steps) // 2:]:
    _, scores = scores_table.read_scores(monitors / 'scores' / scores_table.scores_name(step))
    odds_TI.append(np.subtract(scores.logp_generalizing, scores.logp_shortcut, dtype=np.float64))
  odds_TI = np.stack(odds_TI)
  rows = []
  for name in np.unique(dataset):
    here = dataset == name
    if len(np.unique(seed[here])) > 2:
      rows.append([str(name), *(f'{x:.2f}' for x in estimates(odds_TI[:, here], seed[here]))])
  return table(['dataset', *COLUMNS], rows)
