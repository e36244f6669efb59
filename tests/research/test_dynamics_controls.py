"""The control gate on curves whose level, tolerance and outliers are known in closed form."""

import numpy as np
import pytest

from research.dynamics.controls import control_state, controls_of
from research.dynamics.curves import Context, Curves

STEPS = np.arange(10, 1010, 10)


def settling(level=0.98, at=200):
  """Returns a curve that is 0.3 before step `at` and `level` from it on."""
  return np.where(STEPS < at, 0.3, level)


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


def test_controls_are_pooled_by_their_items():
  accuracy_TC = np.stack([settling(1.0), settling(0.9), settling(0.1)], -1)
  contexts = (Context('a', True, 'a', 0, 300), Context('b', True, 'b', 0, 100),
              Context('c', False, 'c', 0, 500))
  curves = Curves(STEPS, contexts, accuracy_TC, accuracy_TC)
  whole = controls_of(curves)
  assert whole.n_items == 400 and whole.level == pytest.approx((300 * 1.0 + 100 * 0.9) / 400)
  assert controls_of(curves, 'b').level == 0.9 and controls_of(curves, 'b').n_items == 100
  assert controls_of(curves.at([2])) is None
