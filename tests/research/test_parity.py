"""The production step on every mesh against the same step on one device.

Parity is relative error ||a - b|| / ||b|| per leaf, from a state 20 steps in, f32 with matmul
precision highest: of gradients (an SGD step at learning rate 1) and of the AdamW update.
"""

import dataclasses
import functools

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
MESHES = {
    'data 8': MeshConfig(data=8),
    'fsdp 8': MeshConfig(data=1, fsdp=8),
    'tensor 8': MeshConfig(data=1, tensor=8),
    'data 2 fsdp 2 tensor 2': MeshConfig(data=2, fsdp=2, tensor=2),
    'fsdp 2 expert 2 tensor 2': MeshConfig(data=1, fsdp=2, expert=2, tensor=2),
}
MODEL = ModelConfig(
    vocab_size=96, context_length=32, n_layers=2, d_model=64, n_heads=16, n_kv_heads=8, d_head=8,
    d_ff=128, layer_pattern=('sliding', 'full'), window=8, qk_norm='head', qkv_bias=True,
    attention_softcap=20.0, final_softcap=30.0, tie_embeddings=False)
MODELS = {
    'dense': MODEL,
    'parallel layernorm': dataclasses.replace(
        MODEL, norm='layernorm', parallel_residual=True, mlp='gelu', mlp_bias=True, out_bias=True,
        rope=RopeConfig(fraction=0.5), tie_embeddings=True, layer_pattern=('full',)),
    'experts': dataclasses.replace(MODEL, moe=MoEConfig(n_experts=4, d_expert=32)),
}
# Learning rates are large so that rounding of parameter minus start (norm scales stand near 1)
# stays below the tolerance; both updates are linear in the learning rate.
SGD = OptimizerConfig(name='sgd', b1=0.0, peak_lr=1000.0, schedule='constant', warmup_steps=0,
                      weight_decay=0.0, clip_norm=0.0, z_weight=1e-3)
ADAMW = OptimizerConfig(name='adamw', peak_lr=3e-3, schedule='constant', warmup_steps=0,
                        z_weight=1e-3)
ADAMW_STEP = dataclasses.replace(ADAMW, peak_lr=1.0)
SPECS = {
    'embedding.tokens': P('tensor', 'fsdp'),
    'embedding.output': P('tensor', 'fsdp'),
    'blocks.attention.q': P(None, 'fsdp', 'tensor', None),
    'blocks.attention.k': P(None, 'fsdp', 'tensor', None),
    'blocks.attention.o': P(None, 'tensor', None, 'fsdp'),
    'blocks.mlp.gate': P(None, 'fsdp', 'tensor'),
    'blocks.mlp.down': P(None, 'tensor', 'fsdp'),
}
CASES = [('dense', mesh) for mesh in MESHES if 'expert' not in mesh] + [
    ('parallel layernorm', 'data 2 fsdp 2 tensor 2'), ('experts', 'fsdp 2 expert 2 tensor 2')]


def config_for(model: ModelConfig, optimizer: OptimizerConfig, mesh: MeshConfig):
  # The balance loss of experts depends on what a micro-batch holds, so there it is the batch.
  tokens = 512 if model.moe.n_experts else 64
  return ExperimentConfig(
      n_steps=100, model=model, optimizer=optimizer, mesh=mesh,
      data=DataConfig(sequence_length=32, batch_size=16),
      compute=ComputeConfig(microbatch_tokens=tokens, matmul_precision='highest', loss_chunk=48))


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
def trained(model_name: str):
  """A state 20 AdamW steps in, on one device, as NumPy arrays."""
  built = built_for(config_for(MODELS[model_name], ADAMW, MeshConfig(data=1)))
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
def update(model_name: str, optimizer: OptimizerConfig, mesh: MeshConfig):
  """Returns (parameters after one step minus before, by name; metrics; the state's shardings)."""
  start = trained(model_name)
  built = built_for(config_for(MODELS[model_name], optimizer, mesh))
  state, metrics = built.train_step()(placed(start, built), built.place_batch(batch_of(20)))
  moved = jax.tree.map(lambda new, old: np.asarray(new, np.float64) - old, state.params,
                       start.params)
  named = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(moved)}
  return named, jax.device_get(metrics), state


@pytest.mark.parametrize('optimizer', [SGD, ADAMW_STEP], ids=['gradient', 'adamw'])
@pytest.mark.parametrize('model_name, mesh_name', CASES)
def test_step_equals_one_device(model_name, mesh_name, optimizer):
  expected, expected_metrics, _ = update(model_name, optimizer, MeshConfig(data=1))
  moved, metrics, _ = update(model_name, optimizer, MESHES[mesh_name])
  assert moved.keys() == expected.keys()
  for name, want in expected.items():
    norm = np.linalg.norm(want)
    assert norm > 0, f'{name} did not move: its gradient is zero'
    error = np.linalg.norm(moved[name] - want) / norm
    assert error <= TOLERANCE, f'{name}: relative error {error:.1e}'
  for name, want in expected_metrics.items():
    assert abs(metrics[name] - want) <= TOLERANCE * max(1, abs(want)), name


def test_shardings_of_named_parameters():
  _, _, state = update('dense', ADAMW_STEP, MESHES['data 2 fsdp 2 tensor 2'])
  moments = state.optimizer[1][0].mu
  for params in (state.params, moments):
    named = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(params)}
    assert {name: leaf.sharding.spec for name, leaf in named.items() if name in SPECS} == SPECS
    # A quarter of every matrix on each device: 2-way fsdp x 2-way tensor.
    for name in SPECS:
      assert named[name].addressable_shards[0].data.size * 4 == named[name].size


def test_a_broken_gradient_is_rejected():
  """Parity must fail when one row of the batch is missing from a gradient."""
  expected, _, _ = update('dense', SGD, MeshConfig(data=1))
  built = built_for(config_for(MODELS['dense'], SGD, MeshConfig(data=1)))
  start = trained('dense')
  batch = batch_of(20)
  batch['loss_mask'][0, 0] = 0
  state, _ = built.train_step()(placed(start, built), built.place_batch(batch))
  new = np.asarray(state.params['final_norm']['scale'], np.float64)
  moved = new - start.params['final_norm']['scale']
  want = expected['final_norm.scale']
  assert np.linalg.norm(moved - want) / np.linalg.norm(want) > TOLERANCE
