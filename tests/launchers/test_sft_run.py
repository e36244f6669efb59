"""Fine-tuning an imported public checkpoint from the command line: killed, resumed, refused."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from research.data.microworld import WORDS
from research.data.tokenizers import word_tokenizer
from research.dynamics.conversion import find_source, import_run
from research.run_dir import RunDir
from research.training import logs
from research.training.snapshots import SnapshotReader
from tests.launchers.test_launchers import ROOT, launch
from tests.models import hf_cases
from tests.research.sft_cases import write

N_STEPS = 24
OVERRIDES = {
    'n_steps': N_STEPS, 'data.batch_size': 4, 'data.sequence_length': 16, 'checkpoints.every': 6,
    'checkpoints.snapshot_every': 8, 'evals.every': 8, 'logging.tensorboard': 'false',
    'data.sft.user_text': '', 'data.sft.assistant_text': '', 'data.sft.turn_end': ''}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """An imported tiny Llama of the micro-world's words in `parent`, conversations beside it."""
  folder = tmp_path_factory.mktemp('tuned')
  hf = hf_cases.config_json('llama-llama3-tied') | {'vocab_size': 2048}
  hf_cases.write(folder / 'public', hf)
  word_tokenizer(WORDS).save(folder / 'public' / 'tokenizer.json')
  import_run(find_source(str(folder / 'public'), ''), RunDir(folder / 'parent'), [])
  things = [word for word in WORDS if word.isalpha()][:80]
  write(folder / 'chat.jsonl', [
      {'prompt': f'{a} was', 'response': f'{b} and {a}'} for a, b in zip(things, things[1:])])
  return folder


def arguments(folder, run: str, **more) -> list[str]:
  settings = {**OVERRIDES, 'data.sft.paths': folder / 'chat.jsonl', **more}
  return ['--experiment=sft', f'--init_from={folder / "parent"}', f'--run_dir={folder / run}',
          *[f'--config.{name}={value}' for name, value in settings.items()]]


def kill_after_a_checkpoint(folder, run: str) -> None:
  """Starts a run and kills it once its first checkpoint is whole."""
  process = subprocess.Popen(
      [sys.executable, '-m', 'launchers.pretrain', *arguments(folder, run)], cwd=ROOT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, stdout=subprocess.DEVNULL,
      stderr=subprocess.DEVNULL)
  first = RunDir(folder / run).checkpoints / '6'
  while process.poll() is None:
    if first.is_dir():
      process.send_signal(signal.SIGKILL)
    time.sleep(0.005)
  assert process.returncode == -signal.SIGKILL, 'the run ended before it was killed'


@pytest.mark.slow
def test_a_killed_fine_tune_of_an_import_equals_an_uninterrupted_one(folder):
  whole, killed = RunDir(folder / 'whole'), RunDir(folder / 'killed')
  result = launch('pretrain', *arguments(folder, 'whole'))
  assert result.returncode == 0, result.stderr
  kill_after_a_checkpoint(folder, 'killed')
  result = launch('pretrain', *arguments(folder, 'killed'))
  assert result.returncode == 0 and 'resuming' in result.stdout, result.stderr
  rows = logs.read_rows(whole.metrics_jsonl)
  assert rows == logs.read_rows(killed.metrics_jsonl) and len(rows) == N_STEPS
  assert logs.read_rows(whole.evals_jsonl) == logs.read_rows(killed.evals_jsonl)
  ours, theirs, parent = (SnapshotReader(run.snapshots) for run in (
      whole, killed, RunDir(folder / 'parent')))
  assert ours.steps == theirs.steps == [0, 8, 16, 24]
  for name in ours.names():
    np.testing.assert_array_equal(ours.read([0], name)[0], parent.read(parent.steps, name)[-1])
    np.testing.assert_array_equal(ours.read(ours.steps, name), theirs.read(theirs.steps, name))
  assert np.mean([row['loss'] for row in rows[-4:]]) < rows[0]['loss']
  manifest = json.loads(whole.manifest_json.read_text())
  assert manifest['parent']['run_dir'] == str((folder / 'parent').resolve())
  assert manifest['data']['train']['examples'] == 71


@pytest.mark.slow
@pytest.mark.parametrize('more, words', [
    ({'model.d_ff': '40'}, 'give both runs the same model'),
    ({'data.sft.tokenizer': 'bytes'}, 'was trained with another tokenizer'),
    ({'data.sft.user_text': 'unheard '}, 'chat.jsonl#1: text '),
    ({'data.sft.overlong': 'drop'}, "data.sft.overlong='drop' is none of")])
def test_what_does_not_fit_is_one_sentence(folder, more, words):
  result = launch('pretrain', *arguments(folder, 'refused', **more))
  assert result.returncode == 2, (result.returncode, result.stderr)
  assert len(result.stderr.strip().splitlines()) == 1 and words in result.stderr, result.stderr
  assert not (folder / 'refused').exists()
