"""Intervals over contexts against scipy's t test, and against the stratified formula in pandas."""

import numpy as np
import pandas as pd
from scipy import stats

from research.dynamics.intervals import over_contexts

RNG = np.random.default_rng(0)


def test_one_dataset_of_equal_contexts_is_the_ordinary_t_interval():
  values_TC = RNG.random((5, 6)) * 0.2 + 0.4
  band = over_contexts(values_TC, [10] * 6, ['a'] * 6, bounds=(0, 1))
  for t in range(5):
    wanted = stats.ttest_1samp(values_TC[t], 0.).confidence_interval(0.95)
    np.testing.assert_allclose([band.low[t], band.high[t]], [wanted.low, wanted.high], rtol=1e-12)
    np.testing.assert_allclose(band.mean[t], values_TC[t].mean(), rtol=1e-12)


def test_datasets_are_strata():
  datasets = ['a', 'a', 'a', 'b', 'b', 'b', 'b']
  values = np.array([.1, .12, .14, .8, .82, .84, .9])
  band = over_contexts(values[None], [50] * 7, datasets, bounds=(0, 1))
  grouped = pd.DataFrame({'dataset': datasets, 'value': values}).groupby('dataset')['value']
  share = grouped.size() / 7
  error = np.sqrt((share**2 * grouped.var(ddof=1) / grouped.size()).sum())
  half = stats.t.ppf(0.975, 7 - 2) * error
  np.testing.assert_allclose(band.mean[0], values.mean(), rtol=1e-12)
  wanted = [values.mean() - half, values.mean() + half]
  np.testing.assert_allclose([band.low[0], band.high[0]], wanted, rtol=1e-9)
  as_one = over_contexts(values[None], [50] * 7, ['a'] * 7, bounds=(0, 1))
  assert as_one.high[0] - as_one.low[0] > 4 * (band.high[0] - band.low[0])


def test_a_dataset_with_one_context_makes_all_contexts_one_stratum():
  values_TC = np.array([[.1, .2, .7]])
  mixed = over_contexts(values_TC, [5] * 3, ['a', 'a', 'b'], bounds=(0, 1))
  plain = over_contexts(values_TC, [5] * 3, ['a'] * 3, bounds=(0, 1))
  np.testing.assert_array_equal([mixed.low, mixed.high], [plain.low, plain.high])


def test_contexts_weigh_by_their_items():
  band = over_contexts(np.array([[0., 1.]]), [30, 10], ['a', 'a'], bounds=(0, 1))
  assert band.mean[0] == 0.25
  assert (band.low[0], band.high[0]) == (0, 1)  # clipped


def test_one_context_has_no_interval():
  band = over_contexts(np.array([[.3], [.4]]), [10], ['a'], bounds=(0, 1))
  np.testing.assert_array_equal(band.mean, [.3, .4])
  assert np.isnan(band.low).all() and np.isnan(band.high).all()


def test_covers_the_truth_as_often_as_it_says():
  # 4,000 draws of 4 contexts of normal noise: 95% coverage has a standard error of 0.35 points.
  values_TC = 0.5 + 0.05 * RNG.normal(size=(4000, 4))
  band = over_contexts(values_TC, [100] * 4, ['a'] * 4, bounds=(0, 1))
  coverage = np.mean((band.low <= 0.5) & (band.high >= 0.5))
  assert abs(coverage - 0.95) < 0.015
