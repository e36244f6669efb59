"""Puts a run's curves together: every family's band, swings and the controls' verdict on them."""

import dataclasses

import numpy as np

from research.dynamics.controls import ControlState, control_state, is_claimed
from research.dynamics.curves import Context, Curves
from research.dynamics.intervals import Band, over_contexts
from research.dynamics.swings import THRESHOLD, Swing, after_first_rise, find_swings, first_rise

LEAST_ITEMS = 400  # items of a family for its swings to count
LEAST_CONTEXTS = 4  # demonstration contexts of a family for its swings to count
LEAST_CONTROL_ITEMS = 1000


@dataclasses.dataclass(frozen=True)
class JudgedSwing:
  """A swing with the controls' verdict and the number of contexts that made it on their own."""

  swing: Swing
  claimed: bool | None  # None: the run has no controls
  n_contexts_moved: int  # contexts that moved by a whole swing in the same direction
  is_first_rise: bool
  is_after_first_rise: bool


@dataclasses.dataclass(frozen=True)
class Family:
  """The curves of one family (of its control or of its other items) along the run."""

  name: str
  is_control: bool
  contexts: tuple[Context, ...]
  accuracy: Band
  margin: Band
  accuracy_TC: np.ndarray
  margin_TC: np.ndarray
  swings: tuple[JudgedSwing, ...]

  @property
  def n_items(self) -> int:
    """Items scored at every snapshot."""
    return sum(context.n_items for context in self.contexts)

  @property
  def datasets(self) -> tuple[str, ...]:
    """The family's datasets by name."""
    return tuple(sorted({context.dataset for context in self.contexts}))

  @property
  def is_large_enough(self) -> bool:
    """Enough items in enough demonstration contexts for a swing to count."""
    return self.n_items >= LEAST_ITEMS and len(self.contexts) >= LEAST_CONTEXTS

  @property
  def first_rise(self) -> JudgedSwing | None:
    """The first upward swing."""
    return next((judged for judged in self.swings if judged.is_first_rise), None)

  @property
  def hops(self) -> tuple[JudgedSwing, ...]:
    """The swings after the first rise."""
    return tuple(judged for judged in self.swings if judged.is_after_first_rise)


@dataclasses.dataclass(frozen=True)
class Analysis:
  """Everything that the monitors of one run say."""

  steps: np.ndarray
  families: tuple[Family, ...]  # without the controls; most swings first, then by name
  controls: ControlState | None  # all control items together
  control_families: tuple[Family, ...]
  control_states: dict[str, ControlState]  # by dataset


def analyze(curves: Curves, threshold: float = THRESHOLD) -> Analysis:
  """Returns the families of a run with their swings, and the state of its controls."""
  groups = sorted({(context.is_control, context.family) for context in curves.contexts})
  controls = _pooled_controls(curves, lambda context: True)
  families = [
      _family(curves, name, is_control, controls, threshold) for is_control, name in groups
  ]
  hopping_first = lambda family: (-len(family.hops), -len(family.swings), family.name)
  names = sorted({c.dataset for c in curves.contexts if c.is_control})
  return Analysis(
      steps=curves.steps,
      families=tuple(sorted((f for f in families if not f.is_control), key=hopping_first)),
      controls=controls,
      control_families=tuple(f for f in families if f.is_control),
      control_states={
          name: _pooled_controls(curves, lambda context, name=name: context.dataset == name)
          for name in names
      })


def _pooled_controls(curves, chosen):
  index = [i for i, c in enumerate(curves.contexts) if c.is_control and chosen(c)]
  if not index:
    return None
  n_items = np.array([curves.contexts[i].n_items for i in index])
  pooled = curves.accuracy_TC[:, index] @ n_items / n_items.sum()
  return control_state(curves.steps, pooled, int(n_items.sum()))


def _family(curves, name, is_control, controls, threshold):
  index = [
      i for i, c in enumerate(curves.contexts) if c.family == name and c.is_control == is_control
  ]
  contexts = tuple(curves.contexts[i] for i in index)
  n_items = [context.n_items for context in contexts]
  datasets = [context.dataset for context in contexts]
  accuracy_TC, margin_TC = curves.accuracy_TC[:, index], curves.margin_TC[:, index]
  accuracy = over_contexts(accuracy_TC, n_items, datasets, bounds=(0., 1.))
  swings = find_swings(curves.steps, accuracy.mean, threshold)
  rise, later = first_rise(swings), after_first_rise(swings)
  judged = tuple(
      JudgedSwing(
          swing, is_claimed(swing, controls),
          _n_contexts_moved(curves.steps, accuracy_TC, swing, threshold),
          is_first_rise=swing is rise, is_after_first_rise=any(swing is s for s in later))
      for swing in swings)
  margin = over_contexts(margin_TC, n_items, datasets, bounds=(-1., 1.))
  return Family(name, is_control, contexts, accuracy, margin, accuracy_TC, margin_TC, judged)


def _n_contexts_moved(steps, accuracy_TC, swing, threshold):
  """Counts the contexts whose mean over the two held snapshots moved by the threshold."""
  old = int(np.searchsorted(steps, swing.from_step))
  new = int(np.searchsorted(steps, swing.to_step))
  moved = accuracy_TC[new:new + 2].mean(0) - accuracy_TC[old - 1:old + 1].mean(0)
  sign = 1. if swing.direction == 'up' else -1.
  return int(np.sum(sign * moved >= threshold - 1e-9))
