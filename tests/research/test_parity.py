"""The production step on every mesh against the same step on one device.

Parity is relative error ||a - b|| / ||b|| per leaf, from a state 20 steps in, f32 with matmul
precision highest: of gradients (an SGD step at learning rate 1) and of the AdamW update.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from models.config import ModelConfig, MoEConfig, RopeConfig
from parallelism.mesh import MeshConfig, make_mesh
from parallelism.sharding import path_name
from research import build as build_lib
from research.config import ExperimentConfig
from research.data.config import DataConfig
from research.training.config import ComputeConfig, OptimizerConfig

TOLERANCE = 1e-5
MODEL = ModelConfig(
    vocab_size=96, context_length=32, n_layers=2, d_model=64, n_heads=16, n_kv_heads=8, d_head=8,
    d_ff=128, layer_pattern=('sliding', 'full'), window=8, qk_norm='head', qkv_bias=True,
    attention_softcap=20.0, final_softcap=30.0, tie_embeddings=False)
MODELS = {
    'dense': MODEL,
    'parallel layernorm': dataclasses.replace(
        MODEL, norm='layernorm', parallel_residual=True, mlp='gelu', mlp_bias=True, out_bias=True,
        rope=RopeConfig(fraction=0.5), tie_embeddings=True, layer_pattern=('full',)),
    'post-norm alibi': dataclasses.replace(
        MODEL, norm_placement='post', qk_norm='projection', positions='alibi', mlp='xielu',
        qkv_bias=False, tie_embeddings=True),
    'five layers': dataclasses.replace(MODEL, n_layers=5, dropout=0.1, remat='full'),
    'experts': dataclasses.replace(MODEL, moe=MoEConfig(n_experts=8, d_expert=32)),
}


class Case(NamedTuple):
  """A model, a mesh and how the step is computed on it."""

  model: str
  mesh: MeshConfig
  compute: tuple[tuple[str, Any], ...] = ()

  def __str__(self) -> str:
    sizes = [f'{name} {size}' for name, size in dataclasses.asdict(self.mesh).items() if size > 1]
    return ' '.join([self.model, *sizes, *(f'{name}={value}' for name, value in self.compute)])


def case(model: str, compute: dict[str, Any] = {}, **axes: int) -> Case:
  return Case(model, MeshConfig(**{'data': 1, **axes}), tuple(compute.items()))


CASES = [
    # One axis at a time.
    case('dense', data=8),
    case('dense', fsdp=8),
    case('dense', {'gather': 'step', 'sequence': False}, fsdp=2, tensor=4),
    case('dense', {'sequence': False}, tensor=8),
    case('dense', tensor=8),
    case('five layers', {'pipeline': 'gpipe'}, stage=4),
    case('five layers', stage=4),
    case('five layers', {'pipeline': 'interleaved', 'pipeline_chunks': 2}, stage=2),
    case('dense', context=4),
    case('dense', {'context': 'all_to_all'}, context=8),
    case('experts', expert=8),
    # Mixes.
    case('dense', data=2, fsdp=2, tensor=2),
    case('parallel layernorm', data=2, fsdp=2, tensor=2),
    case('post-norm alibi', {'context': 'all_to_all'}, fsdp=2, context=2, tensor=2),
    case('post-norm alibi', context=2, tensor=2, data=2),
    case('five layers', stage=2, fsdp=2, tensor=2),
    case('five layers', {'gather': 'step', 'pipeline': 'interleaved', 'pipeline_chunks': 2,
                         'context': 'all_to_all'}, stage=2, context=2, fsdp=2),
    case('experts', expert=4, data=2),
    case('experts', expert=2, fsdp=2, tensor=2),
    case('experts', {'context': 'all_to_all'}, stage=2, expert=2, context=2),
]
# Learning rates are large so that rounding of parameter minus start (norm scales stand near 1)
# stays below the tolerance; both updates are linear in the learning rate.
SGD = OptimizerConfig(name='sgd', b1=0.0, peak_lr=1000.0, schedule='constant', warmup_steps=0,
                      weight_decay=0.0, clip_norm=0.0, z_weight=1e-3)
ADAMW = OptimizerConfig(name='adamw', peak_lr=3e-3, schedule='constant', warmup_steps=0,
                        z_weight=1e-3)
ADAMW_STEP = dataclasses.replace(ADAMW, peak_lr=1.0)
GATHERED = ('fsdp', 'expert', 'context', 'stage')
SPECS = {
    'embedding.tokens': P(('tensor',), GATHERED),
    'embedding.output': P(('tensor',), GATHERED),
    'blocks.attention.q': P(None, GATHERED, ('tensor',), None),
    'blocks.attention.k': P(None, GATHERED, ('tensor',), None),
    'blocks.attention.o': P(None, ('tensor',), None, GATHERED),
    'blocks.mlp.gate': P(None, GATHERED, ('tensor',)),
    'blocks.mlp.down': P(None, ('tensor',), GATHERED),
}


def config_for(case: Case, optimizer: OptimizerConfig) -> ExperimentConfig:
  model = MODELS[case.model]
  # The balance loss of experts depends on what a micro-batch holds, so there it is the batch; a
  # pipeline makes the same micro-batches of it on any mesh.
  tokens = 512 if model.moe.n_experts else 64
  compute = {'microbatch_tokens': tokens, 'matmul_precision': 'highest', 'loss_chunk': 48}
  return ExperimentConfig(
      n_steps=100, model=model, optimizer=optimizer, mesh=case.mesh,
      data=DataConfig(sequence_length=32, batch_size=16),
      compute=ComputeConfig(**{**compute, **dict(case.compute)}))


def built_for(config: ExperimentConfig) -> build_lib.Build:
  mesh = make_mesh(config.mesh)
  return build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))


def batch_of(step: int) -> dict[str, np.ndarray]:
  """Two packed documents a row, the last tokens padding; learnable: most tokens count up."""
  rng = np.random.default_rng(step)
  start_B1 = rng.integers(0, 96, (16, 1))
  text_BL = (start_B1 + np.arange(33) * rng.integers(1, 3, (16, 1))) % 96
  text_BL = np.where(rng.random(text_BL.shape) < 0.1, rng.integers(0, 96, text_BL.shape), text_BL)
  segment_L = np.repeat([1, 2, 0], [14, 12, 6])
  position_L = np.concatenate([np.arange(14), np.arange(12), np.arange(6)])
  tile = lambda x_L, dtype: np.tile(x_L, (16, 1)).astype(dtype)
  return {'tokens': text_BL[:, :-1].astype(np.int32), 'targets': text_BL[:, 1:].astype(np.int32),
          'segment_ids': tile(segment_L, np.int32), 'positions': tile(position_L, np.int32),
          'loss_mask': tile(segment_L > 0, np.float32)}


@functools.cache
def trained(model: str):
  """A state 20 AdamW steps in, on one device, as NumPy arrays."""
  built = built_for(config_for(case(model), ADAMW))
  state, step = built.init_state(), built.train_step()
  for k in range(20):
    state, _ = step(state, built.place_batch(batch_of(k)))
  return jax.tree.map(np.asarray, state)


def placed(start, built: build_lib.Build):
  """Returns the trained state on a build's mesh, moments only where the optimizer has the same."""
  target = built.abstract_state
  same = jax.tree.structure(start.optimizer) == jax.tree.structure(target.optimizer)
  moments = start.optimizer if same else jax.tree.map(
      lambda leaf: np.zeros(leaf.shape, leaf.dtype), target.optimizer)
  return jax.tree.map(lambda value, leaf: jax.device_put(value, leaf.sharding),
                      start._replace(optimizer=moments), target)


@functools.cache
def update(case: Case, optimizer: OptimizerConfig):
  """Returns (parameters after one step minus before, by name; metrics; the state)."""
  start = trained(case.model)
  built = built_for(config_for(case, optimizer))
  state, metrics = built.train_step()(placed(start, built), built.place_batch(batch_of(20)))
  moved = jax.tree.map(lambda new, old: np.asarray(new, np.float64) - old, state.params,
                       start.params)
  named = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(moved)}
  return named, jax.device_get(metrics), state


def check_equal(case_: Case, optimizer: OptimizerConfig) -> None:
  expected, expected_metrics, _ = update(case(case_.model), optimizer)
  moved, metrics, _ = update(case_, optimizer)
  expected_metrics, metrics = dict(expected_metrics), dict(metrics)
  assert moved.keys() == expected.keys()
  for name, want in expected.items():
    norm = np.linalg.norm(want)
    assert norm > 0, f'{name} did not move: its gradient is zero'
    error = np.linalg.norm(moved[name] - want) / norm
    assert error <= TOLERANCE, f'{name}: relative error {error:.1e}'
  if 'expert_rounds' in metrics:  # one device exchanges nothing
    assert expected_metrics.pop('expert_rounds') == 0 and metrics.pop('expert_rounds') >= 1
  for name, want in expected_metrics.items():
    assert abs(metrics[name] - want) <= TOLERANCE * max(1, abs(want)), name


@pytest.mark.parametrize('case_', CASES, ids=str)
def test_gradients_equal_one_device(case_):
  check_equal(case_, SGD)


@pytest.mark.slow
@pytest.mark.parametrize('case_', CASES[1::2], ids=str)
def test_updates_of_adamw_equal_one_device(case_):
  check_equal(case_, ADAMW_STEP)


def test_shardings_of_named_parameters():
  _, _, state = update(case('dense', data=2, fsdp=2, tensor=2), ADAMW_STEP)
  moments = state.optimizer[1][0].mu
  for params in (state.params, moments):
    named = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    assert {name: leaf.sharding.spec for name, leaf in named.items() if name in SPECS} == SPECS
    # A quarter of every matrix on each device: 2-way fsdp x 2-way tensor.
    for name in SPECS:
      assert named[name].addressable_shards[0].data.size * 4 == named[name].size


@pytest.mark.parametrize('axes, share', [
    ({'fsdp': 8}, 8), ({'stage': 2, 'fsdp': 2, 'tensor': 2}, 8), ({'data': 2, 'context': 4}, 4),
    ({'expert': 4, 'data': 2}, 4)], ids=str)
def test_parameters_and_moments_are_split_over_all_axes_but_data(axes, share):
  model = 'experts' if 'expert' in axes else 'dense'
  built = built_for(config_for(case(model, **axes), ADAMW))
  for path, leaf in jax.tree.leaves_with_path((built.params, built.abstract_state.optimizer)):
    names = path_name(path)
    if leaf.ndim >= 3 and 'bias' not in names:  # stacked matrices
      assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * share == np.prod(leaf.shape), names


def test_a_broken_gradient_is_rejected():
  """Parity must fail when one token of the batch is missing from a gradient."""
  expected, _, _ = update(case('dense'), SGD)
  built = built_for(config_for(case('dense'), SGD))
  start = trained('dense')
  batch = batch_of(20)
  batch['loss_mask'][0, 0] = 0
  state, _ = built.train_step()(placed(start, built), built.place_batch(batch))
  new = np.asarray(state.params['final_norm']['scale'], np.float64)
  moved = new - start.params['final_norm']['scale']
  want = expected['final_norm.scale']
  assert np.linalg.norm(moved - want) / np.linalg.norm(want) > TOLERANCE


@pytest.mark.slow
def test_loss_of_thirty_steps_does_not_depend_on_the_mesh():
  losses = {}
  for case_ in (case('five layers'), case('five layers', data=2, fsdp=2, tensor=2),
                case('five layers', stage=2, fsdp=2, tensor=2)):
    built = built_for(config_for(case_, ADAMW))
    state, step, losses[case_] = built.init_state(), built.train_step(), []
    for k in range(30):
      state, metrics = step(state, built.place_batch(batch_of(k)))
      losses[case_].append(float(metrics['loss']))
  expected, *others = losses.values()
  assert expected[-1] < 0.8 * expected[0]
  for other in others:
    np.testing.assert_allclose(other, expected, rtol=1e-4)
