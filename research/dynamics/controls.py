"""The control gate: a hop is confirmed only while ordinary documents' monitors stay calm."""

import dataclasses

import numpy as np

from research.dynamics.curves import Curves

POINTS = 0.03  # accuracy; the least tolerance around the controls' own level
STANDARD_ERRORS = 4.0


@dataclasses.dataclass(frozen=True)
class ControlState:
  """How calm the controls were: their level, its tolerance and every snapshot's accuracy."""

  steps: np.ndarray
  accuracy: np.ndarray
  n_items: int
  level: float  # median accuracy over the last half of the steps
  tolerance: float  # accuracy
  settled_step: int | None  # first snapshot within tolerance of the level

  @property
  def inside(self) -> np.ndarray:
    """Bool per snapshot: within tolerance of the level."""
    return np.abs(self.accuracy - self.level) <= self.tolerance + 1e-9

  @property
  def largest_deviation(self) -> float:
    """Largest distance from the level once settled; NaN where the controls never settled."""
    if self.settled_step is None:
      return float('nan')
    settled = self.steps >= self.settled_step
    return float(np.max(np.abs(self.accuracy - self.level)[settled]))

  @property
  def calm(self) -> bool:
    """True where every snapshot since they settled is within tolerance."""
    if self.settled_step is None:
      return False
    return bool(np.all(self.inside[self.steps >= self.settled_step]))

  @property
  def outside_steps(self) -> list[int]:
    """Snapshots outside the tolerance after the controls had settled."""
    if self.settled_step is None:
      return []
    return [int(s) for s in self.steps[~self.inside] if s >= self.settled_step]


def control_state(steps: np.ndarray, accuracy: np.ndarray, n_items: int) -> ControlState:
  """Returns the state of one control curve.

  The tolerance is the greater of 3 points and 4 binomial standard errors at the level.
  """
  steps, accuracy = np.asarray(steps), np.asarray(accuracy, np.float64)
  level = float(np.median(accuracy[steps >= steps[-1] / 2]))
  error = np.sqrt(level * (1 - level) / n_items)
  tolerance = max(POINTS, STANDARD_ERRORS * float(error))
  reached = np.flatnonzero(np.abs(accuracy - level) <= tolerance + 1e-9)
  settled = int(steps[reached[0]]) if len(reached) else None
  return ControlState(steps, accuracy, n_items, level, tolerance, settled)


def controls_of(curves: Curves, dataset: str | None = None) -> ControlState | None:
  """Returns the state of a run's control items, all or those of a dataset; None without any."""
  index = [i for i, context in enumerate(curves.contexts)
           if context.is_control and dataset in (None, context.dataset)]
  if not index:
    return None
  n_items = np.array([curves.contexts[i].n_items for i in index])
  return control_state(curves.steps, curves.accuracy_TC[:, index] @ n_items / n_items.sum(),
                       int(n_items.sum()))
