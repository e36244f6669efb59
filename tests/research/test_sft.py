"""Fine-tuning on responses: loss and gradients against loops over examples and tokens, runs.

Parity as in style: relative error per leaf of gradients (an SGD step at learning rate 1000), f32
with matmul precision highest.
"""

import dataclasses
import functools
import json
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import ModelConfig
from parallelism.mesh import MeshConfig, make_mesh
from parallelism.sharding import path_name
from research import build as build_lib
from research.config import ExperimentConfig
from research.data import tokenizers
from research.data.batches import batch_at, batches, make_source
from research.data.config import DataConfig, TextConfig
from research.errors import Stopped, UserError
from research.run_dir import RunDir
from research.training import logs, loop
from research.training.checkpoints import Checkpoints
from research.training.config import (
    CheckpointConfig, ComputeConfig, EvalConfig, OptimizerConfig, StartConfig)
from research.training.loop import train
from research.training.snapshots import SnapshotReader
from research.training.start import continued
from tests.models import witness
from tests.research.sft_cases import LENGTH, config_for, conversations, tokens_of, write

TOLERANCE = 1e-5
N_ROWS = 8
MODEL = ModelConfig(vocab_size=264, context_length=LENGTH, n_layers=2, d_model=32, n_heads=4,
                    n_kv_heads=2, d_head=8, d_ff=64, tie_embeddings=False)
SGD = OptimizerConfig(name='sgd', b1=0.0, peak_lr=1000.0, schedule='constant', warmup_steps=0,
                      weight_decay=0.0, clip_norm=0.0)
ONE = MeshConfig(data=1)
pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture(scope='module')
def path(tmp_path_factory):
  path = tmp_path_factory.mktemp('sft') / 'chat.jsonl'
  write(path, [{'messages': m} for m in conversations(40)])
  return path


@functools.cache
def built_for(mesh: MeshConfig = ONE, n_rows: int = N_ROWS, tokens: int = 0) -> build_lib.Build:
  """A build with micro-batches of so many tokens on a device; 0: the whole batch."""
  config = ExperimentConfig(
      n_steps=50, model=MODEL, optimizer=SGD, mesh=mesh,
      data=DataConfig(sequence_length=LENGTH, batch_size=n_rows),
      compute=ComputeConfig(matmul_precision='highest', loss_chunk=48,
                            microbatch_tokens=tokens or n_rows * LENGTH))
  mesh = make_mesh(mesh)
  return build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))


@functools.cache
def start():
  """Parameters of which none is zero, as NumPy arrays."""
  shapes = jax.tree.map(lambda leaf: np.zeros(leaf.shape), built_for().params)
  return witness.randomized(shapes, scale=0.2)


@functools.cache
def step_of(*settings):
  """The compiled step of a build."""
  return built_for(*settings).train_step()


def gradients(batch, *settings) -> tuple[dict[str, np.ndarray], dict[str, float]]:
  """The gradient of every leaf and the metrics, by one step of the production code."""
  built = built_for(*settings)
  state = built.init_state()._replace(params=built.place_params(start()))
  state, metrics = step_of(*settings)(state, built.place_batch(batch))
  found = jax.tree.map(lambda new, old: (old - np.asarray(new, np.float64)) / SGD.peak_lr,
                       state.params, start())
  return ({path_name(p): leaf for p, leaf in jax.tree.leaves_with_path(found)},
          {name: float(value) for name, value in metrics.items()})


@functools.cache
def packed_batch(path) -> tuple[dict[str, np.ndarray], list[list[tuple[int, bool]]]]:
  """The first batch, and the conversations in it as tokens written out."""
  source, read = make_source(config_for(path, N_ROWS), 10, 'unused'), conversations(40)
  numbers = [int(d['id'].rpartition('#')[2]) for j in range(N_ROWS) for d in source.documents(j)]
  assert len(numbers) > N_ROWS  # some rows hold several
  return batch_at(source, N_ROWS, 0), [tokens_of(read[number - 1]) for number in numbers]


def check_close(found, expected):
  assert found.keys() == expected.keys()
  for name, want in expected.items():
    norm = np.linalg.norm(want)
    assert norm > 0, f'{name} has no gradient'
    error = np.linalg.norm(found[name] - want) / norm
    assert error <= TOLERANCE, f'{name}: relative error {error:.1e}'


def witness_loss(params, examples) -> float:
  """Nats per response token in float64, example by example and token by token."""
  nats, n_tokens = 0.0, 0
  for example in examples:
    ids = np.array([token for token, _ in example])
    logits_LV = witness.logits(MODEL, params, ids[:-1])
    for at, (token, supervised) in enumerate(example[1:]):
      if supervised:
        nats += np.log(np.exp(logits_LV[at]).sum()) - logits_LV[at, token]
        n_tokens += 1
  return nats / n_tokens


def test_loss_equals_a_float64_loop_over_examples_and_response_tokens(path):
  batch, examples = packed_batch(path)
  found, metrics = gradients(batch)
  expected = witness_loss(start(), examples)
  assert abs(metrics['loss'] - expected) <= TOLERANCE * max(1, expected)
  assert metrics['batch_tokens'] == sum(s for example in examples for _, s in example)
  # And along the gradient it falls as steeply as the gradient says.
  size = 1e-3
  squared = sum((leaf**2).sum() for leaf in found.values())
  moved = [jax.tree.map_with_path(
      lambda p, x: x.astype(np.float64) + sign * size * found[path_name(p)] / np.sqrt(squared),
      start()) for sign in (1, -1)]
  slope = (witness_loss(moved[0], examples) - witness_loss(moved[1], examples)) / (2 * size)
  np.testing.assert_allclose(slope, np.sqrt(squared), rtol=1e-4)


def test_gradients_equal_a_plain_loop(path):
  """Every example alone in a row, its response tokens summed, divided by the number of all."""
  batch, examples = packed_batch(path)

  @jax.jit
  @jax.grad
  def gradient(params, tokens_L, targets_L, counts_L):
    with jax.default_matmul_precision('highest'):
      model = transformer.apply(built_for().graphdef, params)
      logits_LV = model.logits(model(tokens_L[None])[0])[0].astype(jnp.float32)
    picked_L = jax.nn.log_softmax(logits_LV)[jnp.arange(LENGTH), targets_L]
    return -jnp.sum(jnp.where(counts_L, picked_L, 0.0))

  total, n_tokens = None, 0
  for example in examples:
    tokens_L, targets_L, counts_L = np.zeros((3, LENGTH), np.int32)
    for at in range(len(example) - 1):
      tokens_L[at], (targets_L[at], counts_L[at]) = example[at][0], example[at + 1]
    n_tokens += counts_L.sum()
    one = jax.tree.map(lambda x: np.asarray(x, np.float64),
                       gradient(start(), tokens_L, targets_L, counts_L > 0))
    total = one if total is None else jax.tree.map(np.add, total, one)
  expected = {path_name(p): leaf / n_tokens for p, leaf in jax.tree.leaves_with_path(total)}
  check_close(gradients(batch)[0], expected)


def test_the_loss_is_a_mean_over_tokens_not_over_rows(path):
  """What the parities above would not see if all rows had as many response tokens."""
  batch, _ = packed_batch(path)
  assert len(set(batch['loss_mask'].sum(axis=1))) > 1


def test_targets_of_prompts_and_padding_change_nothing(path):
  batch, _ = packed_batch(path)
  found, metrics = gradients(batch)
  rng = np.random.default_rng(0)
  random_BL = rng.integers(0, 264, batch['targets'].shape, np.int32)
  other = {**batch, 'targets': np.where(batch['loss_mask'] > 0, batch['targets'], random_BL)}
  assert (other['targets'] != batch['targets']).sum() > 100
  again, other_metrics = gradients(other)
  assert metrics == other_metrics
  for name, leaf in found.items():
    np.testing.assert_array_equal(again[name], leaf)
  # One response target less is seen.
  b, at = np.argwhere(batch['loss_mask'] > 0)[0]
  seen = {**batch, 'targets': batch['targets'].copy()}
  seen['targets'][b, at] += 1
  assert gradients(seen)[1]['loss'] != metrics['loss']


def test_packed_equals_unpacked(path):
  batch, examples = packed_batch(path)
  n_rows = 2 * -(-len(examples) // 2)
  alone = {name: np.zeros((n_rows, LENGTH), x.dtype) for name, x in batch.items()}
  for b, example in enumerate(examples):
    n = len(example) - 1
    alone['tokens'][b, :n] = [token for token, _ in example[:-1]]
    alone['targets'][b, :n] = [token for token, _ in example[1:]]
    alone['loss_mask'][b, :n] = [supervised for _, supervised in example[1:]]
    alone['segment_ids'][b, :n], alone['positions'][b, :n] = 1, np.arange(n)
  found, metrics = gradients(batch)
  expected, alone_metrics = gradients(alone, ONE, n_rows)
  check_close(found, expected)
  assert abs(metrics['loss'] - alone_metrics['loss']) <= TOLERANCE * metrics['loss']


@pytest.mark.parametrize('mesh, tokens', [
    (ONE, LENGTH), (MeshConfig(data=2, fsdp=2, tensor=2), 0),
    pytest.param(ONE, 2 * LENGTH, marks=pytest.mark.slow),
    pytest.param(MeshConfig(data=2, fsdp=2), LENGTH, marks=pytest.mark.slow)],
    ids=['rows alone', 'data 2 fsdp 2 tensor 2', 'pairs of rows', 'data 2 fsdp 2, rows alone'])
def test_microbatches_and_meshes_equal_the_whole_batch_on_one_device(path, mesh, tokens):
  batch, _ = packed_batch(path)
  assert built_for().n_micro == 1 and (built_for(mesh, N_ROWS, tokens).n_micro > 1) == bool(tokens)
  expected, whole = gradients(batch)
  found, metrics = gradients(batch, mesh, N_ROWS, tokens)
  check_close(found, expected)
  for name in ('loss', 'cross_entropy', 'accuracy', 'grad_norm', 'batch_tokens'):
    assert abs(metrics[name] - whole[name]) <= TOLERANCE * max(1, abs(whole[name])), name


# Runs.


def parent_config(folder, n_steps: int = 4) -> ExperimentConfig:
  (folder / 'text.txt').write_text('a river, an oak, salt and tin. ' * 200)
  text = TextConfig(paths=(str(folder / 'text.txt'),), heldout_fraction=0.0)
  logging = dataclasses.replace(ExperimentConfig().logging, tensorboard=False)
  return ExperimentConfig(
      name='parent', n_steps=n_steps, model=MODEL, mesh=ONE, logging=logging,
      data=DataConfig(kind='text', sequence_length=LENGTH, batch_size=4, text=text,
                      cache_dir=str(folder / 'cache')),
      checkpoints=CheckpointConfig(every=4, snapshot_every=2), evals=EvalConfig(every=0))


@pytest.fixture(scope='module')
def parent(tmp_path_factory, quick_compilation):
  """A run of 4 steps over bytes: a checkpoint of step 4, snapshots of steps 0, 2 and 4."""
  folder = tmp_path_factory.mktemp('parent')
  train(parent_config(folder), RunDir(folder / 'run'))
  return RunDir(folder / 'run')


def tuned(parent: RunDir, path, at: str = '', **more) -> ExperimentConfig:
  """A fine-tuning run of that parent."""
  base = parent_config(path.parent)
  settings = {
      'name': 'tuned', 'n_steps': 16, 'data': config_for(path, 4, heldout_fraction=0.1),
      'optimizer': OptimizerConfig(peak_lr=3e-3, schedule='constant', warmup_steps=0),
      'checkpoints': CheckpointConfig(every=6, snapshot_every=8), 'evals': EvalConfig(every=8),
      **more}
  return continued(dataclasses.replace(base, **settings), f'{parent.path}{at}')


def until_terminated(*arguments, **more):
  """Batches that come with a SIGTERM to this process at the seventh."""
  for step, batch in enumerate(batches(*arguments, **more), 1):
    if step == 7:
      signal.raise_signal(signal.SIGTERM)
    yield batch


def snapshot(run_dir: RunDir, step: int):
  return SnapshotReader(run_dir.snapshots).params(step, built_for().params)


def assert_same(a, b):
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=path_name(path))


def test_a_run_starts_from_its_parent_learns_and_resumes_exactly(
    parent, path, tmp_path, monkeypatch):
  config = tuned(parent, path)
  whole, halted = RunDir(tmp_path / 'whole'), RunDir(tmp_path / 'halted')
  assert config.data.sft.begins_with == 'eos' and config.model == MODEL
  train(config, whole)
  assert_same(snapshot(whole, 0), snapshot(parent, 4))
  rows = logs.read_rows(whole.metrics_jsonl)
  assert np.mean([row['loss'] for row in rows[-4:]]) < 0.8 * rows[0]['loss']
  heldout = [row['heldout_loss'] for row in logs.read_rows(whole.evals_jsonl)]
  assert len(heldout) == 3 and heldout[-1] < heldout[0]
  source = make_source(config.data, 1, 'unused')
  for row in rows:
    supervised = int(batch_at(source, 4, row['step'] - 1)['loss_mask'].sum())
    assert row['supervised_tokens'] == supervised
    np.testing.assert_allclose(row['bits_per_token'], row['cross_entropy'] / np.log(2))
  assert rows[-1]['tokens'] == sum(row['supervised_tokens'] for row in rows)
  manifest = json.loads(whole.manifest_json.read_text())
  assert manifest['parent'] == {'run_dir': str(parent.path.resolve()), 'step': 4}
  assert manifest['data']['template']['user_text'] == 'u:'
  assert manifest['data']['first_example'] == 'u:sun\na:« moon<end>»'

  with monkeypatch.context() as patch, pytest.raises(Stopped, match='saved at step 7 of 16'):
    patch.setattr(loop, 'batches', until_terminated)
    train(config, halted)
  train(config, halted)
  assert len(json.loads(halted.manifest_json.read_text())['starts']) == 2
  assert logs.read_rows(halted.metrics_jsonl) == rows
  assert logs.read_rows(halted.evals_jsonl) == logs.read_rows(whole.evals_jsonl)
  mesh = make_mesh(config.mesh)
  built = build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))
  states = []
  for run_dir in (whole, halted):
    checkpoints = Checkpoints(run_dir.checkpoints)
    states.append(checkpoints.restore(16, built.abstract_state))
    checkpoints.close()
  assert states[0][1] == states[1][1]
  assert_same(states[0][0], states[1][0])


@pytest.mark.slow
def test_a_snapshot_serves_where_there_is_no_checkpoint(parent, path, tmp_path):
  run_dir = RunDir(tmp_path / 'run')
  train(tuned(parent, path, '@2', n_steps=2), run_dir)
  assert_same(snapshot(run_dir, 0), snapshot(parent, 2))
  manifest = json.loads(run_dir.manifest_json.read_text())
  assert manifest['parent'] == {
      'run_dir': str(parent.path.resolve()), 'step': 2, 'snapshot': 'float32'}
  checkpoints = Checkpoints(run_dir.checkpoints)
  line = SnapshotReader(parent.snapshots).commits[2]
  assert checkpoints.record(2)['parent']['hash'] == line['hash'] != ''
  checkpoints.close()


@pytest.mark.parametrize('change, words', [
    (lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, d_ff=72)),
     r'parameter blocks.mlp.\w+ is .* give both runs the same model'),
    (lambda c: dataclasses.replace(c, start=dataclasses.replace(c.start, step=3)),
     r'start.step=3: .* checkpoints of steps \[4\] and 3 snapshots; the nearest are of \[2, 4\]'),
    (lambda c: dataclasses.replace(c, start=dataclasses.replace(c.start, step=2, optimizer=True)),
     'start.optimizer: of step 2 .* has a snapshot'),
    (lambda c: dataclasses.replace(c, start=StartConfig(run_dir='nowhere')),
     'start.run_dir=nowhere is not a run directory'),
], ids=['model', 'step', 'optimizer', 'run_dir'])
def test_a_start_that_does_not_fit_is_one_sentence(parent, path, tmp_path, change, words):
  with pytest.raises(UserError, match=words):
    train(change(tuned(parent, path)), RunDir(tmp_path / 'run'))
  assert not (tmp_path / 'run').exists()


def test_another_tokenizer_is_one_sentence(parent, path, tmp_path):
  tokenizers.train_bpe(['u: a: b'], 260).save(tmp_path / 'tokenizer.json')
  config = tuned(parent, path)
  sft = dataclasses.replace(config.data.sft, tokenizer=str(tmp_path / 'tokenizer.json'))
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, sft=sft))
  with pytest.raises(UserError, match='was trained with another tokenizer'):
    train(config, RunDir(tmp_path / 'run'))


def test_training_on_text_that_goes_on_from_a_run_takes_over_its_tokenizer(parent, tmp_path):
  config = continued(parent_config(tmp_path), f'{parent.path}@4')
  assert config.data.text.tokenizer == str(parent.tokenizer_json)
  assert (config.start.run_dir, config.start.step) == (str(parent.path), 4)
  longer = dataclasses.replace(config.data, sequence_length=16)
  short = continued(dataclasses.replace(config, data=longer), str(parent.path))
  assert short.data.sequence_length == 16 and short.start.step == -1


@pytest.mark.parametrize('init_from, words', [
    ('nowhere@3', 'nowhere is not a run directory'), ('nowhere@x', "'x' is no step")])
def test_what_init_from_cannot_be(init_from, words):
  with pytest.raises(UserError, match=words):
    continued(ExperimentConfig(), init_from)
