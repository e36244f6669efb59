"""Curves and their analysis against a pandas aggregation and runs with known hops."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from research.dynamics.analysis import analyze
from research.dynamics.curves import (
    ScoresError, of_variant, read_curves, read_variants, variants_of)
from research.monitors import table as monitor_table
from research.run_dir import RunDir
from tests.research import synthetic_runs


@pytest.fixture(name='run_dir')
def _run_dir(tmp_path):
  return synthetic_runs.hopping_run(tmp_path / 'run', every=100)


def curves_of(run_dir):
  return read_curves(run_dir.monitor_items, run_dir.monitor_scores)


def read_variants_of(run_dir):
  return read_variants(run_dir.monitor_items, run_dir.monitor_scores)


def rewrite(path, change):
  frame = pd.read_parquet(path)
  pq.write_table(pa.Table.from_pandas(change(frame), preserve_index=False), path)


def test_curves_equal_a_pandas_aggregation(run_dir):
  rng = np.random.default_rng(1)
  for path in run_dir.monitor_scores.iterdir():  # random scores in random order
    rewrite(path, lambda frame: frame.assign(
        logp_generalizing=-rng.exponential(size=len(frame)),
        logp_shortcut=-rng.exponential(size=len(frame))).sample(frac=1, random_state=2))
  curves = curves_of(run_dir)
  scores = pd.concat(pd.read_parquet(path) for path in run_dir.monitor_scores.iterdir())
  rows = scores.merge(pd.read_parquet(run_dir.monitor_items), on='item')
  rows['right'] = rows.logp_generalizing > rows.logp_shortcut
  rows['margin'] = np.exp(rows.logp_generalizing) - np.exp(rows.logp_shortcut)
  wanted = rows.groupby(['step', 'family', 'is_control', 'dataset', 'seed'])[
      ['right', 'margin']].mean()
  assert len(wanted) == curves.accuracy_TC.size
  for c, context in enumerate(curves.contexts):
    for t, step in enumerate(curves.steps):
      row = wanted.loc[(step, context.family, context.is_control, context.dataset, context.seed)]
      np.testing.assert_allclose(curves.accuracy_TC[t, c], row.right, rtol=1e-12)
      np.testing.assert_allclose(curves.margin_TC[t, c], row.margin, rtol=1e-6)


def test_curves_agree_with_what_training_prints(run_dir):
  # Training summarizes each snapshot on its own; both read the same files.
  items = monitor_table.read_item_table(run_dir.monitor_items)
  curves = curves_of(run_dir)
  for t, step in enumerate(curves.steps):
    _, scores = monitor_table.read_scores(run_dir.monitor_scores / monitor_table.scores_name(step))
    for row in monitor_table.summary(items, int(step), scores):
      c = [(x.dataset, x.seed) for x in curves.contexts].index((row.dataset, row.seed))
      np.testing.assert_allclose(curves.accuracy_TC[t, c], row.accuracy, rtol=1e-12)
      np.testing.assert_allclose(curves.margin_TC[t, c], row.margin, rtol=1e-12)
      assert curves.contexts[c].n_items == row.n_items


def test_a_tie_is_not_generalizing(run_dir):
  path = next(run_dir.monitor_scores.iterdir())
  rewrite(path, lambda frame: frame.assign(logp_generalizing=frame.logp_shortcut))
  curves = curves_of(run_dir)
  at = int(pd.read_parquet(path).step[0])
  assert np.all(curves.accuracy_TC[curves.steps == at] == 0)


def test_nothing_scored_is_no_curve(tmp_path):
  curves = curves_of(RunDir(tmp_path))
  assert len(curves.steps) == 0 and curves.contexts == ()
  assert analyze(curves).datasets == ()


def test_analysis_finds_the_hops_that_were_written(tmp_path):
  analysis = analyze(read_variants_of(synthetic_runs.hopping_run(tmp_path / 'run')))
  successive, flipped, truthy = analysis.datasets
  assert [d.name for d in analysis.datasets] == [
      'successive_words', 'flipped_words', 'truthy_words']
  # What is written steps at 700, 1,100 and 1,500, between two snapshots.
  hops = [called.hop for called in successive.judged.hops]
  assert [hop.direction for hop in hops] == [1, -1, 1]
  assert [int(analysis.steps[hop.after]) for hop in hops] == [700, 1100, 1500]
  assert all(hop.is_confirmed for hop in hops)
  assert not flipped.judged.hops and not truthy.judged.hops  # A slow rise, and a parrot.
  assert analysis.controls.calm and analysis.controls.n_items == 1200
  assert set(analysis.control_states) == {'sums_words', 'sentiment_words', 'opposites_words'}


def test_two_contexts_are_not_judged(tmp_path):
  run_dir = RunDir(tmp_path / 'run')
  steps = np.arange(10, 610, 10)
  curve_TC = np.where(steps < 300, 0., 1.)[:, None].repeat(2, 1)
  synthetic_runs.write_items(run_dir, {'pairs': False}, 50, n_seeds=2)
  synthetic_runs.write_scores(run_dir, steps, {'pairs': curve_TC}, 50, n_seeds=2)
  analysis = analyze(read_variants_of(run_dir))
  (dataset,) = analysis.datasets
  assert dataset.judged is None and analysis.hops is None and analysis.controls is None


def test_curves_of_a_variant_are_those_of_its_items(run_dir):
  """Every third item of a context is renamed to another variant; pandas says what each does."""
  rewrite(run_dir.monitor_items, lambda frame: frame.assign(
      variant=np.where(frame.item % 3 == 0, 'a', 'b'), item=frame.item.astype('int32'),
      seed=frame.seed.astype('int32')))
  rng = np.random.default_rng(3)
  for path in run_dir.monitor_scores.iterdir():
    rewrite(path, lambda frame: frame.assign(logp_shortcut=-rng.exponential(size=len(frame))))
  cells = read_variants_of(run_dir)
  names = variants_of(cells)
  assert names['sums_words'] == ['a', 'b']
  scores = pd.concat(pd.read_parquet(path) for path in run_dir.monitor_scores.iterdir())
  rows = scores.merge(pd.read_parquet(run_dir.monitor_items), on='item')
  rows['right'] = rows.logp_generalizing > rows.logp_shortcut
  wanted = rows.groupby(['step', 'dataset', 'seed', 'variant']).right.mean()
  for number, name in enumerate('ab'):
    own = of_variant(cells, number)
    assert {context.variant for context in own.contexts} == {name}
    for c, context in enumerate(own.contexts):
      got = dict(zip(own.steps, own.accuracy_TC[:, c]))
      for step, value in got.items():
        assert value == pytest.approx(wanted.loc[step, context.dataset, context.seed, name])
  whole = rows.groupby(['step', 'dataset', 'seed']).right.mean()
  both = curves_of(run_dir)
  for c, context in enumerate(both.contexts):
    for t, step in enumerate(both.steps):
      assert both.accuracy_TC[t, c] == pytest.approx(
          whole.loc[step, context.dataset, context.seed])


@pytest.mark.parametrize('change, words', [
    (lambda frame: frame.iloc[1:], 'must score each of the 2400 items exactly once'),
    (lambda frame: pd.concat([frame, frame.iloc[:1]]), 'exactly once'),
    (lambda frame: frame.assign(logp_shortcut=np.where(frame.item == 7, np.nan, -1.)),
     'item 7 has a NaN score'),
    (lambda frame: frame.drop(columns='logp_shortcut'), 'column logp_shortcut is missing'),
    (lambda frame: frame.assign(step=200), 'step 200 was already scored')])
def test_refuses_scores_that_would_mislead(run_dir, change, words):
  rewrite(run_dir.monitor_scores / 'step-00000300.parquet', change)
  with pytest.raises(ScoresError, match=words):
    curves_of(run_dir)


def test_refuses_scores_without_items_and_broken_files(run_dir):
  broken = run_dir.monitor_scores / 'step-00000300.parquet'
  broken.write_bytes(broken.read_bytes()[:100])
  with pytest.raises(ScoresError, match='step-00000300.parquet is not a whole Parquet file'):
    curves_of(run_dir)
  run_dir.monitor_items.unlink()
  with pytest.raises(ScoresError, match='items.parquet does not exist'):
    curves_of(run_dir)
