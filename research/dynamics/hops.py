"""The hops of a monitored run: every dataset's states, hops and what could have been seen.

The detector sees contexts with their prompt variants pooled. It is then asked again of every
variant alone, and a hop is told with the number of variants in which it is found.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from research.dynamics import contrasts, detector
from research.dynamics.controls import ControlState, controls_of
from research.dynamics.curves import Curves, of_variant, pooled, variants_of
from research.dynamics.states import (
    Levels, State, coherence, dwell_times, occupancy, over_contexts, states)
from research.errors import UserError
from research.monitors.items import MATCHED

METRICS = {'margin': (0.0, detector.MARGINS), 'accuracy': (0.5, detector.ACCURACIES)}


class CalledHop(NamedTuple):
  """A hop and the prompt variants that show it.

  Attributes:
    hop: as the detector called it; `hop.is_confirmed` unless controls forbid it.
    interval: 95% interval of `hop.change`, by `change_interval`.
    n_agreeing: prompt variants of the dataset in which it is confirmed.
    n_variants: prompt variants that have enough contexts to say.
  """

  hop: detector.Hop
  interval: tuple[float, float]
  n_agreeing: int
  n_variants: int


@dataclasses.dataclass(frozen=True)
class DatasetHops:
  """One dataset along a run.

  Attributes:
    name: of the dataset.
    is_control: whether it is one that should not hop.
    levels: means and standard errors at every checkpoint, (T,).
    states: of `State`, (T,), false discoveries controlled over all datasets and checkpoints.
    hops: called ones; those that controls forbid are not confirmed.
    occupancy: share of the checkpoints in each state.
    dwell_times: of each visit to a confident state, in steps.
    least_detectable: change of a lone hop found with a power of 0.95.
    is_blind: whether that is more than the metric can change, so that no hop could be seen.
    tolerance: distance from the center that two ways of scoring leave open.
  """

  name: str
  is_control: bool
  levels: Levels
  states: np.ndarray
  hops: tuple[CalledHop, ...]
  occupancy: dict[State, float]
  dwell_times: dict[State, list[float]]
  least_detectable: float
  is_blind: bool
  tolerance: float

  @property
  def confirmed(self) -> tuple[CalledHop, ...]:
    """The hops that no restless control speaks against."""
    return tuple(called for called in self.hops if called.hop.is_confirmed)


@dataclasses.dataclass(frozen=True)
class RunHops:
  """What the detector says of a run.

  Attributes:
    datasets: those with enough contexts, in order of name.
    left_out: names of those with too few.
    coherence_KK: correlations between the levels of the datasets; NaN where one never moves.
  """

  datasets: tuple[DatasetHops, ...]
  left_out: tuple[str, ...]
  coherence_KK: np.ndarray


class _Gates(NamedTuple):
  """The controls together (None without any), and by name those that one dataset has for itself."""

  pooled: ControlState | None
  own: Mapping[str, ControlState]

  def of(self, name: str, hop: detector.Hop) -> detector.Hop:
    """Returns a dataset's hop; not calm where its own control was restless around it."""
    around = slice(max(0, hop.before - detector.DWELL), hop.after + detector.DWELL + 1)
    if name in self.own and not self.own[name].inside[around].all():
      return dataclasses.replace(hop, is_calm=False)
    return hop


class _Detected(NamedTuple):
  """The series, single levels and hops by name of datasets with enough contexts."""

  series: detector.Series
  levels: Levels
  is_control: dict[str, bool]
  hops: dict[str, list[detector.Hop]]


def least_checkpoints() -> int:
  """Returns how many checkpoints a run needs before a hop can be told."""
  return contrasts.least_checkpoints(detector.DWELL)


def check_enough(curves: Curves) -> None:
  """Raises UserError where checkpoints, or contexts in every dataset, are too few for a hop."""
  if len(curves.steps) < least_checkpoints():
    raise UserError(f'{len(curves.steps)} scored checkpoints are too few to tell a hop; '
                    f'{least_checkpoints()} are needed: score more of them')
  counts = {name: len(index) for name, index in _by_dataset(pooled(curves)).items()}
  if max(counts.values()) < detector.LEAST_CONTEXTS:
    raise UserError(f'no dataset has {detector.LEAST_CONTEXTS} demonstration contexts (seeds); '
                    f'there are {counts}')


def hops_of_run(curves: Curves, metric: str = 'margin',
                parity: Mapping[str, float] | None = None) -> RunHops:
  """Returns what every dataset did.

  Controls forbid the hops of other datasets only. Items of controls are pooled; a dataset's own
  control (named as it is, with `MATCHED`) forbids its hops alone.

  Args:
    curves: of contexts, or of contexts by prompt variant, along the run.
    metric: of `METRICS`.
    parity: by dataset, bound of what two ways of scoring may differ by, in units of the metric.

  Raises:
    UserError: too few checkpoints, or no dataset has enough contexts.
  """
  check_enough(curves)
  whole = pooled(curves)
  gates = _Gates(controls_of(whole), {
      name: own for name in _by_dataset(whole) if (own := controls_of(whole, name + MATCHED))})
  detected = _detected(whole, metric, parity or {}, gates)
  alone = [_detected(of_variant(curves, number), metric, parity or {}, gates)
           for number in range(max(map(len, variants_of(curves).values())))]
  alone = [variant.hops for variant in alone if variant is not None]
  names, levels, by_dataset = list(detected.hops), detected.levels, _by_dataset(whole)
  tolerance_K1 = _tolerances(names, parity or {})
  center, (low, high) = METRICS[metric]
  all_states = states(levels, center, tolerance_K1)
  # Both flanks must clear the tolerance, and so must the step between them.
  least = detector.least_detectable(detected.series) + 2 * tolerance_K1[:, 0]
  rows = []
  for k, name in enumerate(names):
    others = [hops[name] for hops in alone if name in hops]
    values_TC, weights_C = _of_contexts(whole, metric, by_dataset[name])
    called = tuple(CalledHop(hop, change_interval(values_TC, weights_C, hop),
                             agreement(others, hop), len(others)) for hop in detected.hops[name])
    rows.append(DatasetHops(
        name, detected.is_control[name], Levels(levels.mean[k], levels.error[k],
                                                float(levels.degrees[k, 0])),
        all_states[k], called, occupancy(all_states[k]), dwell_times(all_states[k], curves.steps),
        float(least[k]), bool(least[k] > high - low), float(tolerance_K1[k, 0])))
  left_out = tuple(name for name in by_dataset if name not in names)
  return RunHops(tuple(rows), left_out, coherence(levels.mean.T))


def change_interval(values_TC: np.ndarray, weights_C: np.ndarray, hop: detector.Hop
                    ) -> tuple[float, float]:
  """Returns the 95% interval of a hop's change between its flanks over demonstration contexts.

  Each context is held against itself; what items and prompt variants add is in its means. What
  moves all contexts of a checkpoint alike is not in it: that is judged by the hop's p-value.

  Args:
    values_TC: of the dataset's contexts.
    weights_C: their shares of the items.
    hop: of the dataset.
  """
  early_C = values_TC[hop.center - detector.DWELL:hop.center].mean(0)
  late_C = values_TC[hop.center + 1:hop.center + 1 + detector.DWELL].mean(0)
  low, high = over_contexts(late_C - early_C, weights_C).interval()
  return float(low), float(high)


def agreement(by_variant: Sequence[Sequence[detector.Hop]], hop: detector.Hop) -> int:
  """Returns in how many prompt variants a dataset's hop of this direction and time was confirmed.

  The same time means that its brackets are at most `contrasts.block_length` checkpoints apart.

  Args:
    by_variant: the hops of the same dataset in each of its variants.
    hop: of the dataset.
  """
  near = contrasts.block_length(detector.DWELL)
  return sum(
      any(other.is_confirmed and other.direction == hop.direction
          and abs(other.before - hop.before) <= near for other in hops)
      for hops in by_variant)


def _by_dataset(curves: Curves) -> dict[str, list[int]]:
  groups: dict[str, list[int]] = {}
  for i, context in enumerate(curves.contexts):
    groups.setdefault(context.dataset, []).append(i)
  return groups


def _of_contexts(curves: Curves, metric: str, index: list[int]) -> tuple[np.ndarray, np.ndarray]:
  """Returns the levels (T, C) of some contexts and their shares (C,) of the items."""
  values_TC = curves.margin_TC if metric == 'margin' else curves.accuracy_TC
  n_items = np.array([curves.contexts[i].n_items for i in index], np.float64)
  return values_TC[:, index], n_items / n_items.sum()


def _detected(curves: Curves, metric: str, parity: Mapping[str, float],
              gates: _Gates) -> _Detected | None:
  """The detector's view of curves; None where no dataset has enough contexts."""
  center, bounds = METRICS[metric]
  groups = {name: index for name, index in _by_dataset(curves).items()
            if len(index) >= detector.LEAST_CONTEXTS}
  if not groups:
    return None
  parts, single = [], []
  for index in groups.values():
    values_TC, weights_C = _of_contexts(curves, metric, index)
    parts.append(detector.series_of_contexts(values_TC, weights_C, bounds))
    single.append(over_contexts(values_TC, weights_C))
  series = detector.Series(np.stack([part.mean for part in parts]),
                           _stacked([part.flanks for part in parts]),
                           np.stack([part.noise for part in parts]))
  found = detector.windows(series, center, _tolerances(list(groups), parity))
  is_control = {name: curves.contexts[index[0]].is_control for name, index in groups.items()}
  gated = detector.find_hops(found, series.mean, curves.steps, gates.pooled)
  free = detector.find_hops(found, series.mean, curves.steps)
  hops = {name: [hop if is_control[name] else gates.of(name, hop)
                 for hop in (free if is_control[name] else gated) if hop.dataset == k]
          for k, name in enumerate(groups)}
  return _Detected(series, _stacked(single), is_control, hops)


def _tolerances(names: Sequence[str], parity: Mapping[str, float]) -> np.ndarray:
  return np.array([[parity.get(name, 0.0)] for name in names])


def _stacked(levels: list[Levels]) -> Levels:
  return Levels(np.stack([one.mean for one in levels]), np.stack([one.error for one in levels]),
                np.array([[float(one.degrees)] for one in levels]))
