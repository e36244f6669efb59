"""Curves and their analysis against a pandas aggregation and runs with known swings."""

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from research.dynamics.analysis import analyze
from research.dynamics.curves import ScoresError, read_curves
from research.monitors import table as monitor_table
from research.run_dir import RunDir
from tests.research import synthetic_runs


@pytest.fixture(name='run_dir')
def _run_dir(tmp_path):
  return synthetic_runs.hopping_run(tmp_path / 'run', every=100)


def curves_of(run_dir):
  return read_curves(run_dir.monitor_items, run_dir.monitor_scores)


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
  assert analyze(curves).families == ()


def test_analysis_finds_the_swings_that_were_written(tmp_path):
  analysis = analyze(curves_of(synthetic_runs.hopping_run(tmp_path / 'run')))
  successive, flipped, truthy = analysis.families
  assert [f.name for f in analysis.families] == ['successive', 'flipped', 'truthy']
  assert [j.swing.direction for j in successive.swings] == ['up', 'down', 'up', 'down']
  assert [j.is_first_rise for j in successive.swings] == [True, False, False, False]
  assert len(successive.hops) == 3 and all(j.claimed for j in successive.hops)
  # The ramps run from 200 to 300, 600 to 700, 900 to 1,000 and 1,300 to 1,400.
  for judged, (start, end) in zip(successive.swings, [(200, 300), (600, 700), (900, 1000),
                                                      (1300, 1400)]):
    assert start <= judged.swing.leave_step < judged.swing.arrive_step <= end
    assert judged.n_contexts_moved == 4
  assert len(flipped.swings) == 1 and flipped.first_rise.swing.from_level < 0.05
  assert truthy.swings == ()
  assert analysis.controls.calm and analysis.controls.n_items == 1200
  assert set(analysis.control_states) == {'sums_words', 'sentiment_words', 'opposites_words'}
  assert all(family.is_large_enough for family in analysis.families)


def test_one_context_that_swings_alone_is_counted_as_one(tmp_path):
  run_dir = RunDir(tmp_path / 'run')
  steps = np.arange(10, 210, 10)
  alone_TC = np.full((20, 2), 0.2)
  alone_TC[5:12, 0] = 1.  # the mean moves by 0.4, and so do all items of one context
  synthetic_runs.write_items(run_dir, {'pairs': False}, 50, n_seeds=2)
  synthetic_runs.write_scores(run_dir, steps, {'pairs': alone_TC}, 50, n_seeds=2)
  (family,) = analyze(curves_of(run_dir)).families
  assert [j.n_contexts_moved for j in family.swings] == [1, 1]
  assert [j.claimed for j in family.swings] == [None, None]
  assert not family.is_large_enough


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
