"""Swings against closed-form curves and against an exhaustive search for alternating extremes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.dynamics.swings import after_first_rise, find_swings, first_rise

STEPS = np.arange(10, 210, 10)


def levels(*plateaus):
  """Returns the accuracy curve of (level, number of snapshots) plateaus and its steps."""
  accuracy = np.concatenate([np.full(n, level) for level, n in plateaus])
  return 10 * np.arange(1, len(accuracy) + 1), accuracy


def test_square_wave_has_one_swing_per_edge():
  swings = find_swings(*levels((0., 3), (1., 4), (0., 2), (1., 5)))
  assert [(s.from_step, s.to_step, s.direction) for s in swings] == [
      (30, 40, 'up'), (70, 80, 'down'), (90, 100, 'up')]
  assert [(s.leave_step, s.arrive_step) for s in swings] == [(30, 40), (70, 80), (90, 100)]
  assert [(s.from_level, s.to_level) for s in swings] == [(0, 1), (1, 0), (0, 1)]


def test_linear_ramp_leaves_and_arrives_at_its_quarters():
  # Held extremes: 0 up to step 20, 1 from step 120 on; the quarters of the ramp are 45 and 95.
  accuracy = np.interp(np.arange(10, 150, 10), [20, 120], [0., 1.])
  (swing,) = find_swings(np.arange(10, 150, 10), accuracy)
  assert (swing.from_step, swing.to_step) == (20, 120)
  assert (swing.leave_step, swing.arrive_step) == (40, 100)


def test_an_extreme_held_for_one_snapshot_only_is_no_swing():
  assert find_swings(*levels((0., 5), (1., 1), (0., 5))) == ()
  assert len(find_swings(*levels((0., 5), (1., 2), (0., 5)))) == 2


def test_held_level_is_the_worse_of_two_snapshots():
  (swing,) = find_swings([1, 2, 3, 4], [0.1, 0.2, 0.9, 0.7])
  assert (swing.from_level, swing.to_level) == (0.2, 0.7)


@pytest.mark.parametrize('low, high', [(0.3, 0.7), (0.5, 0.9), (0.0, 0.4)])
def test_exactly_the_threshold_counts(low, high):
  assert len(find_swings(*levels((low, 2), (high, 2)))) == 1
  assert find_swings(*levels((low, 2), (high - 0.001, 2))) == ()


def test_hops_are_the_swings_after_the_first_rise():
  swings = find_swings(*levels((.9, 3), (.1, 3), (.9, 3), (.2, 3), (.8, 3)))
  assert [s.direction for s in swings] == ['down', 'up', 'down', 'up']
  assert first_rise(swings) == swings[1]
  assert after_first_rise(swings) == swings[2:]
  only_down = find_swings(*levels((.9, 3), (.1, 3)))
  assert first_rise(only_down) is None and after_first_rise(only_down) == ()


def test_small_moves_between_swings_do_not_end_a_leg():
  # The dip of 0.3 inside the rise is below the threshold: one swing, from 0 to 1.
  (swing,) = find_swings(*levels((0., 3), (.6, 3), (.3, 3), (1., 3)))
  assert (swing.from_level, swing.to_level) == (0., 1.)
  assert swing.leave_step == 30 and swing.arrive_step == 100


def most_alternating_extremes(accuracy, threshold):
  """The longest chain of held extremes, alternately high and low, by trying every pair."""
  n = len(accuracy) - 1
  high = [min(accuracy[i], accuracy[i + 1]) for i in range(n)]
  low = [max(accuracy[i], accuracy[i + 1]) for i in range(n)]
  best = [{'high': 1, 'low': 1} for _ in range(n)]
  for j in range(n):
    for i in range(j):
      if low[j] <= high[i] - threshold:
        best[j]['low'] = max(best[j]['low'], best[i]['high'] + 1)
      if high[j] >= low[i] + threshold:
        best[j]['high'] = max(best[j]['high'], best[i]['low'] + 1)
  return max((max(b.values()) for b in best), default=1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 20), min_size=4, max_size=40))
def test_finds_as_many_swings_as_an_exhaustive_search(twentieths):
  accuracy = np.array(twentieths) / 20
  swings = find_swings(np.arange(len(accuracy)), accuracy)
  assert len(swings) == most_alternating_extremes(accuracy, 0.4 - 1e-9) - 1
  directions = [s.direction for s in swings]
  assert all(a != b for a, b in zip(directions, directions[1:]))
  for swing in swings:
    assert abs(swing.to_level - swing.from_level) >= 0.4 - 1e-9
    assert swing.from_step <= swing.leave_step < swing.arrive_step <= swing.to_step


def test_too_few_snapshots_hold_no_swing():
  assert find_swings([], []) == ()
  assert find_swings([1, 2, 3], [0., 0., 1.]) == ()


@pytest.mark.parametrize('steps, accuracy, words', [
    ([1, 2], [0.], 'equally long'), ([1, 3, 2, 4], [0.] * 4, 'step 2 follows'),
    ([1, 2, 3, 4], [0., 1., np.nan, 0.], 'step 3 is not finite')])
def test_refuses_what_is_no_curve(steps, accuracy, words):
  with pytest.raises(ValueError, match=words):
    find_swings(steps, accuracy)


def test_refuses_a_threshold_of_zero():
  with pytest.raises(ValueError, match='threshold=0'):
    find_swings(STEPS, np.zeros(len(STEPS)), threshold=0)
