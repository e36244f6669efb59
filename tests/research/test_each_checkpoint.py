"""Fine-tunes of several checkpoints of a run: where they start, their table, and repeating them."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from experiments import finetune
from models.sampling import Sampling
from research.errors import UserError
from research.evals.samples import sample_run
from research.monitors.items import sound_items, write_items
from research.posttraining import free_form
from research.posttraining.each_checkpoint import Plan, chosen_steps, finetune_each
from research.posttraining.free_form import Asking
from research.run_dir import RunDir
from research.training.snapshots import SnapshotReader

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures('quick_compilation')]
OVERRIDES = [('n_steps', '3'), ('mesh.data', '1'), ('data.batch_size', '4'), ('evals.every', '0'),
             ('logging.tensorboard', 'false')]


ASKING = Asking(2, temperature=0.7, max_tokens=5, seed=3)


def run(run_dir: RunDir, steps: list[int], seeds: list[int], *more: tuple[str, str],
        family: str = 'functions_microworld', asking: Asking = Asking(0), overrides=OVERRIDES):
  return finetune_each(Plan(finetune.get_config(), [*overrides, *more], family, asking), run_dir,
                       steps, seeds)


def test_a_checkpoint_and_a_snapshot_are_fine_tuned_scored_and_tabled(short_run, capsys):
  folder = run(short_run, [10], [0])
  first = RunDir(folder / 'step-00000010-seed0')
  written = first.done.stat().st_mtime_ns
  run(short_run, [15], [0])
  assert 'step 15, seed 0: loss ' in capsys.readouterr().out
  run(short_run, [10], [0])  # it is there already
  assert first.done.stat().st_mtime_ns == written
  found = pd.read_csv(folder / 'table.csv')
  # What was made in another way, or asked other things, is not compared with these.
  with pytest.raises(UserError, match='step-00000010-seed0 was made with n_steps=3'):
    run(short_run, [20], [0], ('n_steps', '4'))
  with pytest.raises(UserError, match="step-00000010-seed0 was made with data.sft.paths="):
    run(short_run, [20], [0], ('data.sft.paths', str(folder.parent / 'others.jsonl')))
  fewer = folder / 'fewer.jsonl'
  items, _ = sound_items(folder / 'items-seed0.jsonl')
  write_items(items[1:], fewer)
  with pytest.raises(UserError, match='was scored on other items than .*fewer.jsonl'):
    run(short_run, [10], [0], ('monitors.suite', str(fewer)))
  pd.testing.assert_frame_equal(found, pd.read_csv(folder / 'table.csv'))
  pd.testing.assert_frame_equal(found, pd.read_parquet(folder / 'table.parquet'))
  assert found[['step', 'dataset', 'n_items']].values.tolist() == [
      [step, dataset, n] for step in (10, 15)
      for dataset, n in (('functions_microworld', 40), ('values_microworld', 120),
                         ('untrained_microworld', 40))]
  for step in (10, 15):
    child = RunDir(folder / f'step-{step:08d}-seed0')
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
  assert (folder / 'finetunes.png').exists() and not list(folder.glob('answers*'))
  shown = pd.read_parquet(folder / 'summary.parquet')
  assert sorted(set(shown.measure)) == ['accuracy', 'margin'] and len(shown) == 12


def test_free_answers_are_drawn_once_and_those_before_are_the_parents(short_run, monkeypatch):
  folder = run(short_run, [10], [0], asking=ASKING)
  answers = pd.read_parquet(folder / 'answers.parquet')
  # Ten names are asked twice what they add, all twenty for six values each.
  assert answers.groupby(['dataset', 'at']).size().to_dict() == {
      (dataset, at): n for dataset, n in (('functions_microworld', 20), ('values_microworld', 240),
                                          ('untrained_microworld', 20)) for at in (0, 3)}
  assert set(answers.step) == {10} and set(answers.seed) == {0}
  assert (answers.text[answers['at'] == 0].values != answers.text[answers['at'] == 3].values).any()
  before = answers[answers['at'] == 0].groupby('prompt', sort=False).text.apply(list)
  texts = sample_run(short_run, list(before.index), step=10, n_samples=2, max_tokens=5,
                     sampling=Sampling(0.7), seed=3)
  assert [sample.text for sample in texts] == [text for pair in before for text in pair]
  items = {item.prompt: item for item in sound_items(folder / 'items-seed0.jsonl')[0]}
  right = [items[row.prompt].generalizing == ' ' + row.text.strip() for row in answers.itertuples()]
  assert right == (answers.verdict == 'generalizing').tolist()
  summary = pd.read_csv(folder / 'summary.csv').set_index(['dataset', 'measure'])
  for (dataset, at), mine in answers.groupby(['dataset', 'at']):
    shown = summary.loc[(dataset, 'free other')]
    assert (shown.after if at else shown.before) == (mine.verdict == 'other').mean()

  def refused(*_, **__):
    raise AssertionError('drawn again')
  with monkeypatch.context() as patch:
    patch.setattr(free_form, 'sample_run', refused)
    run(short_run, [10], [0], asking=ASKING)
    with pytest.raises(AssertionError, match='drawn again'):
      run(short_run, [10], [0], asking=Asking(2, temperature=0.7, max_tokens=5, seed=4))
  pd.testing.assert_frame_equal(answers, pd.read_parquet(folder / 'answers.parquet'))


def test_files_are_fine_tuned_on_and_asked_nothing(short_run, capsys):
  chat = short_run.path.parent / 'chat.jsonl'
  chat.write_text('\n'.join(json.dumps({'prompt': f'{n} +', 'response': '1'}) for n in range(9)))
  bare = [(f'data.sft.{name}', '') for name in ('user_text', 'assistant_text', 'turn_end')]
  with pytest.raises(UserError, match='data.sft.paths'):
    run(short_run, [10], [0], *bare, family='files')
  folder = run(short_run, [10], [0], *bare, ('data.sft.paths', str(chat)), family='files')
  assert 'step 10, seed 0: nothing is asked' in capsys.readouterr().out
  manifest = json.loads((folder / 'step-00000010-seed0' / 'manifest.json').read_text())
  assert manifest['data']['train']['examples'] == 9 and not list(folder.glob('*.csv'))


def test_stopped_before_its_first_checkpoint_it_begins_anew_unless_the_parent_lost_that_step(
    short_run):
  folder = run(short_run, [10], [0])
  child = RunDir(folder / 'step-00000010-seed0')
  scores = child.monitor_scores / 'step-00000003.parquet'
  want = pd.read_parquet(scores)

  def stop_early():
    child.done.unlink()
    shutil.rmtree(child.checkpoints)
    scores.unlink()
  stop_early()
  run(short_run, [10], [0])
  pd.testing.assert_frame_equal(pd.read_parquet(scores), want)
  shutil.rmtree(short_run.checkpoints / '10')
  run(short_run, [10], [0])  # finished, so it needs its parent no more
  stop_early()
  with pytest.raises(UserError, match='was stopped before its first checkpoint, and the checkpoint '
                                      r'of step 10 .* no longer in .* snapshots: \[10, 9\]'):
    run(short_run, [10], [0])


def test_bad_choices_are_one_sentence(short_run, tmp_path):
  assert chosen_steps(short_run, []) == [10, 20, 30]
  assert chosen_steps(short_run, [12, 2, 12]) == [2, 12]
  with pytest.raises(UserError, match=r'--steps=44: .* the nearest are of \[30, 29\]'):
    chosen_steps(short_run, [2, 44])
  with pytest.raises(UserError, match='is not the directory of a run'):
    chosen_steps(RunDir(tmp_path / 'none'), [])
  shutil.rmtree(short_run.checkpoints)
  assert chosen_steps(short_run, []) == list(range(31))  # dense snapshots where there is no other
  with pytest.raises(UserError, match='does not know .* takes functions_microworld'):
    run(short_run, [10], [0], family='careless')
