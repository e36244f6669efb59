"""The hops of a monitored run: every dataset's states, hops and what could have been seen."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from research.dynamics import contrasts, detector
from research.dynamics.controls import ControlState, control_state
from research.dynamics.curves import Curves
from research.dynamics.states import Levels, State, dwell_times, occupancy, over_contexts, states

METRICS = {'margin': (0.0, detector.MARGINS), 'accuracy': (0.5, detector.ACCURACIES)}


@dataclasses.dataclass(frozen=True)
class DatasetHops:
  """One dataset along a run.

  Attributes:
    name: of the dataset.
    is_control: whether it is one that should not hop.
    states: of `State`, (T,), false discoveries controlled over all datasets and checkpoints.
    hops: called ones; those that controls forbid are not `is_confirmed`.
    occupancy: share of the checkpoints in each state.
    dwell_times: of each visit to a confident state, in steps.
    least_detectable: change of a lone hop found with a power of 0.95.
  """

  name: str
  is_control: bool
  states: np.ndarray
  hops: tuple[detector.Hop, ...]
  occupancy: dict[State, float]
  dwell_times: dict[State, list[float]]
  least_detectable: float


def hops_of_run(curves: Curves, metric: str = 'margin', parity: float = 0.0
                ) -> tuple[list[DatasetHops], list[str]]:
  """Returns what every dataset did, and the datasets with too few contexts to say.

  Controls forbid the hops of other datasets only. Items of controls are pooled.

  Args:
    curves: context means along the run.
    metric: of `METRICS`.
    parity: bound of what two ways of scoring may differ by, in units of the metric.

  Raises:
    ValueError: too few checkpoints, or no dataset has enough contexts.
  """
  center, bounds = METRICS[metric]
  values_TC = curves.margin_TC if metric == 'margin' else curves.accuracy_TC
  groups: dict[str, list[int]] = {}
  for i, context in enumerate(curves.contexts):
    groups.setdefault(context.dataset, []).append(i)
  names = [name for name, index in groups.items() if len(index) >= detector.LEAST_CONTEXTS]
  if not names:
    raise ValueError(f'no dataset has {detector.LEAST_CONTEXTS} demonstration contexts; there are '
                     f'{ {name: len(index) for name, index in groups.items()} }')
  parts, single = [], []
  for name in names:
    n_items = np.array([curves.contexts[i].n_items for i in groups[name]], np.float64)
    weights = n_items / n_items.sum()
    values = values_TC[:, groups[name]]
    parts.append(detector.series_of_contexts(values, weights, bounds))
    single.append(over_contexts(values, weights))
  series = detector.Series(np.stack([part.mean for part in parts]),
                           _stacked([part.flanks for part in parts]),
                           np.stack([part.noise for part in parts]))
  found = detector.windows(series, center, parity)
  calm = _controls(curves)
  is_control = [curves.contexts[groups[name][0]].is_control for name in names]
  forbidding = detector.find_hops(found, series.mean, curves.steps, calm)
  free = detector.find_hops(found, series.mean, curves.steps)
  all_states = states(_stacked(single), center, parity)
  least = detector.least_detectable(series)
  rows = [
      DatasetHops(
          name, is_control[k], all_states[k],
          tuple(hop for hop in (free if is_control[k] else forbidding) if hop.dataset == k),
          occupancy(all_states[k]), dwell_times(all_states[k], curves.steps), float(least[k]))
      for k, name in enumerate(names)]
  return rows, [name for name in groups if name not in names]


def agreement(by_variant: Sequence[Sequence[detector.Hop]], hop: detector.Hop) -> int:
  """Returns in how many prompt variants a hop of this dataset, direction and time was confirmed.

  The same time means that its brackets are at most `contrasts.block_length` checkpoints apart.
  """
  near = contrasts.block_length(detector.DWELL)
  return sum(
      any(other.is_confirmed and other.dataset == hop.dataset and other.direction == hop.direction
          and abs(other.before - hop.before) <= near for other in hops)
      for hops in by_variant)


def _stacked(levels: list[Levels]) -> Levels:
  return Levels(np.stack([one.mean for one in levels]), np.stack([one.error for one in levels]),
                np.array([[float(one.degrees)] for one in levels]))


def _controls(curves: Curves) -> ControlState | None:
  index = [i for i, context in enumerate(curves.contexts) if context.is_control]
  if not index:
    return None
  n_items = np.array([curves.contexts[i].n_items for i in index])
  return control_state(curves.steps, curves.accuracy_TC[:, index] @ n_items / n_items.sum(),
                       int(n_items.sum()))
