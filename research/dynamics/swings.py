"""Swings: moves between held extremes of an accuracy curve, found without looking ahead twice.

A *held* high level is the lower of two consecutive snapshots, a held low level the higher of
two. A swing runs between alternating held extremes at least `threshold` apart. The first upward
swing of a curve is its first rise (it learns); what comes after is the hopping that is counted.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

THRESHOLD = 0.4  # accuracy between the two extremes of a swing
LEAST_SNAPSHOTS = 4  # below this no swing can be seen: two levels, held for two each
_ROUNDING = 1e-9  # 0.7 - 0.3 is 0.39999999999999997 in float64


@dataclasses.dataclass(frozen=True)
class Swing:
  """One move between two held extremes; steps are training steps, levels accuracies in [0, 1].

  The old extreme is last held at `from_step` and the new one first at `to_step`. The move
  itself takes place between `leave_step`, the last snapshot within a quarter of the way of the
  old extreme, and `arrive_step`, the first within a quarter of the way of the new one.
  """

  from_step: int
  to_step: int
  from_level: float
  to_level: float
  leave_step: int
  arrive_step: int

  @property
  def direction(self) -> str:
    """'up' towards the generalizing answer, 'down' towards the shortcut."""
    return 'up' if self.to_level > self.from_level else 'down'


def find_swings(
    steps: Sequence[int], accuracy: Sequence[float], threshold: float = THRESHOLD
) -> tuple[Swing, ...]:
  """Returns the swings of one curve in order of time.

  Args:
    steps: strictly increasing training steps of the snapshots.
    accuracy: accuracy at each snapshot, finite.
    threshold: least distance between the two extremes of a swing, above 0.

  Raises:
    ValueError: lengths differ, steps do not increase, a value is not finite, or the threshold
      is not above 0.
  """
  steps = np.asarray(steps, np.int64)
  accuracy = np.asarray(accuracy, np.float64)
  _check(steps, accuracy, threshold)
  if len(steps) < LEAST_SNAPSHOTS:
    return ()
  held_high = np.minimum(accuracy[:-1], accuracy[1:])
  held_low = np.maximum(accuracy[:-1], accuracy[1:])
  extremes = _alternating_extremes(held_high, held_low, threshold - _ROUNDING)
  return tuple(
      _swing(steps, accuracy, held_high if is_high else held_low, start, end)
      for (is_high, start), (_, end) in zip(extremes, extremes[1:])
  )


def first_rise(swings: Sequence[Swing]) -> Swing | None:
  """Returns the first upward swing, or None where the curve never rose by a whole swing."""
  return next((swing for swing in swings if swing.direction == 'up'), None)


def after_first_rise(swings: Sequence[Swing]) -> tuple[Swing, ...]:
  """Returns the swings that follow the first rise; empty where there was none."""
  rise = first_rise(swings)
  return () if rise is None else tuple(swings)[list(swings).index(rise) + 1:]


def _check(steps, accuracy, threshold):
  if steps.shape != accuracy.shape or steps.ndim != 1:
    raise ValueError(
        f'steps and accuracy must be equally long lists, got shapes {steps.shape} and '
        f'{accuracy.shape}')
  if np.any(np.diff(steps) <= 0):
    at = int(steps[1:][np.diff(steps) <= 0][0])
    raise ValueError(f'steps must increase strictly, step {at} follows one not below it')
  if not np.all(np.isfinite(accuracy)):
    at = int(steps[~np.isfinite(accuracy)][0])
    raise ValueError(f'accuracy at step {at} is not finite')
  if not threshold > 0:
    raise ValueError(f'threshold={threshold} must be above 0')


def _alternating_extremes(held_high, held_low, threshold):
  """Returns (is_high, index of the first pair that holds it) of the alternating extremes."""
  extremes = []
  leg = 0  # +1 while a top is being extended, -1 a bottom, 0 before the first swing
  top = bottom = 0
  for now in range(len(held_high)):
    if leg >= 0 and held_high[now] > held_high[top]:
      top = now
    if leg <= 0 and held_low[now] < held_low[bottom]:
      bottom = now
    if leg >= 0 and held_high[top] - held_low[now] >= threshold:
      extremes.append((True, top))
      leg, bottom = -1, now
    elif leg <= 0 and held_high[now] - held_low[bottom] >= threshold:
      extremes.append((False, bottom))
      leg, top = 1, now
  if leg:
    extremes.append((True, top) if leg > 0 else (False, bottom))
  return extremes


def _swing(steps, accuracy, held, start, end):
  """The swing from the extreme first held by pair `start` to the one first held by pair `end`."""
  from_level = held[start]
  last_held = start + int(np.flatnonzero(held[start:end] == from_level)[-1])
  going_up = accuracy[end] > from_level
  to_level = min(accuracy[end:end + 2]) if going_up else max(accuracy[end:end + 2])
  travelled = (accuracy[last_held:end + 1] - from_level) / (to_level - from_level)
  leave = last_held + int(np.flatnonzero(travelled <= 0.25)[-1])
  arrive = leave + int(np.flatnonzero(travelled[leave - last_held:] >= 0.75)[0])
  return Swing(
      from_step=int(steps[last_held + 1]), to_step=int(steps[end]),
      from_level=float(from_level), to_level=float(to_level),
      leave_step=int(steps[leave]), arrive_step=int(steps[arrive]))
