"""Optimizers, decay masks and schedules against closed forms written out in NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.config import ModelConfig, MoEConfig
from parallelism.sharding import path_name
from research.training.config import OPTIMIZERS, OptimizerConfig
from research.training.optimizers import decay_mask, make_optimizer, schedule

CONFIG = ModelConfig(vocab_size=32, context_length=16, n_layers=2, d_model=16, n_heads=2,
                     n_kv_heads=1, d_head=8, d_ff=24, qkv_bias=True, out_bias=True, mlp_bias=True,
                     qk_norm='head', tie_embeddings=False, mlp='gelu', norm='layernorm',
                     positions='learned')


def masked(config: ModelConfig, decay_embeddings: bool) -> dict[str, bool]:
  mask = decay_mask(transformer.logical_axes(config), decay_embeddings)
  return {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(mask)}


def test_decay_reaches_matrices_and_nothing_else():
  mask = masked(CONFIG, decay_embeddings=False)
  matrices = {'blocks.attention.q', 'blocks.attention.k', 'blocks.attention.v',
              'blocks.attention.o', 'blocks.mlp.up', 'blocks.mlp.down'}
  assert {name for name, decayed in mask.items() if decayed} == matrices
  added = {name for name, decayed in masked(CONFIG, True).items() if decayed} - matrices
  assert {name.split('.')[0] for name in added} == {'embedding'} and len(added) == 3


def test_decay_reaches_experts_and_the_router():
  moe = dataclasses.replace(CONFIG, moe=MoEConfig(n_experts=4, d_expert=8), mlp='swiglu',
                            mlp_bias=False)
  mask = {name: decayed for name, decayed in masked(moe, False).items() if '.mlp.' in name}
  assert mask and all(mask.values()), mask


@pytest.mark.parametrize('name, expected', [
    # peak 1, 4 warm-up steps of 20; values at steps 0, 3, 4, 12 and 20.
    ('constant', [.25, 1, 1, 1, 1]),
    ('linear', [.25, 1, 1, 1 - .9 * 8 / 16, .1]),
    ('cosine', [.25, 1, 1, .1 + .9 * .5, .1]),
    ('wsd', [.25, 1, 1, 1, .1]),
    ('inverse_sqrt', [.25, 1, 1, np.sqrt(4 / 12), np.sqrt(4 / 20)]),
])
def test_schedule_values(name, expected):
  rate = schedule(OptimizerConfig(peak_lr=1.0, schedule=name, warmup_steps=4, final_lr_fraction=.1,
                                  decay_fraction=.25), n_steps=20)
  got = [float(rate(jnp.int32(step))) for step in (0, 3, 4, 12, 20)]
  np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_wsd_decays_over_its_last_share():
  rate = schedule(OptimizerConfig(peak_lr=2.0, schedule='wsd', warmup_steps=0, decay_fraction=.25),
                  n_steps=20)
  assert [float(rate(jnp.int32(s))) for s in (0, 15, 17, 20)] == pytest.approx([2, 2, 1.2, 0])


def problem(config: OptimizerConfig):
  axes = {'kernel': ('embed', 'mlp'), 'scale': ('embed',)}
  rng = np.random.default_rng(0)
  params = {'kernel': rng.normal(size=(4, 6)).astype(np.float32),
            'scale': rng.normal(size=4).astype(np.float32)}
  grads = [jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
           for _ in range(3)]
  optimizer = make_optimizer(config, axes)
  state = optimizer.init(params)
  moved = params
  for grad in grads:
    updates, state = optimizer.update(grad, state, moved)
    moved = jax.tree.map(lambda p, u: p + config.peak_lr * u, moved, updates)
  return params, grads, moved


def test_adamw_equals_the_paper():
  """Loshchilov & Hutter 2019, algorithm 2, in float64, with global-norm clipping before it."""
  config = OptimizerConfig(peak_lr=.01, weight_decay=.1, clip_norm=1.0, b1=.9, b2=.95)
  params, grads, moved = problem(config)
  for name, decay in (('kernel', .1), ('scale', 0.)):
    p, m, v = params[name].astype(np.float64), 0., 0.
    for t, grad in enumerate(grads, 1):
      norm = np.sqrt(sum((g.astype(np.float64)**2).sum() for g in grad.values()))
      g = grad[name] * min(1, 1 / norm)
      m, v = .9 * m + .1 * g, .95 * v + .05 * g * g
      step = (m / (1 - .9**t)) / (np.sqrt(v / (1 - .95**t)) + 1e-8)
      p = p - .01 * (step + decay * p)
    np.testing.assert_allclose(moved[name], p, rtol=1e-5)


def test_lion_equals_the_paper():
  """Chen et al. 2023, algorithm 2."""
  config = OptimizerConfig(name='lion', peak_lr=.01, weight_decay=.1, clip_norm=0., b1=.9, b2=.99)
  params, grads, moved = problem(config)
  p, m = params['kernel'].astype(np.float64), 0.
  for grad in grads:
    g = grad['kernel'].astype(np.float64)
    p, m = p - .01 * (np.sign(.9 * m + .1 * g) + .1 * p), .99 * m + .01 * g
  np.testing.assert_allclose(moved['kernel'], p, rtol=1e-5)


def test_sgd_with_momentum_in_closed_form():
  config = OptimizerConfig(name='sgd', peak_lr=.1, weight_decay=0., clip_norm=0., b1=.5)
  params, (a, b, c), moved = problem(config)
  want = params['scale'] - .1 * (1.75 * a['scale'] + 1.5 * b['scale'] + c['scale'])
  np.testing.assert_allclose(moved['scale'], want, rtol=1e-5)


def test_muon_update_of_a_matrix_is_nearly_orthogonal():
  """Jordan 2024: Newton-Schulz brings all singular values near 1; RMS-matched scale of 0.2."""
  config = OptimizerConfig(name='muon', peak_lr=1., weight_decay=0., clip_norm=0.)
  params, _, moved = problem(config)
  delta = np.asarray(moved['kernel'] - params['kernel'], np.float64) / 3  # three updates
  singular = np.linalg.svd(delta, compute_uv=False)
  # Each update: 0.2 sqrt(max(4, 6)) times singular values near 1 (0.7 to 1.2 by design), in three
  # directions that need not agree.
  assert 0.2 * np.sqrt(6) * 0.2 < singular.max() < 0.2 * np.sqrt(6) * 1.3


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_without_gradients_matrices_decay_and_nothing_else_moves(name):
  """Closed form: at learning rate 1 and zero gradients a decayed parameter moves by -decay * p."""
  axes = {'kernel': ('embed', 'mlp'), 'scale': ('embed',), 'table': ('vocab', 'embed')}
  params = {'kernel': jnp.full((4, 6), 2.0), 'scale': jnp.full(4, 2.0), 'table': jnp.full((5, 4), 2.)}
  optimizer = make_optimizer(OptimizerConfig(name=name, weight_decay=0.1), axes)
  zeros = jax.tree.map(jnp.zeros_like, params)
  updates, _ = optimizer.update(zeros, optimizer.init(params), params)
  np.testing.assert_allclose(updates['kernel'], -0.2, rtol=1e-6)
  for rest in ('scale', 'table'):
    np.testing.assert_array_equal(updates[rest], 0)


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_every_optimizer_moves_every_leaf_of_a_real_model(name):
  axes = transformer.logical_axes(CONFIG)
  params = transformer.init(CONFIG, 0)
  optimizer = make_optimizer(OptimizerConfig(name=name), axes)
  grads = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
  updates, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  for path, leaf in jax.tree.leaves_with_path(updates):
    # Adafactor scales by the parameter's own size, with a floor, so zeros move too.
    assert np.all(np.isfinite(leaf)) and np.any(leaf != 0), path_name(path)


def test_bfloat16_first_moment():
  config = OptimizerConfig(moment_dtype='bfloat16')
  axes = {'kernel': ('embed', 'mlp')}
  state = make_optimizer(config, axes).init({'kernel': jnp.ones((4, 4))})
  dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(state) if leaf.ndim == 2}
  assert dtypes == {'bfloat16', 'float32'}
