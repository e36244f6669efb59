"""Item statistics. Witnesses: closed forms, simulated responses of known parameters, scipy."""

import collections

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

from research.errors import UserError
from research.monitors import chance, item_statistics
from research.monitors.items import MonitorItem

NO_PRIOR = ((0.0, np.inf), (0.0, np.inf))


def test_two_abilities_have_a_closed_form():
  """With two nodes the line goes through both logits."""
  shares_IQ = np.array([[0.2, 0.7], [0.5, 0.5], [0.9, 0.4]])
  counts = np.array([30.0, 50.0])
  lines_IP = item_statistics.logistic_lines(
      np.array([-1.0, 2.0]), counts, shares_IQ * counts, NO_PRIOR, np.tile([1.0, 0.0], (3, 1)))
  slope = (logit(shares_IQ[:, 1]) - logit(shares_IQ[:, 0])) / 3
  np.testing.assert_allclose(lines_IP[:, 0], slope, rtol=0, atol=1e-6)
  np.testing.assert_allclose(lines_IP[:, 1], logit(shares_IQ[:, 0]) + slope, rtol=0, atol=1e-6)


def simulated(n_checkpoints: int, n_items: int):
  """Returns (abilities, slopes, intercepts, responses) of the model."""
  rng = np.random.default_rng(0)
  ability = stats.zscore(rng.normal(size=n_checkpoints))
  slope, difficulty = rng.uniform(0.6, 2.0, n_items), rng.normal(size=n_items)
  p_TI = expit(slope * (ability[:, None] - difficulty))
  return ability, slope, -slope * difficulty, rng.random(p_TI.shape) < p_TI


def test_known_parameters_are_found_within_their_standard_errors():
  ability, slope, intercept, right_TI = simulated(800, 40)
  found = item_statistics.fit(right_TI, NO_PRIOR)
  assert np.corrcoef(found.ability, ability)[0, 1] > 0.9
  design_TP = np.stack([ability, np.ones_like(ability)], 1)
  p_TI = expit(design_TP @ np.stack([slope, intercept]))
  errors_IP = np.stack([
      np.sqrt(np.diag(np.linalg.inv(design_TP.T @ (design_TP * (p * (1 - p))[:, None]))))
      for p in p_TI.T])
  found_IP = np.stack([found.discrimination, -found.discrimination * found.difficulty], 1)
  z_IP = (found_IP - np.stack([slope, intercept], 1)) / errors_IP
  # Abilities that must be found too add to the errors of abilities known, by less than half.
  assert np.all(np.sqrt((z_IP**2).mean(0)) < 1.5), z_IP
  assert np.corrcoef(found.difficulty, -intercept / slope)[0, 1] > 0.97


def test_the_prior_keeps_few_responses_finite():
  found = item_statistics.fit(np.array([[0, 1, 0], [0, 1, 1], [0, 1, 0], [0, 1, 1]], bool))
  assert np.all(np.isfinite(np.concatenate(found)))
  assert found.difficulty[0] > 0 > found.difficulty[1]


def test_correlation_is_point_biserial_with_the_rest():
  _, _, _, right_TI = simulated(50, 6)
  expected = [stats.pointbiserialr(right_TI[:, i], np.delete(right_TI, i, 1).sum(1)).statistic
              for i in range(6)]
  np.testing.assert_allclose(item_statistics.rest_correlation(right_TI), expected, atol=1e-12)


def suite(n_each: int = 12) -> list[MonitorItem]:
  """Returns three kinds of items: two families and the controls of one."""
  return [MonitorItem(f'{dataset}/{i}', dataset[0], dataset, i % 4, f'wording {i % 3}', 'p',
                      f' {"yes" if i % 2 else "no"}', f' {"no" if i % 2 else "yes"}',
                      dataset.endswith('control'))
          for dataset in ('a', 'a_control', 'b') for i in range(n_each)]


def statistics_of(items, probability, discrimination=1.5) -> item_statistics.Statistics:
  n = len(items)
  return item_statistics.Statistics(
      np.full(n, 0.5), np.zeros(n), np.broadcast_to(discrimination, n).astype(float),
      np.full(n, 0.5), np.broadcast_to(probability, n).astype(float), np.zeros(n))


def test_what_says_nothing_is_not_eligible():
  items = suite(3)
  found = statistics_of(items, [0.5, 0.01, 0.99] * 3, [1.0, 1.0, 1.0, -1.0, 1, 1, 0.5, 2, 2])
  assert item_statistics.eligible(items, found).tolist() == [
      True, False, False,  # in the middle, at the floor, at the ceiling
      True, False, True,  # a control may be at the ceiling
      True, False, False]
  backwards = statistics_of(items, 0.5, -1.0)
  assert item_statistics.eligible(items, backwards).sum() == 3  # controls
  # What never changed is known by the prior alone.
  right_TI = np.random.default_rng(0).random((30, 9)) < np.linspace(0.1, 0.9, 30)[:, None]
  right_TI[:, [0, 3]], right_TI[:, [1, 4]] = False, True
  found = item_statistics.item_statistics(items, right_TI)._replace(chance=np.zeros(9))
  assert item_statistics.eligible(items, found)[:6].tolist() == [
      False, False, False, False, True, True]


def test_tasks_at_chance_are_not_eligible():
  """All yes: half right, whoever asks. Of a task its control may be what is off chance."""
  items = suite()
  yes_TI = np.tile([item.generalizing == ' yes' for item in items], (6, 1))
  right_TI = yes_TI.copy()
  right_TI[:, 12:24] = np.arange(12) != 5  # a_control
  for answers, expected in ((yes_TI, []), (right_TI, ['a', 'a_control'])):
    found = item_statistics.item_statistics(items, answers)
    assert {item.dataset for item, rate in zip(items, found.chance)
            if rate <= chance.FALSE_DISCOVERIES} == set(expected)
    everything = statistics_of(items, 0.5)._replace(chance=found.chance)
    assert {item.dataset for item, good in zip(items, item_statistics.eligible(items, everything))
            if good} == set(expected)
  with pytest.raises(UserError, match='which does 3 of 3 datasets by chance; take easier'):
    item_statistics.choose(items, item_statistics.item_statistics(items, yes_TI), 4)


def test_levels_are_t_intervals_over_contexts():
  rng = np.random.default_rng(1)
  right_TI, seeds = rng.random((3, 20)) < 0.8, np.arange(20) % 5
  means = [np.mean([right_TI[t, i] for t in range(3) for i in range(20) if seeds[i] == seed])
           for seed in range(5)]
  expected = stats.ttest_1samp(means, 0.5)
  interval = expected.confidence_interval(0.95)
  found = chance.level(right_TI, seeds)
  np.testing.assert_allclose(found, [np.mean(means), *interval, expected.pvalue], rtol=1e-9)
  # Four items in two contexts that agree, as one guess in eight: t = 0.5 / 0.125 of one degree.
  agreed = chance.level(np.ones((2, 4), bool), [0, 0, 1, 1])
  assert agreed[:3] == (1, 1, 1) and agreed.p == pytest.approx(2 * stats.t.sf(4, 1)) and agreed.p > 1 / 8
  assert chance.level(np.ones((2, 4), bool), [0, 0, 0, 0]).p == 1  # One context tells nothing.


def test_chosen_items_are_balanced_and_tell_most():
  items = suite()
  near = statistics_of(items, np.linspace(0.5, 0.85, len(items)))
  chosen = item_statistics.choose(items, near, 16)
  assert collections.Counter(item.dataset for item in chosen) == {'a': 4, 'b': 4, 'a_control': 8}
  for name, n in (('a', 4), ('b', 4), ('a_control', 8)):
    mine = [item for item in chosen if item.dataset == name]
    assert collections.Counter(item.generalizing for item in mine) == {' yes': n / 2, ' no': n / 2}
    assert max(collections.Counter(item.variant for item in mine).values()) <= -(-n // 3) + 1
  assert chosen == [item for item in items if item in chosen]
  # Of equals the most informative: all of one dataset, answer, wording and context.
  alike = [MonitorItem(f'x/{i}', 'x', 'x', 0, 'plain', 'p', ' a', ' b') for i in range(5)]
  found = statistics_of(alike, [0.85, 0.6, 0.2, 0.45, 0.8])
  assert [item.item_id for item in item_statistics.choose(alike, found, 2)] == ['x/1', 'x/3']


def test_too_many_cannot_be_chosen():
  items = suite(4)
  with pytest.raises(UserError, match='12 of 12 are off .* choose 1 to 12'):
    item_statistics.choose(items, statistics_of(items, 0.5), 13)
  with pytest.raises(UserError, match='0 of 12 are off .* take easier or harder ones'):
    item_statistics.choose(items, statistics_of(items, 0.01), 1)


def test_an_item_that_goes_the_other_way_discriminates_negatively():
  _, _, _, right_TI = simulated(200, 12)
  right_TI[:, 0] = ~right_TI[:, 0]
  items = suite(4)
  same_group = [MonitorItem(f'{i}', 'a', 'a', 0, 'plain', 'p', ' a', ' b') for i in range(12)]
  found = item_statistics.item_statistics(same_group, right_TI)
  assert found.discrimination[0] < 0 < found.discrimination[1:].min()
  np.testing.assert_array_equal(found.share, right_TI.mean(0))
  last = item_statistics.item_statistics(items, right_TI)
  first = item_statistics.item_statistics(items, right_TI, model=0)
  np.testing.assert_array_equal(last.difficulty, first.difficulty)
  assert not np.array_equal(last.probability, first.probability)
  with pytest.raises(UserError, match='3 scored checkpoints are too few'):
    item_statistics.item_statistics(items, right_TI[:3])
