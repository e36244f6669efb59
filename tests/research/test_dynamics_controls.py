"""The control gate on curves whose level, tolerance and outliers are known in closed form."""

import numpy as np
import pytest

from research.dynamics.controls import control_state, is_claimed
from research.dynamics.swings import Swing

STEPS = np.arange(10, 1010, 10)


def settling(level=0.98, at=200):
  """Returns a curve that is 0.3 before step `at` and `level` from it on."""
  return np.where(STEPS < at, 0.3, level)


def swing(leave, arrive):
  return Swing(leave, arrive, 0., 1., leave, arrive)


def test_calm_controls_settle_once():
  state = control_state(STEPS, settling(), 1000)
  assert (state.level, state.settled_step, state.calm) == (0.98, 200, True)
  assert state.tolerance == 0.03  # 4 * sqrt(.98 * .02 / 1000) = 0.0177 is less
  assert state.largest_deviation == 0 and state.outside_steps == []


def test_tolerance_is_four_standard_errors_where_that_is_more():
  state = control_state(STEPS, settling(level=0.5), 400)
  assert state.tolerance == pytest.approx(4 * 0.5 / 20)


@pytest.mark.parametrize('depth, calm', [(0.03, True), (0.031, False)])
def test_one_snapshot_beyond_three_points_is_restless(depth, calm):
  accuracy = settling()
  accuracy[STEPS == 700] -= depth
  state = control_state(STEPS, accuracy, 1000)
  assert state.calm is calm
  assert state.outside_steps == ([] if calm else [700])
  assert state.largest_deviation == pytest.approx(depth)


def test_level_is_the_median_of_the_last_half_of_the_steps():
  accuracy = np.where(STEPS < 500, 0.6, 0.9)
  assert control_state(STEPS, accuracy, 1000).level == 0.9
  dense_start = np.concatenate([np.arange(1, 101), np.arange(200, 1100, 100)])
  accuracy = np.where(dense_start < 500, 0.6, 0.9)
  assert control_state(dense_start, accuracy, 1000).level == 0.9


def test_a_swing_is_claimed_only_while_controls_are_calm():
  accuracy = settling()
  accuracy[STEPS == 700] = 0.5
  state = control_state(STEPS, accuracy, 1000)
  assert is_claimed(swing(400, 500), state) is True
  assert is_claimed(swing(650, 750), state) is False
  assert is_claimed(swing(710, 750), state) is False  # the snapshot before belongs to it
  assert is_claimed(swing(720, 750), state) is True
  assert is_claimed(swing(650, 690), state) is False  # and the snapshot after
  assert is_claimed(swing(650, 680), state) is True
  assert is_claimed(swing(10, 100), state) is False  # not settled yet
  assert is_claimed(swing(400, 500), None) is None
