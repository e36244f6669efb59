"""Benchmarks along a trajectory: what is written, what is asked again, public checkpoints."""

import json

import datasets
import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file

from research.data import tokenizers
from research.dynamics import accuracies, benchmarks
from research.errors import UserError
from research.evals import harness, harness_tasks
from research.evals.results import described, variant_of
from research.run_dir import RunDir
from tests.models import hf_cases
from tests.research.harness_tasks_folder import write_choices, write_texts

pytestmark = pytest.mark.usefixtures('quick_compilation')
SUMS = [{'q': f'{a} + {b} =', 'choices': [str(a + b), str(a + b + 1), str(a)], 'gold': 0}
        for a in range(1, 5) for b in range(1, 4)]


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
  """Keeps datasets in a folder of the test."""
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


def load(tmp_path, documents=SUMS):
  write_choices(tmp_path / 'tasks', 'sums', documents)
  return harness_tasks.load(['sums'], str(tmp_path / 'tasks'))


def test_checkpoints_of_a_run_are_asked_once_each(short_run, tmp_path, monkeypatch):
  monkeypatch.setattr(harness, 'SAY_SECONDS', 3600.0)  # what it says then depends on no clock
  said = []
  subject = benchmarks.open_subject(short_run)
  assert benchmarks.chosen_steps(subject, '') == [30]
  assert benchmarks.chosen_steps(subject, 'all') == list(range(31))
  steps = benchmarks.chosen_steps(subject, '30,7')

  def ask(loaded, steps=steps, **options):
    return benchmarks.evaluate_trajectory(subject, short_run, loaded, steps, say=said.append,
                                          **options)
  rows = ask(load(tmp_path))
  assert [(row.step, row.metric) for row in rows] == [
      (7, 'acc'), (7, 'acc_norm'), (30, 'acc'), (30, 'acc_norm')]
  assert all(row.n_samples == len(SUMS) and row.n_shot == 0 for row in rows)
  assert rows[0].tokens == subject.tokens(7) > 0
  assert len(said) == 2 and said[-1].startswith('[2/2] step 30, sums: acc 0.')
  assert described(rows)[0].split() == 'step task n_shot metric filter value stderr n'.split()

  # A wider wish asks what is missing; another limit has a folder of its own.
  more = ask(load(tmp_path), [7, 20, 30])
  assert said[2] == '2 of 3 are there already' and said[3].startswith('[1/1] step 20')
  assert more[:2] + more[4:] == rows
  few = ask(load(tmp_path), [7], limit=4)
  assert few[0].n_samples == 4 and short_run.eval_json('sums-first4', 7).exists()
  with monkeypatch.context() as patched:
    patched.setattr(benchmarks, 'evaluated', None)
    assert ask(load(tmp_path), [7, 20, 30]) == more

  # The table opens in pandas, and feeds the detector.
  table = pd.read_csv(short_run.evals_csv)
  assert len(table) == 8 and set(table.variant) == {'sums', 'sums-first4'}
  acc = table[(table.variant == 'sums') & (table.metric == 'acc')].sort_values('step')
  short_run.eval_json('sums-first4', 7).unlink()
  series = accuracies.evaluated(short_run)
  assert series.tasks == ('sums',) and series.steps.tolist() == [7, 20, 30]
  np.testing.assert_array_equal(series.accuracy_KT[0], acc.value)
  np.testing.assert_array_equal(series.error_KT[0], acc.stderr)
  with pytest.raises(UserError, match='has no metric f1'):
    accuracies.evaluated(short_run, 'f1')

  # Another checkpoint under a step is asked again; other documents are no part of the series.
  path = short_run.eval_json('sums', 20)
  path.write_text(path.read_text().replace(subject.content(20), 'another'))
  assert ask(load(tmp_path), [20])[0] == more[2]
  assert json.loads(path.read_text())['checkpoint'] == subject.content(20)
  with pytest.raises(UserError, match='evals/sums holds results of other requests .step 7.'):
    ask(load(tmp_path, SUMS[1:]), [8])
  with pytest.raises(UserError, match='evals/sums holds results of other requests .step 7.'):
    ask(load(tmp_path, SUMS[1:]), [20])  # They are not taken for those that are there.
  assert not short_run.eval_json('sums', 8).exists()


def test_a_word_that_the_run_does_not_know_is_said_before_anything_is_asked(short_run, tmp_path):
  subject = benchmarks.open_subject(short_run)
  loaded = load(tmp_path, [*SUMS, {'q': 'xylophone', 'choices': ['1', '2'], 'gold': 0}])
  with pytest.raises(UserError, match="task sums, document 12: .*'xylophone"):
    benchmarks.evaluate_trajectory(subject, short_run, loaded, [30], say=lambda line: None)
  with pytest.raises(UserError, match='--steps=31: .* the nearest are 29 and 30'):
    benchmarks.chosen_steps(subject, '3,31')
  with pytest.raises(UserError, match='--steps=last: give all, or steps'):
    benchmarks.chosen_steps(subject, 'last')
  with pytest.raises(UserError, match='/dev/null is no trajectory'):
    benchmarks.open_subject(RunDir('/dev/null'))
  with pytest.raises(UserError, match='--config.mesh.data means nothing here'):
    benchmarks.open_subject(short_run, '', [('mesh.data', '2')])
  with pytest.raises(UserError, match='leave --source out'):
    benchmarks.open_subject(short_run, str(tmp_path))


def test_a_folder_and_a_series_give_what_each_of_their_checkpoints_gives(tmp_path):
  hf = hf_cases.config_json('gpt_neox-default-untied') | {'vocab_size': 264}
  for scale, name in enumerate(('step1000', 'step2000'), 1):
    folder = hf_cases.write(tmp_path / 'series' / name, hf)
    save_file({key: scale * x for key, x in hf_cases.tensors(hf).items()},
              folder / 'model.safetensors', metadata={'format': 'pt'})
    tokenizers.byte_tokenizer().save(folder / 'tokenizer.json')
  write_texts(tmp_path / 'tasks', 'prose', ['the soup was good', 'b' * 300])
  loaded = harness_tasks.load(['prose'], str(tmp_path / 'tasks'))

  def ask(source, run_dir):
    subject = benchmarks.open_subject(run_dir, str(source))
    return benchmarks.evaluate_trajectory(subject, run_dir, loaded, subject.steps,
                                          say=lambda line: None)
  series = ask(tmp_path / 'series', RunDir(tmp_path / 'all'))
  alone = ask(tmp_path / 'series' / 'step2000', RunDir(tmp_path / 'one'))
  assert [row.step for row in series] == [1000, 1000, 2000, 2000]
  assert [row.value for row in series[2:]] == [row.value for row in alone]
  assert series[0].value != series[2].value
  assert 5 < alone[1].value < 20 and np.isnan(alone[1].stderr)  # bits per byte; log2(264) is 8
  with pytest.raises(UserError, match='holds results of .*series, not of step2000; choose another'):
    ask(tmp_path / 'series' / 'step2000', RunDir(tmp_path / 'all'))
  with pytest.raises(UserError, match='give it as --run_dir|is no trajectory'):
    benchmarks.open_subject(RunDir(tmp_path / 'other'), str(tmp_path / 'none'))


def test_what_was_asked_in_another_way_has_another_folder():
  assert [variant_of('arc', *options) for options in ((None, None), (5, None), (0, 100))] == [
      'arc', 'arc-5shot', 'arc-0shot-first100']
