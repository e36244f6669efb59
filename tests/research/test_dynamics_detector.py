"""The hop detector against least squares, SciPy's tests, known noise and planted truth."""

import dataclasses

import numpy as np
import pytest
from scipy import stats

from experiments.benchmarks import simulated_scores as simulated
from research.dynamics import change_points, contrasts, detector, hops
from research.dynamics.controls import control_state
from research.dynamics.curves import Context, Curves, pooled
from research.dynamics.states import (
    Levels, State, coherence, dwell_times, occupancy, over_contexts, states)
from research.errors import UserError

DWELL = detector.DWELL
RNG = np.random.default_rng(0)
QUIET = simulated.Noise(1.7, 0.35, 0.05, 0.12, 1.6, 0.3, 0.3)
SIZE = simulated.Size(n_checkpoints=60, n_datasets=2, n_contexts=16, n_items=50)
WEIGHTS = np.full(16, 1 / 16)


@pytest.mark.parametrize('dwell', [3, 4, 6])
def test_the_contrast_is_the_step_of_a_least_squares_fit(dwell):
  values = RNG.standard_normal(2 * dwell + 4)
  contrast = contrasts.step_contrasts(values, dwell)
  time = np.arange(-dwell, dwell + 1)
  design = np.stack([np.ones_like(time), time, np.sign(time) / 2], -1).astype(float)
  used = time != 0  # The middle has no step and is where the slope's line passes: no influence.
  for w, got in enumerate(contrast):
    y = values[w:w + 2 * dwell + 1]
    wanted = np.linalg.lstsq(design[used], y[used], rcond=None)[0][2]
    np.testing.assert_allclose(got, wanted, atol=1e-12)


def test_a_line_has_no_contrast_and_a_step_has_its_height():
  time = np.arange(40.)
  assert np.abs(contrasts.step_contrasts(0.02 * time - 0.3, DWELL)).max() < 1e-12
  assert np.abs(contrasts.second_differences(0.02 * time - 0.3, 3)).max() < 1e-12
  stepped = contrasts.step_contrasts(0.3 * (time >= 20) + 0.01 * time, DWELL)
  np.testing.assert_allclose(stepped[[19 - DWELL, 20 - DWELL]], 0.3, atol=1e-12)


@pytest.mark.parametrize('correlation', [0.0, 0.5, 0.9])
def test_noise_is_not_understated_whatever_the_autocorrelation(correlation):
  """The estimate is compared with the spread of contrasts over many simulated series."""
  values = 0.05 * simulated._autocorrelated((400, 120), correlation, np.random.default_rng(1))
  truth = contrasts.step_contrasts(values, DWELL).std()
  estimate = np.median(contrasts.common_noise(values, DWELL, (-1, 1)))
  assert 0.98 < estimate / truth < 1.2


def test_noise_of_contexts_is_that_of_their_mean():
  values = 0.1 * np.random.default_rng(2).standard_normal((50, 80, 8))
  truth = contrasts.step_contrasts(values.mean(-1), DWELL).std()
  estimate = contrasts.context_noise(values, np.full(8, 1 / 8), DWELL)
  assert estimate.shape == (50, 80 - 2 * DWELL)
  assert 0.98 < np.sqrt(np.mean(estimate**2)) / truth < 1.2


def test_flanks_are_those_beside_the_middle():
  values = RNG.random(20)
  before, after = contrasts.flank_means(values, 4)
  np.testing.assert_allclose(before[3], values[3:7].mean())
  np.testing.assert_allclose(after[3], values[8:12].mean())


def test_levels_are_the_t_test_over_contexts():
  values = RNG.normal(0.2, 0.2, (7, 4))
  levels = over_contexts(values, np.full(4, 0.25))
  low, high = levels.interval()
  for t in range(7):
    wanted = stats.ttest_1samp(values[t], 0.)
    np.testing.assert_allclose(levels.p_values(0.)[t], wanted.pvalue, rtol=1e-10)
    interval = wanted.confidence_interval(0.95)
    np.testing.assert_allclose([low[t], high[t]], [interval.low, interval.high], rtol=1e-10)


def test_states_control_false_discoveries_over_everything():
  levels = Levels(np.array([[0.1, -0.1, 0.0, 0.03]]), np.full((1, 4), 0.0125), np.inf)
  assert states(levels, 0.).tolist() == [[1, -1, 0, 1]]
  alone = Levels(np.array([0.03] + [0.] * 19), np.full(20, 0.0125), np.inf)  # p = 0.016
  assert not states(alone, 0.).any()
  assert states(levels, 0., tolerance=0.09).tolist() == [[0, 0, 0, 0]]


def test_occupancy_and_dwell_times_by_hand():
  series = np.array([0, 1, 1, 0, 1, -1, -1, 0])
  assert occupancy(series) == {State.PATTERN: 0.25, State.UNCERTAIN: 0.375,
                               State.GENERALIZING: 0.375}
  visits = dwell_times(series, [0, 10, 20, 30, 40, 50, 60, 70])
  assert visits == {State.GENERALIZING: [30.], State.PATTERN: [10.]}
  assert dwell_times(np.zeros(3), [1, 2, 3]) == {State.GENERALIZING: [], State.PATTERN: []}


def test_coherence_is_pearsons():
  values_TK = RNG.random((12, 2))
  wanted = stats.pearsonr(values_TK[:, 0], values_TK[:, 1]).statistic
  np.testing.assert_allclose(coherence(values_TK)[0, 1], wanted, rtol=1e-10)


@pytest.mark.parametrize('sign', [1, -1])
def test_a_planted_hop_is_found_where_it_is(sign):
  levels = np.zeros((1, 2, 60))
  margin = sign * np.where(np.arange(60) < 25, -0.2, 0.2)
  levels[0, 0] = simulated.level_of_margin(margin, simulated.spread(QUIET))
  scores = simulated.draw(levels, QUIET, SIZE, np.random.default_rng(3))
  series = detector.series_of_contexts(scores.margin_BKTC[0], WEIGHTS)
  found = detector.find_hops(detector.windows(series), series.mean, np.arange(60) * 20)
  assert [(hop.dataset, hop.direction) for hop in found] == [(0, sign)]
  assert abs(found[0].after - 25) <= 1 and found[0].after == found[0].before + 1
  assert abs(found[0].change - 0.4 * sign) < 0.1
  assert found[0].is_calm is None and found[0].is_confirmed
  assert detector.find_hops(detector.windows(series, tolerance=0.2), series.mean,
                            np.arange(60)) == []


def test_a_hop_while_controls_leave_their_level_is_not_confirmed():
  steps = np.arange(60) * 20
  mean = np.where(np.arange(60) < 25, -0.2, 0.2) + 0.002 * RNG.standard_normal(60)
  series = detector.series_of_contexts(
      mean[None, :, None] + 0.01 * RNG.standard_normal((1, 60, 8)), np.full(8, 1 / 8))
  found = detector.windows(series)
  calm = control_state(steps, np.full(60, 0.9), 1000)
  dropped = control_state(steps, np.where(np.arange(60) == 27, 0.7, 0.9), 1000)
  assert [hop.is_confirmed for hop in detector.find_hops(found, series.mean, steps, calm)] == [True]
  hop, = detector.find_hops(found, series.mean, steps, dropped)
  assert hop.is_calm is False and not hop.is_confirmed


@pytest.mark.parametrize('kind', ['constant', 'smooth_rise', 'slow_drift', 'near_the_center'])
def test_nothing_is_called_where_nothing_hops(kind):
  """Under a true rate of 5%, 40 trajectories have 7 alarms or more once in 290 tries."""
  noise = dataclasses.replace(QUIET, common_step=0.45)
  random = np.random.default_rng(4)
  levels = getattr(simulated, kind)(SIZE, simulated.spread(noise), 40, random)
  scores = simulated.draw(levels, noise, SIZE, random)
  found = detector.windows(detector.series_of_contexts(scores.margin_BKTC, WEIGHTS))
  assert np.sum(np.any(found.is_hop, (1, 2))) < 7
  low, high = over_contexts(scores.margin_BKTC, WEIGHTS).interval()
  covered = np.mean((low <= scores.truth_BKT) & (scores.truth_BKT <= high))
  assert 0.92 < covered < 0.98


def test_the_simulated_truth_is_the_mean_of_many_items():
  noise = simulated.Noise(1.2, 0.0, 0.3, 0.0, 0.9, 0.5, 0.0)
  size = simulated.Size(3, 1, 2, 200_000)
  scores = simulated.draw(np.full((1, 1, 3), 0.4), noise, size, np.random.default_rng(5))
  np.testing.assert_allclose(scores.margin_BKTC.mean(-1), scores.truth_BKT, atol=0.004)
  np.testing.assert_allclose(scores.accuracy_BKTC.mean(-1), scores.accuracy_truth_BKT, atol=0.004)
  levels = simulated.level_of_margin(np.array([-0.3, 0.1]), 1.5)
  np.testing.assert_allclose(simulated.expected_margin(levels, 1.5), [-0.3, 0.1], atol=1e-5)


def test_the_least_detectable_hop_is_found_about_that_often():
  """Power by simulation at the change that is said to have 0.95; alone in its trajectory."""
  random = np.random.default_rng(6)
  noise = lambda n: 0.02 * random.standard_normal((n, 1, 60, 8))
  said = float(np.median([detector.least_detectable(
      detector.series_of_contexts(values, np.full(8, 1 / 8)))[0] for values in noise(20)]))
  values = noise(200) + np.where(np.arange(60) < 30, -said / 2, said / 2)[:, None]
  found = detector.windows(detector.series_of_contexts(values, np.full(8, 1 / 8))).is_hop
  assert np.mean(np.any(found[:, 0], -1)) > 0.9
  weaker = values * 1.0 - np.where(np.arange(60) < 30, -said / 4, said / 4)[:, None]
  found = detector.windows(detector.series_of_contexts(weaker, np.full(8, 1 / 8))).is_hop
  assert np.mean(np.any(found[:, 0], -1)) < 0.6


def test_the_rate_has_the_exact_interval_of_a_poisson_count():
  hop = detector.Hop(0, 1, 1, 2, 1, 0.4, 0.01, True)
  forbidden = dataclasses.replace(hop, is_calm=False)
  rate, low, high = detector.hop_rate([hop] * 4 + [forbidden], 2, 5 * 10**8)
  assert rate == 4
  np.testing.assert_allclose(stats.poisson.sf(3, low), 0.025)
  np.testing.assert_allclose(stats.poisson.cdf(4, high), 0.025)
  assert detector.hop_rate([], 1, 10**9)[:2] == (0, 0)


def test_parity_counts_changed_signs():
  assert detector.parity_share(np.array([1., -1, 0, 2]), np.array([1., 1, -1, -2])) == 0.5
  with pytest.raises(ValueError, match=r'shapes \(2,\) and \(3,\)'):
    detector.parity_share(np.zeros(2), np.zeros(3))


def test_too_few_contexts_or_checkpoints_are_said():
  with pytest.raises(ValueError, match='2 demonstration contexts are too few'):
    detector.series_of_contexts(np.zeros((1, 60, 2)), np.array([0.5, 0.5]))
  with pytest.raises(ValueError, match='12 checkpoints are too few.*at least 23'):
    detector.series_of_errors(np.zeros((1, 12)), np.zeros((1, 12)))


def test_a_run_is_told_by_dataset():
  steps = np.arange(60) * 20
  contexts = tuple(Context('f', name == 'plain', name, seed, 50)
                   for name in ('hopping', 'plain', 'alone')
                   for seed in range(1 if name == 'alone' else 6))
  margin_TC = np.full((60, 13), 0.5)
  margin_TC[:, :6] = np.where(np.arange(60) < 30, -0.3, 0.3)[:, None]
  margin_TC += 0.02 * np.random.default_rng(7).standard_normal(margin_TC.shape)
  found = hops.hops_of_run(Curves(steps, contexts, np.full((60, 13), 0.9), margin_TC))
  assert found.left_out == ('alone',)
  hopping, plain = found.datasets
  ((hop, interval, n_agreeing, n_variants),) = hopping.hops
  assert hop.is_confirmed and steps[hop.after] in (580, 600, 620) and not plain.hops
  assert (n_agreeing, n_variants) == (1, 1)
  # The first six columns, six checkpoints on either side of the middle one: SciPy's paired t.
  around = margin_TC[hop.center - 6:hop.center + 7, :6]
  paired = stats.ttest_rel(around[7:].mean(0), around[:6].mean(0)).confidence_interval()
  np.testing.assert_allclose(interval, (paired.low, paired.high), rtol=1e-12)
  assert interval[0] < hop.change < interval[1]
  assert plain.occupancy[State.GENERALIZING] == 1
  assert len(hopping.dwell_times[State.PATTERN]) == 1
  assert found.coherence_KK.shape == (2, 2)
  later = dataclasses.replace(hop, before=hop.before + 4)
  assert hops.agreement([[hop], [later], []], hop) == 1
  with pytest.raises(UserError, match='20 scored checkpoints are too few to tell a hop; 23'):
    hops.check_enough(Curves(steps[:20], contexts, np.zeros((20, 13)), np.zeros((20, 13))))


def test_a_hop_is_looked_for_in_every_variant_alone():
  """Six variants, planted: in four the level steps at 30, in one at 45, in one never."""
  steps, names = np.arange(60) * 20, 'abcdef'
  at = dict(zip(names, (30, 30, 30, 30, 45, 99)))
  contexts = [Context('f', False, 'f', seed, 10, name) for name in names for seed in range(6)]
  contexts += [Context('sums', True, 'sums', seed, 10, 'a') for seed in range(4)]
  margin_TC = np.stack([np.where(np.arange(60) < at[c.variant], -0.4, 0.4) if not c.is_control
                        else np.full(60, 0.5) for c in contexts], -1)
  margin_TC += 0.02 * np.random.default_rng(9).standard_normal(margin_TC.shape)
  curves = Curves(steps, tuple(contexts), np.full((60, 40), 0.9), margin_TC)
  (called,), = [row.hops for row in hops.hops_of_run(curves).datasets if row.name == 'f']
  assert called.hop.after in (29, 30, 31) and called.hop.is_calm
  assert (called.n_agreeing, called.n_variants) == (4, 6)
  whole = pooled(curves)
  assert [c.n_items for c in whole.contexts] == [60] * 6 + [10] * 4
  np.testing.assert_allclose(whole.margin_TC[:, 2], margin_TC[:, 2:36:6].mean(1), rtol=1e-12)
  restless = dataclasses.replace(curves, accuracy_TC=np.where(
      np.arange(60)[:, None] == 32, 0.5, curves.accuracy_TC))
  (called,), = [row.hops for row in hops.hops_of_run(restless).datasets if row.name == 'f']
  assert not called.hop.is_confirmed and called.n_agreeing == 0


def test_a_control_of_its_own_forbids_the_hops_of_its_dataset_alone():
  """Of many control items those of one dataset fall: too few to be seen among all."""
  steps = np.arange(60) * 20
  contexts = [Context(name, False, name, seed, 10) for name in 'ab' for seed in range(6)]
  contexts += [Context('a', True, 'a_control', seed, 10) for seed in range(6)]
  contexts += [Context('sums', True, 'sums', seed, 1000) for seed in range(4)]
  margin_TC = np.where(np.arange(60) < 30, -0.4, 0.4)[:, None] + 0.02 * np.random.default_rng(
      9).standard_normal((60, len(contexts)))
  accuracy_TC = np.full(margin_TC.shape, 0.9)
  accuracy_TC[:30, 12:18] = 0.1
  rows = {row.name: row for row in hops.hops_of_run(
      Curves(steps, tuple(contexts), accuracy_TC, margin_TC)).datasets}
  assert [hop.hop.is_confirmed for hop in rows['a'].hops] == [False]
  assert [hop.hop.is_confirmed for hop in rows['b'].hops] == [True]


def test_what_parity_leaves_open_is_no_hop():
  steps, low_high = np.arange(60) * 20, np.where(np.arange(60) < 30, -0.2, 0.2)
  contexts = tuple(Context(name, False, name, seed, 10) for name in 'ab' for seed in range(6))
  margin_TC = low_high[:, None] + 0.02 * np.random.default_rng(10).standard_normal((60, 12))
  curves = Curves(steps, contexts, margin_TC + 0.5, margin_TC)
  a, b = hops.hops_of_run(curves, parity={'b': 0.25}).datasets
  assert len(a.hops) == 1 and not b.hops and not b.states.any() and b.tolerance == 0.25
  assert not a.is_blind
  loud_TC = 0.8 * np.random.default_rng(11).choice([-1., 1.], (60, 12))
  assert all(row.is_blind and not row.hops for row in hops.hops_of_run(
      Curves(steps, contexts, loud_TC / 2 + 0.5, loud_TC)).datasets)


@pytest.mark.parametrize('metric, center', [('margin', 0.0), ('accuracy', 0.5)])
def test_a_hop_is_called_from_twice_the_tolerance_and_the_allowance_on(metric, center):
  """Without noise that sum is the least change by the definition of a hop; noise adds little."""
  contexts = tuple(Context('f', False, 'd', seed, 10) for seed in range(8))
  random, tolerance = np.random.default_rng(12), {'d': 0.1}

  def judged(change, parity=tolerance):
    level_T = center + np.where(np.arange(60) < 30, -change / 2, change / 2)
    values_TC = level_T[:, None] + 0.004 * random.standard_normal((60, 8))
    row, = hops.hops_of_run(
        Curves(np.arange(60) * 20, contexts, values_TC, values_TC), metric, parity).datasets
    return row

  below = detector.ALLOWANCE + 2 * 0.1
  said = float(np.median([judged(0.5).least_detectable for _ in range(20)]))
  assert below < said < below + 0.03
  assert np.mean([len(judged(said).hops) == 1 for _ in range(40)]) >= 0.9
  assert not any(judged(below).hops for _ in range(40))
  assert all(len(judged(below, None).hops) == 1 for _ in range(5))  # the tolerance alone forbids it


@pytest.mark.parametrize('metric', list(hops.METRICS))
def test_a_dataset_is_blind_where_the_greatest_change_cannot_be_called(metric):
  _, (low, high) = hops.METRICS[metric]
  contexts = tuple(Context('f', False, 'd', seed, 10) for seed in range(4))
  values_TC = np.where(np.arange(40) < 20, low, high)[:, None] * np.ones(4)
  edge = (high - low - detector.ALLOWANCE) / 2  # of the tolerance, of levels without noise
  for tolerance, is_blind in ((edge - 0.001, False), (edge + 0.001, True)):
    row, = hops.hops_of_run(Curves(np.arange(40), contexts, values_TC, values_TC), metric,
                            {'d': tolerance}).datasets
    assert row.is_blind == is_blind and len(row.hops) == 1 - is_blind
    np.testing.assert_allclose(row.least_detectable, detector.ALLOWANCE + 2 * tolerance)


def test_change_points_are_where_levels_move():
  pytest.importorskip('ruptures')
  random = np.random.default_rng(8)
  values = np.repeat([0.0, 0.5, -0.2], 20) + 0.05 * random.standard_normal(60)
  assert change_points.change_points(values) == [20, 40]
  assert change_points.change_points(0.05 * random.standard_normal(60)) == []


def test_change_points_say_what_they_take(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'ruptures', None)
  with pytest.raises(UserError, match=r"pip install -e '.\[changes\]'"):
    change_points.change_points(np.zeros(20))
