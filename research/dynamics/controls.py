"""The control gate: a swing is claimed only while ordinary documents' monitors stay calm."""

import dataclasses

import numpy as np

from research.dynamics.swings import Swing

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


def is_claimed(swing: Swing, controls: ControlState | None) -> bool | None:
  """Returns whether the controls were calm around a swing; None where there are no controls.

  Looked at: the snapshots from `leave_step` to `arrive_step` and one more on either side, as
  both levels of a swing are held for two.
  """
  if controls is None:
    return None
  first = max(int(np.searchsorted(controls.steps, swing.leave_step)) - 1, 0)
  last = int(np.searchsorted(controls.steps, swing.arrive_step, side='right'))
  return bool(np.all(controls.inside[first:last + 1]))
