"""What a model does at a checkpoint: GENERALIZING, PATTERN or UNCERTAIN, and for how long."""

import dataclasses
import enum
from collections.abc import Sequence

import numpy as np
from scipy import stats

FALSE_DISCOVERIES = 0.05  # share of confident states that may be wrong


class State(enum.IntEnum):
  """Which answer is preferred beyond doubt."""

  PATTERN = -1
  UNCERTAIN = 0
  GENERALIZING = 1


@dataclasses.dataclass(frozen=True)
class Levels:
  """Means over contexts and their standard errors, of the same shape; Student t with `degrees`."""

  mean: np.ndarray
  error: np.ndarray
  degrees: float | np.ndarray  # broadcast to them; infinite where standard errors are given

  def interval(self, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """Returns lower and upper bounds."""
    half = stats.t.ppf(0.5 + confidence / 2, self.degrees) * self.error
    return self.mean - half, self.mean + half

  def p_values(self, center: float, tolerance: np.ndarray | float = 0.0) -> np.ndarray:
    """Returns two-sided p-values of a mean within `tolerance` of the center."""
    distance = np.maximum(np.abs(self.mean - center) - tolerance, 0)
    with np.errstate(divide='ignore', invalid='ignore'):
      ratio = np.where(distance > 0, distance / self.error, 0.0)
    return 2 * stats.t.sf(ratio, self.degrees)


def over_contexts(values: np.ndarray, weights: np.ndarray) -> Levels:
  """Returns weighted means over contexts with standard errors from how contexts disagree.

  Contexts (demonstration seeds) are the top of the hierarchy: what items and prompt variants add
  is in their means, so items that share demonstrations never count as so many contexts.
  It is the case of one stratum of `research.dynamics.intervals`, for any number of leading axes.

  Args:
    values: (..., C) means of the contexts' items.
    weights: (C,) shares of the items, that sum to one; C at least 2.
  """
  n_contexts = len(weights)
  mean = values @ weights
  variance = (values - mean[..., None])**2 @ weights**2 * n_contexts / (n_contexts - 1)
  return Levels(mean, np.sqrt(variance), n_contexts - 1)


def states(levels: Levels, center: float, tolerance: np.ndarray | float = 0.0) -> np.ndarray:
  """Returns the `State` of every level, as integers, false discoveries controlled over them all.

  A level is confident where it lies beyond the tolerance around the center with a p-value that
  Benjamini and Hochberg's procedure (1995) rejects at `FALSE_DISCOVERIES`.
  """
  adjusted = stats.false_discovery_control(levels.p_values(center, tolerance), axis=None)
  confident = adjusted.reshape(levels.mean.shape) <= FALSE_DISCOVERIES
  return np.where(confident, np.sign(levels.mean - center), 0).astype(np.int8)


def occupancy(series: np.ndarray) -> dict[State, float]:
  """Returns the share of checkpoints in each state."""
  return {state: float(np.mean(np.asarray(series) == state)) for state in State}


def dwell_times(series: np.ndarray, positions: Sequence[float]) -> dict[State, list[float]]:
  """Returns how long each visit to a confident state lasted, in units of the positions.

  A visit goes from its first to its last checkpoint; uncertain ones between two of the same state
  do not end it. Visits at either end are cut off there.

  Args:
    series: (T,) states.
    positions: of the checkpoints: steps or tokens, ascending.
  """
  confident = np.flatnonzero(series)
  visits: dict[State, list[float]] = {State.GENERALIZING: [], State.PATTERN: []}
  if not len(confident):
    return visits
  kinds = np.asarray(series)[confident]
  for visit in np.split(confident, np.flatnonzero(np.diff(kinds)) + 1):
    visits[State(int(series[visit[0]]))].append(float(positions[visit[-1]] - positions[visit[0]]))
  return visits


def coherence(values_TK: np.ndarray) -> np.ndarray:
  """Returns Pearson correlations (K, K) between the levels of K datasets along a trajectory.

  NaN where a dataset never moves.
  """
  with np.errstate(divide='ignore', invalid='ignore'):
    return np.atleast_2d(np.corrcoef(np.asarray(values_TK, np.float64), rowvar=False))
