"""Mixtures: quotas, purity, no repetition before an epoch ends, schedules of weights."""

import numpy as np
import pytest

from research.data.errors import DataError
from research.data.mixture import Mixture, WeightSchedule, largest_remainder


def test_hamilton_example():
  # Worked example of the largest-remainder method with the Hare quota, 100,000 votes, 10 seats.
  votes = np.array([47_000, 16_000, 15_900, 12_000, 6_000, 3_100])
  assert largest_remainder(votes, 10).tolist() == [5, 2, 1, 1, 1, 0]
  assert largest_remainder(np.ones(3), 4).tolist() == [2, 1, 1]
  assert largest_remainder(np.array([0.1, 0.2, 0.7]), 10).tolist() == [1, 2, 7]


def places(mixture, n):
  return np.array([mixture.place(j) for j in range(n)])


def test_each_source_counts_up_from_zero():
  schedule = WeightSchedule([(0, (1.0, 2.0)), (7, (1.0, 0.0)), (12, (0.3, 0.3))])
  mixture = Mixture(schedule, batch_size=5, seed=3, window=16)
  order = places(mixture, 300)
  for source in (0, 1):
    mine = order[order[:, 0] == source, 1]
    assert mine.tolist() == list(range(len(mine)))
  for j in (0, 1, 15, 16, 34, 35, 36, 60, 61, 299):  # witness: counted by hand
    assert mixture.counts(j).tolist() == np.bincount(order[:j, 0], minlength=2).tolist()


def test_quotas_hold_in_every_window():
  schedule = WeightSchedule([(0, (0.7, 0.2, 0.1)), (10, (0.0, 0.5, 0.5))])
  order = places(Mixture(schedule, batch_size=4, seed=0, window=10), 120)[:, 0]
  for start in range(0, 40, 10):
    assert np.bincount(order[start:start + 10], minlength=3).tolist() == [7, 2, 1]
  for start in range(40, 120, 10):
    assert np.bincount(order[start:start + 10], minlength=3).tolist() == [0, 5, 5]
  assert order[:10].tolist() != order[10:20].tolist()  # each window has an order of its own


def test_order_depends_on_index_and_seed_alone():
  schedule = WeightSchedule([(0, (0.5, 0.5)), (40, (0.9, 0.1))])
  forward = places(Mixture(schedule, 8, seed=1, window=64), 500)
  fresh = Mixture(schedule, 8, seed=1, window=64)
  backward = np.array([fresh.place(j) for j in reversed(range(500))])[::-1]
  assert (forward == backward).all()
  assert (forward != places(Mixture(schedule, 8, seed=2, window=64), 500)).any()


def test_far_rows_cost_nothing():
  mixture = Mixture(WeightSchedule([(0, (0.25, 0.75))]), batch_size=8, seed=0)
  j = 4096 * 10**9 + 17
  counts = mixture.counts(j)
  assert counts.sum() == j and abs(counts[0] / j - 0.25) < 1e-9
  source, index = mixture.place(j)
  assert index == counts[source]


def test_schedule_in_steps():
  schedule = WeightSchedule([(0, (1.0, 3.0)), (60, (1.0, 0.0))])
  assert schedule.at(59).tolist() == [0.25, 0.75] and schedule.at(60).tolist() == [1, 0]
  for windows in ([], [(1, (1.0,))], [(0, (1.0,)), (0, (1.0,))]):
    with pytest.raises(DataError, match='starts at step 0'):
      WeightSchedule(windows)


def test_a_source_that_never_comes_is_refused():
  with pytest.raises(DataError, match='source 1 .* gets no row'):
    Mixture(WeightSchedule([(0, (1.0, 1e-6))]), batch_size=8, seed=0)
