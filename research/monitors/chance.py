"""Which tasks a model does by chance.

A model that can do nothing prefers one of two answers all the same, the likelier word, so half of a
dataset's items look solved. Datasets are therefore judged whole, with contexts as the sample: a task
is at chance where neither its dataset nor its control differs from one half.
"""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from research.monitors.items import MATCHED, MonitorItem

FALSE_DISCOVERIES = 0.05  # share of the datasets called off chance that may be at chance


class Level(NamedTuple):
  """Accuracy of a dataset with its 95% Student t interval over contexts, NaN where there is one.

  Attributes:
    p: of a two-sided t test against one half, whose standard error is at least half an item.
  """

  mean: float
  low: float
  high: float
  p: float


def level(right_TI: np.ndarray, seeds: Sequence[int]) -> Level:
  """Returns the accuracy of one dataset over some checkpoints; contexts count alike."""
  contexts = [right_TI[:, np.asarray(seeds) == seed].mean() for seed in sorted(set(seeds))]
  mean, degrees = float(np.mean(contexts)), len(contexts) - 1
  if not degrees:
    return Level(mean, np.nan, np.nan, 1.0)
  error = float(np.std(contexts, ddof=1)) / np.sqrt(degrees + 1)
  half = float(stats.t.ppf(0.975, degrees)) * error
  least = 0.5 / right_TI.shape[1]  # Contexts that agree by accident are no proof.
  p = float(2 * stats.t.sf(abs(mean - 0.5) / max(error, least), degrees))
  return Level(mean, mean - half, mean + half, p)


def levels(items: Sequence[MonitorItem], right_TI: np.ndarray) -> dict[str, Level]:
  """Returns the level of every dataset, in order of appearance."""
  members = collections.defaultdict(list)
  for i, item in enumerate(items):
    members[item.dataset].append(i)
  return {dataset: level(right_TI[:, these], [items[i].seed for i in these])
          for dataset, these in members.items()}


def chance_of_tasks(items: Sequence[MonitorItem], right_TI: np.ndarray) -> np.ndarray:
  """Returns by item the false-discovery rate at which its task is not done by chance, (I,).

  A task is a dataset with its own control (`MATCHED`), and tells as much as the clearer of both;
  the procedure over all datasets is that of Benjamini and Hochberg (1995).
  """
  found = levels(items, right_TI)
  adjusted = dict(zip(found, stats.false_discovery_control([one.p for one in found.values()]),
                      strict=True))
  tasks = collections.defaultdict(lambda: 1.0)
  for dataset, rate in adjusted.items():
    task = dataset.removesuffix(MATCHED)
    tasks[task] = min(tasks[task], float(rate))
  return np.array([tasks[item.dataset.removesuffix(MATCHED)] for item in items])
