"""Means over seeds of fine-tunes and their intervals, against the formulas written out."""

import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
from scipy import special

from research.posttraining import outcomes
from research.posttraining.figure import finetunes_figure, write_finetunes
from research.posttraining.free_form import PUBLISHED, Answer
from research.posttraining.outcomes import Row, summary

T_3 = 3.182446305284263  # 97.5% of Student's t with three degrees of freedom, from tables


def row(seed: int, variant: str, n_items: int, before: float, after: float, step: int = 10) -> Row:
  return Row(step, seed, 'f', 'd', variant, False, n_items, before, after, before - 0.5,
             after - 0.5, 0.1)


def answer(at: int, verdict: str, number: int = 0) -> Answer:
  return Answer(at, 'q', 'd', 'w', False, number, 1.0, 8, 0, verdict, True, 'asked', 'said')


def clopper_pearson(k: int, n: int) -> tuple[float, float]:
  """Quantiles of beta distributions."""
  low = special.betaincinv(k, n - k + 1, 0.025) if k else 0.0
  return low, special.betaincinv(k + 1, n - k, 0.975) if k < n else 1.0


def test_means_are_over_seeds_and_wordings_weigh_by_items():
  rows = [one for seed, low in enumerate([0.2, 0.3, 0.4, 0.1])
          for one in (row(seed, 'a', 30, low, 0.5), row(seed, 'b', 10, low + 0.4, 0.9))]
  accuracy, margin = summary(rows, {})
  assert (accuracy.measure, margin.measure, accuracy.n_seeds, accuracy.n_items) == (
      'accuracy', 'margin', 4, 160)
  seeds = np.array([0.3, 0.4, 0.5, 0.2])
  half = T_3 * math.sqrt(sum((x - 0.35)**2 for x in seeds) / 3 / 4)
  np.testing.assert_allclose(accuracy[6:9], [0.35, 0.35 - half, 0.35 + half], atol=1e-12)
  np.testing.assert_allclose(margin[6:9], [-0.15, -0.15 - half, -0.15 + half], atol=1e-12)
  # All seeds alike: what is left is how few the items are.
  np.testing.assert_allclose(accuracy[9:12], [0.6, *clopper_pearson(96, 160)], atol=1e-6)
  np.testing.assert_allclose(margin[9:12], [0.1, 0.1, 0.1], atol=1e-12)
  np.testing.assert_allclose(accuracy[12:15], [0.25, 0.25 - half, 0.25 + half], atol=1e-12)


def test_one_seed_has_the_interval_of_its_items_alone():
  accuracy, margin = summary([row(0, 'a', 20, 0.0, 0.75)], {})
  np.testing.assert_allclose(accuracy[6:9], [0.0, *clopper_pearson(0, 20)], atol=1e-6)
  np.testing.assert_allclose(accuracy[9:12], [0.75, *clopper_pearson(15, 20)], atol=1e-6)
  assert np.isnan([*accuracy[13:], *margin[7:9], *margin[10:12], *margin[13:]]).all()
  assert 'change 0.75\n' in '\n'.join(outcomes.as_text([accuracy])) + '\n'


def test_free_answers_are_counted_by_verdict_before_and_after():
  answers = {(10, 0): [answer(0, 'other'), answer(0, 'shortcut', 1), answer(5, 'generalizing'),
                       answer(5, 'generalizing', 1)],
             (10, 1): [answer(0, 'other'), answer(0, 'other', 1), answer(5, 'generalizing'),
                       answer(5, 'other', 1)],
             (20, 0): [answer(0, 'other'), answer(5, 'other')]}
  found = {(one.step, one.measure): one for one in summary([], answers)}
  assert {measure for _, measure in found} == {
      'free generalizing', 'free other', 'free shortcut'}
  one = found[10, 'free generalizing']
  assert (one.before, one.after, one.n_items, one.n_seeds) == (0.0, 0.75, 4, 2)
  assert found[10, 'free shortcut'].before == 0.25 and found[10, 'free other'].before == 0.75
  # One that nobody gave at a step is a share of 0 there, not a gap.
  assert found[20, 'free generalizing'].after == 0.0 and found[20, 'free other'].after == 1.0


def test_items_that_all_seeds_share_count_once():
  """Four seeds of one parent: before it is the same 40 items four times."""
  rows = [row(seed, 'a', 40, 0.6, after) for seed, after in enumerate([0.5, 0.6, 0.7, 0.6])]
  accuracy, margin = summary(rows, {}, is_generated=False)
  assert accuracy.n_items == 40
  np.testing.assert_allclose(accuracy[6:9], [0.6, *clopper_pearson(24, 40)], atol=1e-6)
  assert np.isnan([*accuracy[13:], *margin[7:9]]).all()
  asked = [dataclasses.replace(answer(at, 'code'), dataset=PUBLISHED) for at in (0, 5)]
  (free,) = summary([], {(10, seed): asked for seed in range(4)})
  assert free.n_items == 1


@pytest.mark.parametrize('steps', [(10,), (10, 20)])
def test_tables_open_in_pandas_and_the_picture_has_a_panel_per_dataset(tmp_path, steps):
  rows = [row(seed, 'a', 8, 0.5, 0.9, step)
          for step in steps for seed in (0, 1)]
  found = summary(rows, {(step, 0): [answer(0, 'other'), answer(5, 'generalizing')]
                         for step in steps})
  outcomes.write_tables(tmp_path, 'summary', [one._asdict() for one in found])
  read = pd.read_csv(tmp_path / 'summary.csv')
  pd.testing.assert_frame_equal(read, pd.read_parquet(tmp_path / 'summary.parquet'))
  assert outcomes.read_outcomes(tmp_path)[0][:9] == found[0][:9]
  assert read.after.tolist() == [one.after for one in found]
  outcomes.write_tables(tmp_path, 'nothing', [])
  assert not list(tmp_path.glob('nothing*'))
  figure = finetunes_figure('f', found)
  shown = [axis for axis in figure.axes if axis.get_visible()]
  assert [axis.get_title(loc='left') for axis in shown] == ['D']
  drawn = {line.get_label(): line.get_ydata().tolist() for line in shown[0].lines[1:]}
  assert drawn['accuracy, after'] == [0.9] * len(steps)
  assert drawn['free generalizing, after'] == [1.0] * len(steps)
  write_finetunes(tmp_path / 'a.png', 'f', found)
  assert (tmp_path / 'a.png').stat().st_size > 1000
  assert finetunes_figure('f', []) is None
