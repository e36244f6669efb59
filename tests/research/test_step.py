"""The training step: micro-batches add up, the guard holds, the average follows, loss falls.

Parity as in style: relative error per leaf of parameters minus their start, f32 with matmul
precision highest; the moving average against its closed form.
"""

import dataclasses

import jax
import numpy as np
import pytest

from models.config import ModelConfig, MoEConfig
from parallelism.mesh import MeshConfig, make_mesh
from parallelism.sharding import path_name
from parallelism.topologies import compile_only_mesh
from research import build as build_lib
from research.config import ExperimentConfig
from research.data.config import DataConfig
from research.training.config import ComputeConfig, OptimizerConfig

MODEL = ModelConfig(vocab_size=48, context_length=16, n_layers=2, d_model=32, n_heads=2,
                    n_kv_heads=2, d_head=16, d_ff=48)
SGD = OptimizerConfig(name='sgd', b1=0.0, peak_lr=1000.0, schedule='constant', warmup_steps=0,
                      weight_decay=0.0, clip_norm=0.0, z_weight=1e-3)


def build(optimizer=SGD, **compute) -> build_lib.Build:
  config = ExperimentConfig(
      n_steps=50, model=MODEL, optimizer=optimizer, mesh=MeshConfig(data=1),
      data=DataConfig(sequence_length=16, batch_size=8),
      compute=ComputeConfig(matmul_precision='highest', **compute))
  mesh = make_mesh(config.mesh)
  return build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))


def batch_of(step: int) -> dict[str, np.ndarray]:
  rng = np.random.default_rng(step)
  text_BL = (rng.integers(0, 48, (8, 1)) + np.arange(17)) % 48
  mask_BL = np.ones((8, 16), np.float32)
  mask_BL[:3, 10:] = 0  # Rows with fewer counted tokens: micro-batches weigh differently.
  return {'tokens': text_BL[:, :-1].astype(np.int32), 'targets': text_BL[:, 1:].astype(np.int32),
          'segment_ids': mask_BL.astype(np.int32), 'loss_mask': mask_BL,
          'positions': np.tile(np.arange(16, dtype=np.int32), (8, 1))}


def moved(built: build_lib.Build, batch):
  state = built.init_state()
  start = jax.tree.map(np.asarray, state.params)
  state, metrics = built.train_step()(state, built.place_batch(batch))
  delta = jax.tree.map(lambda new, old: np.asarray(new, np.float64) - old, state.params, start)
  return {path_name(p): leaf for p, leaf in jax.tree.leaves_with_path(delta)}, metrics


def test_microbatches_add_up_to_the_whole_batch():
  whole, metrics = moved(build(microbatch_tokens=128), batch_of(0))
  for tokens in (16, 32):
    built = build(microbatch_tokens=tokens)
    assert built.n_micro == 128 // tokens
    parts, parts_metrics = moved(built, batch_of(0))
    for name, want in whole.items():
      assert np.linalg.norm(want) > 0
      assert np.linalg.norm(parts[name] - want) <= 1e-5 * np.linalg.norm(want), name
    for name in metrics:
      assert abs(parts_metrics[name] - metrics[name]) <= 1e-5 * max(1, abs(metrics[name])), name


@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(name):
  built = build(OptimizerConfig(name=name, warmup_steps=0, ema_decay=0.5))
  step = built.train_step()
  state, metrics = step(built.init_state(), built.place_batch(batch_of(0)))
  assert metrics['skipped'] == 0
  before = jax.tree.map(np.asarray, state)
  poisoned = batch_of(1)
  poisoned['loss_mask'][0, 0] = np.nan
  state, metrics = step(state, built.place_batch(poisoned))
  assert metrics['skipped'] == 1 and not np.isfinite(metrics['loss'])
  for part in ('params', 'optimizer', 'ema'):
    for old, new in zip(jax.tree.leaves(getattr(before, part)),
                        jax.tree.leaves(getattr(state, part)), strict=True):
      np.testing.assert_array_equal(new, old)
  assert int(state.step) == int(before.step) + 1
  state, metrics = step(state, built.place_batch(batch_of(2)))
  assert metrics['skipped'] == 0 and np.isfinite(metrics['loss'])


def test_a_batch_without_a_loss_does_not_enter_the_guard():
  built = build(OptimizerConfig(warmup_steps=0))
  step, state = built.train_step(), built.init_state()
  masked = {**batch_of(1), 'loss_mask': np.zeros((8, 16), np.float32)}
  for batch, remembered in ((batch_of(0), 1), (masked, 1), (batch_of(2), 2)):
    state, metrics = step(state, built.place_batch(batch))
    assert metrics['skipped'] == 0 and int(state.guard.remembered) == remembered


def test_moving_average_in_closed_form():
  built = build(OptimizerConfig(warmup_steps=0, ema_decay=0.75))
  step, state = built.train_step(), built.init_state()
  want = np.asarray(state.params['final_norm']['scale'], np.float64)
  for k in range(4):
    state, _ = step(state, built.place_batch(batch_of(k)))
    want = 0.75 * want + 0.25 * np.asarray(state.params['final_norm']['scale'], np.float64)
  np.testing.assert_allclose(state.ema['final_norm']['scale'], want, rtol=1e-6)


def test_loss_falls_on_a_learnable_stream():
  built = build(OptimizerConfig(peak_lr=1e-2, warmup_steps=0, schedule='constant'))
  step, state, losses = built.train_step(), built.init_state(), []
  for k in range(50):
    state, metrics = step(state, built.place_batch(batch_of(k)))
    losses.append(float(metrics['cross_entropy']))
  assert losses[0] == pytest.approx(np.log(48), abs=0.1)  # Uniform at the start.
  assert losses[-1] < 0.2


def test_dropout_draws_anew_each_step_and_not_in_evaluation():
  built = build()
  config = dataclasses.replace(built.config, model=dataclasses.replace(MODEL, dropout=0.5))
  built = build_lib.build(config, built.mesh, build_lib.resolve_numerics(config, built.mesh))
  state, batch = built.init_state(), built.place_batch(batch_of(0))
  evaluate = built.eval_step()
  first, second = (np.asarray(evaluate(state.params, batch)) for _ in range(2))
  np.testing.assert_array_equal(first, second)
  frozen = dataclasses.replace(config, optimizer=dataclasses.replace(SGD, peak_lr=0.0))
  built = build_lib.build(frozen, built.mesh, build_lib.resolve_numerics(frozen, built.mesh))
  step = built.train_step()
  state, one = step(built.init_state(), batch)
  _, two = step(state, batch)
  assert float(one['loss']) != float(two['loss'])


def test_batches_that_the_mesh_does_not_divide_are_refused():
  config = dataclasses.replace(build().config, mesh=MeshConfig(data=3, fsdp=1))
  mesh = make_mesh(config.mesh)
  with pytest.raises(ValueError, match='data.batch_size=8 is not divided by mesh.data=3'):
    build_lib.resolve_numerics(config, mesh)
  config = dataclasses.replace(build().config, mesh=MeshConfig(data=1, tensor=4))
  mesh = make_mesh(config.mesh)
  with pytest.raises(ValueError, match=r"its 'kv_heads' axis of 2 is not divided by mesh.tensor=4|"
                     r"its 'heads' axis of 2 is not divided by mesh.tensor=4"):
    build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))


def test_a_choice_that_older_numerics_lack_is_made_anew():
  built = build()
  numerics = build_lib.resolve_numerics(built.config, built.mesh)
  older = {name: choice for name, choice in numerics.items() if name != 'attention'}
  assert build_lib.build(built.config, built.mesh, older).config.model.attention == 'unrolled'


def test_the_product_of_experts_follows_the_devices_and_what_was_recorded():
  model = dataclasses.replace(MODEL, moe=MoEConfig(n_experts=4, d_expert=16))
  config = dataclasses.replace(build().config, model=model)
  mesh = make_mesh(config.mesh)
  numerics = build_lib.resolve_numerics(config, mesh)
  assert numerics['expert_product'] == 'blocks'
  recorded = build_lib.build(config, mesh, {**numerics, 'expert_product': 'ragged_dot'})
  assert recorded.config.model.moe.product == 'ragged_dot'
  with pytest.raises(ValueError, match='product=megablox is for tpu devices, these are cpu'):
    build_lib.build(config, mesh, {**numerics, 'expert_product': 'megablox'})
  pytest.importorskip('libtpu')
  tpus = compile_only_mesh('v5e:2x4', MeshConfig(data=8))
  assert build_lib.resolve_numerics(config, tpus)['expert_product'] == 'megablox'
