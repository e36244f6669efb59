"""Public checkpoints that cannot be used, from the command line: one sentence, nothing written."""

import json
import socket

import pytest
from safetensors.numpy import load_file, save_file

from research.data.tokenizers import word_tokenizer
from tests.launchers.test_launchers import launch
from tests.models import hf_cases

NORM = 'model.norm.weight'


@pytest.fixture
def folder(tmp_path):
  """A folder of one sound revision of a tiny model of 64 tokens."""
  revision = hf_cases.write(tmp_path / 'theirs' / 'step100', hf_cases.config_json(
      'llama-default-untied'))
  word_tokenizer([f'w{i}' for i in range(60)]).save(revision / 'tokenizer.json')
  return revision.parent


def configured(revision, **changes) -> None:
  """Changes keys of config.json; None takes one out."""
  hf = json.loads((revision / 'config.json').read_text()) | changes
  (revision / 'config.json').write_text(
      json.dumps({key: value for key, value in hf.items() if value is not None}))


def reshaped(revision) -> None:
  tensors = load_file(revision / 'model.safetensors')
  tensors[NORM] = tensors[NORM][:-1]
  save_file(tensors, revision / 'model.safetensors')


def with_more_words(revision) -> None:
  word_tokenizer([f'w{i}' for i in range(70)]).save(revision / 'tokenizer.json')


def refused(launcher: str, *arguments: str) -> str:
  """Returns the one sentence that a launcher ends with."""
  result = launch(launcher, *arguments)
  assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
  line, = result.stderr.strip().splitlines()
  assert line.startswith('error: ')
  return line


DAMAGES = {
    'architecture': (lambda revision: configured(revision, model_type='lama'),
                     "model_type='lama' is not supported; the nearest of llama, "),
    'keys': (lambda revision: configured(revision, hidden_size=None, vocab_size=None),
             "config.json of model_type='llama' has no vocab_size, hidden_size"),
    'shape': (reshaped, f'tensor {NORM} has shape (31,), config.json says (32,)'),
    'vocabulary': (with_more_words, 'tokenizer.json has 72 tokens, the model only vocab_size=64; '
                   'they do not belong together')}


@pytest.mark.parametrize('kind', [
    'architecture', *[pytest.param(kind, marks=pytest.mark.slow) for kind in list(DAMAGES)[1:]]])
def test_a_checkpoint_that_is_no_model_of_ours(folder, tmp_path, kind):
  damage, words = DAMAGES[kind]
  damage(folder / 'step100')
  said = refused('convert', f'--source={folder}', '--revision=step100',
                 f'--run_dir={tmp_path / "run"}')
  assert words in said and str(folder) in said
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_pattern_that_matches_nothing(folder):
  assert refused('trajectory', 'list', f'{folder}@step9*').endswith(
      "no revision matches 'step9*'; of 1 the nearest are step100")


def test_what_is_not_cached_needs_a_network(tmp_path, monkeypatch):
  with socket.socket() as closed:
    closed.bind(('127.0.0.1', 0))
    monkeypatch.setenv('HF_ENDPOINT', f'http://127.0.0.1:{closed.getsockname()[1]}')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    said = refused('convert', '--source=owner/model', '--revision=step100',
                   f'--run_dir={tmp_path / "run"}')
  assert said.endswith('owner/model at revision step100 is not in the cache and huggingface.co '
                       'cannot be reached; go online once')
  assert not (tmp_path / 'run').exists()
