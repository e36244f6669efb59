"""Texts of a trained run from the command line, in one process and by whole recomputation."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.sampling import Sampling
from parallelism.mesh import MeshConfig, make_mesh
from research import build as build_lib
from research import config as config_lib
from research.data import tokenizers
from research.errors import UserError
from research.evals import samples
from research.evals.samples import sample_run
from research.run_dir import RunDir
from research.training.snapshots import SnapshotReader
from tests.launchers.test_launchers import launch

SETTINGS = {'n_steps': 40, 'checkpoints.snapshot_every': 20, 'checkpoints.every': 40,
            'monitors.suite': 'none', 'evals.every': 0, 'logging.tensorboard': 'false'}
PROMPTS = ['the soup was superb', '3 + 4 =']
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope='module')
def run_dir(tmp_path_factory) -> RunDir:
  """A run of the micro-world, shortly trained."""
  path = tmp_path_factory.mktemp('sample') / 'run'
  result = launch('pretrain', '--experiment=quickstart', f'--run_dir={path}',
                  *[f'--config.{name}={value}' for name, value in SETTINGS.items()])
  assert result.returncode == 0, result.stderr
  return RunDir(path)


def recomputed(run_dir: RunDir, step: int, prompt: str, max_tokens: int) -> str:
  """Returns the greedy text after a prompt, the whole row run again for every token."""
  config = config_lib.from_json(run_dir.config_json.read_text())
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  built = build_lib.build(config, mesh, {})
  tokenizer = tokenizers.load(run_dir.tokenizer_json)
  start_id = json.loads(run_dir.manifest_json.read_text())['start_id']
  params = SnapshotReader(run_dir.snapshots).params(step, built.params)
  params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
  model = transformer.apply(built.graphdef, params)
  forward = jax.jit(lambda tokens_BL: model.logits(model(tokens_BL)[0]))
  tokens = ([] if start_id is None else [start_id]) + tokenizer.encode(prompt)
  n_prompt = len(tokens)
  while len(tokens) < n_prompt + max_tokens:
    row_1L = np.zeros((1, config.model.context_length), np.int32)
    row_1L[0, :len(tokens)] = tokens
    token = int(forward(row_1L)[0, len(tokens) - 1, :tokenizer.vocab_size].argmax())
    if token == tokenizer.eos_id:
      break
    tokens.append(token)
  return tokenizer.decode(tokens[n_prompt:])


def test_texts_are_those_of_recomputation_from_the_command_line_too(run_dir):
  result = launch('sample', f'--run_dir={run_dir.path}', '--json', '--temperature=0', '--step=20',
                  '--max_tokens=9', *[f'--prompt={prompt}' for prompt in PROMPTS])
  assert result.returncode == 0, result.stderr
  samples = [json.loads(line) for line in result.stdout.splitlines()]
  assert [sample['prompt'] for sample in samples] == PROMPTS
  for sample in samples:
    assert sample['text'] == recomputed(run_dir, 20, sample['prompt'], 9)
    assert sample['step'] == 20 and 0 < sample['n_tokens'] <= 9


def test_a_mesh_of_eight_devices_writes_what_one_device_writes(run_dir):
  on_eight = list(sample_run(run_dir, PROMPTS, sampling=GREEDY, max_tokens=9))
  assert [s.text for s in on_eight] == [recomputed(run_dir, 40, s.prompt, 9) for s in on_eight]


def test_a_run_of_other_devices_writes_the_same(run_dir, tmp_path):
  """Its kernels, mesh and batch are not for the eight devices at hand."""
  theirs = RunDir(shutil.copytree(run_dir.path, tmp_path / 'run'))
  config = config_lib.from_json(run_dir.config_json.read_text())
  config = dataclasses.replace(
      config, mesh=MeshConfig(data=2, fsdp=16),
      data=dataclasses.replace(config.data, batch_size=33),
      model=dataclasses.replace(config.model, attention='flash_tpu', scan_layers='scan'))
  theirs.config_json.write_text(config_lib.as_json(config))
  manifest = json.loads(run_dir.manifest_json.read_text())
  manifest['numerics'] = {'n_micro': 3, 'attention': 'flash_tpu', 'scan_layers': 'scan'}
  theirs.manifest_json.write_text(json.dumps(manifest))
  texts = [s.text for s in sample_run(theirs, PROMPTS, sampling=GREEDY, max_tokens=9)]
  assert texts == [recomputed(run_dir, 40, prompt, 9) for prompt in PROMPTS]


@pytest.mark.parametrize('mesh, n_devices, chosen', [
    (MeshConfig(data=2, tensor=4), 8, (2, 1, 4)),
    (MeshConfig(data=1, fsdp=2), 8, (1, 2, 1)),
    (MeshConfig(fsdp=16), 8, (1, 8, 1)),
    (MeshConfig(tensor=4), 6, (3, 2, 1)),
    (MeshConfig(data=4, fsdp=8), 1, (1, 1, 1)),
])
def test_the_mesh_of_a_run_is_kept_where_it_fits(mesh, n_devices, chosen, monkeypatch):
  devices = jax.devices()[:n_devices]
  monkeypatch.setattr(jax, 'devices', lambda: devices)
  config = config_lib.ExperimentConfig(mesh=mesh)  # of width 128
  sizes = samples._mesh(config).shape
  assert tuple(sizes[axis] for axis in ('data', 'fsdp', 'tensor')) == chosen


def test_room_is_checked_for_every_prompt_before_anything_is_built(run_dir, monkeypatch):
  monkeypatch.setattr(samples, 'BATCH_ROWS', 8)
  monkeypatch.setattr(build_lib, 'build', None)
  long = ' '.join([PROMPTS[0]] * 15)  # 60 tokens
  with pytest.raises(UserError, match='a prompt of .* exceed model.context_length=64'):
    next(sample_run(run_dir, [PROMPTS[0]] * 20 + [long], max_tokens=9))


def test_a_text_depends_on_prompt_seed_and_number_only(run_dir):
  texts = [s.text for s in sample_run(run_dir, PROMPTS, n_samples=3, max_tokens=9)]
  assert all(len(set(some)) == 3 for some in (texts[:3], texts[3:])) and texts[:3] != texts[3:]
  alone = [s.text for s in sample_run(run_dir, PROMPTS[1:], n_samples=2, max_tokens=9)]
  assert alone == texts[3:5]
  assert texts[:1] != [s.text for s in sample_run(run_dir, PROMPTS[:1], max_tokens=9, seed=1)]


def test_a_stop_word_ends_a_text(run_dir):
  (whole,) = sample_run(run_dir, PROMPTS[:1], sampling=GREEDY, max_tokens=9)
  words = whole.text.split()
  (cut,) = sample_run(run_dir, PROMPTS[:1], sampling=GREEDY, max_tokens=9, stop=[words[-1]])
  assert cut.text.split() == words[:words.index(words[-1])] and cut.stopped


def test_people_read_the_prompt_and_the_text(run_dir):
  result = launch('sample', f'--run_dir={run_dir.path}', '--prompt=the soup', '--max_tokens=3',
                  '--n_samples=2', '--top_k=5', '--top_p=0.9', '--seed=4')
  assert result.returncode == 0, result.stderr
  lines = result.stdout.splitlines()
  assert len(lines) == 4 and lines[0].startswith('--- step 40, sample 0, ')
  assert lines[1].startswith('the soup|')


@pytest.mark.parametrize('options, says', [
    (dict(prompts=['xylophone']), '--prompt=.xylophone.: this run knows a closed list of words'),
    (dict(step=30), '--step=30: no such snapshot in .*; it has .*20, 40'),
    (dict(stop=['the soup']), '--stop=.the soup. is 2 tokens'),
    (dict(stop=['xylophone']), '--stop=.xylophone. is not among the words that this run knows'),
    (dict(max_tokens=64), 'exceed model.context_length=64'),
])
def test_what_cannot_be_written_is_said_in_a_sentence(run_dir, options, says):
  with pytest.raises(UserError, match=says):
    list(sample_run(run_dir, **{'prompts': PROMPTS, **options}))


@pytest.mark.parametrize('arguments, words', [
    (['--prompt=a'], '--run_dir is empty'),
    (['--run_dir=runs/none'], '--prompt is missing'),
    (['--run_dir=/dev/null', '--prompt=a'], '--run_dir=/dev/null is not the directory of a run'),
    (['--run_dir=x', '--prompt=a', '--top_p=2'], '--top_p=2.0 must be above 0 and at most 1'),
    (['--run_dir=x', '--prompt=a', '--n_samples=0'], 'n_samples'),
    (['--run_dir=x', '--prompt=a', '--seed=2147483648'], 'seed'),
    (['--run_dir=x', '--prompt=a', '--seed=-1'], 'seed'),
])
def test_bad_flags_are_one_sentence(arguments, words):
  result = launch('sample', *arguments)
  assert result.returncode == 2
  lines = result.stderr.strip().splitlines()
  assert len(lines) == 1 and words in lines[0], result.stderr
