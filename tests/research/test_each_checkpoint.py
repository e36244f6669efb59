"""Fine-tunes of several checkpoints of a run: where they start, their table, and repeating them."""

import json

import numpy as np
import pandas as pd
import pytest

from experiments import sft
from research.errors import UserError
from research.monitors.items import sound_items, write_items
from research.posttraining.each_checkpoint import chosen_steps, finetune_each
from research.run_dir import RunDir
from research.training.snapshots import SnapshotReader

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('quick_compilation')]
OVERRIDES = [('n_steps', '3'), ('mesh.data', '1'), ('data.batch_size', '4'), ('evals.every', '0'),
             ('logging.tensorboard', 'false')]


def run(run_dir: RunDir, steps: list[int], seeds: list[int], *more: tuple[str, str]):
  return finetune_each(sft.get_config(), [*OVERRIDES, *more], run_dir, 'functions_microworld', steps,
                       seeds)


def test_a_checkpoint_and_a_snapshot_are_fine_tuned_scored_and_tabled(short_run, capsys):
  path = run(short_run, [10], [0])
  first = RunDir(path.parent / 'step-00000010-seed0')
  written = first.done.stat().st_mtime_ns
  run(short_run, [15], [0])
  assert '[1/1] step 15, seed 0: functions_microworld ' in capsys.readouterr().out
  run(short_run, [10], [0])  # it is there already
  assert first.done.stat().st_mtime_ns == written
  found = pd.read_csv(path)
  # What was made in another way, or asked other things, is not compared with these.
  with pytest.raises(UserError, match='step-00000010-seed0 was made with n_steps=3'):
    run(short_run, [20], [0], ('n_steps', '4'))
  fewer = path.parent / 'fewer.jsonl'
  items, _ = sound_items(path.parent / 'items-seed0.jsonl')
  write_items(items[1:], fewer)
  with pytest.raises(UserError, match='was scored on other items than .*fewer.jsonl'):
    run(short_run, [10], [0], ('monitors.suite', str(fewer)))
  pd.testing.assert_frame_equal(found, pd.read_csv(path))
  pd.testing.assert_frame_equal(found, pd.read_parquet(path.with_suffix('.parquet')))
  assert found[['step', 'dataset', 'n_items']].values.tolist() == [
      [step, dataset, n] for step in (10, 15)
      for dataset, n in (('functions_microworld', 40), ('values_microworld', 120))]
  for step in (10, 15):
    child = RunDir(path.parent / f'step-{step:08d}-seed0')
    assert json.loads(child.manifest_json.read_text())['parent']['step'] == step
    ours, theirs = SnapshotReader(child.snapshots), SnapshotReader(short_run.snapshots)
    for name in theirs.names():
      np.testing.assert_array_equal(ours.read([0], name)[0], theirs.read([step], name)[0])
    items, scores = pd.read_parquet(child.monitor_items), pd.read_parquet(child.monitor_scores)
    joined = scores.merge(items, on='item')
    joined['right'] = joined.logp_generalizing > joined.logp_shortcut
    joined['margin'] = np.exp(joined.logp_generalizing.astype(float)) - np.exp(
        joined.logp_shortcut.astype(float))
    means = joined.groupby(['dataset', 'step'])[['right', 'margin']].mean()
    for row in found[found.step == step].itertuples():
      for at, when in ((0, 'before'), (3, 'after')):
        want = means.loc[(row.dataset, at)]
        np.testing.assert_allclose(getattr(row, f'accuracy_{when}'), want.right)
        np.testing.assert_allclose(getattr(row, f'margin_{when}'), want.margin, rtol=1e-9)
  assert (found.margin_before != found.margin_after).all()


def test_bad_choices_are_one_sentence(short_run, tmp_path):
  assert chosen_steps(short_run, []) == list(range(31))
  with pytest.raises(UserError, match=r'--steps=44: .* the nearest are of \[30, 29\]'):
    chosen_steps(short_run, [2, 44])
  with pytest.raises(UserError, match='is not the directory of a run'):
    chosen_steps(RunDir(tmp_path / 'none'), [])
  with pytest.raises(UserError, match='cannot be tokenized'):
    finetune_each(sft.get_config(), OVERRIDES, short_run, 'careless', [10], [0])
