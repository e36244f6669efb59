"""Mixture of experts against a loop over experts in NumPy float64 and closed forms."""

import functools

import jax
from jax.test_util import check_grads
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig, MoEConfig
from models.dispatch import (
  Dispatched, Experts, capacity, capacity_dispatch, configured_dispatch, gathered,
  ragged_dispatch,
)
from models.kernels import grouped
from models.moe import auxiliary_losses, route
from models.transformer import Seams, apply, build, init

T, D, X, F, R = 9, 4, 5, 3, 2
NOTHING_DROPPED = Dispatched(None, np.float32(0), np.float32(0))


def experts_and_tokens(seed=0):
  """Returns random tokens [T, D], expert choices, weights and expert matrices."""
  rng = np.random.default_rng(seed)
  matrices = Experts(*[rng.normal(size=shape).astype(np.float32)
                       for shape in ((X, D, F), (X, D, F), (X, F, D))])
  expert_TR = np.stack([rng.permutation(X - 1)[:R] for _ in range(T)])  # the last gets none
  weight_TR = rng.uniform(size=(T, R)).astype(np.float32)
  return rng.normal(size=(T, D)).astype(np.float32), expert_TR, weight_TR, matrices


PRODUCTS = {
  'ragged_dot': grouped.ragged_dot, 'blocks': grouped.by_blocks,
  # Interpreted, it leaves rows of no expert as they are born: not numbers.
  'megablox': functools.partial(grouped.megablox, interpret=True),
}


@pytest.mark.parametrize('product', PRODUCTS)
@pytest.mark.parametrize('n_padding', [0, 3, T])
def test_dispatch_equals_a_loop_over_experts_and_so_do_its_gradients(n_padding, product):
  x_TD, expert_TR, weight_TR, matrices = experts_and_tokens()
  expert_TR[T - n_padding :] = X  # no expert

  def loop(x_TD, weight_TR, matrices):
    out_TD = jnp.zeros((T, D))
    for e in range(X):
      hidden = jax.nn.silu(x_TD @ matrices.gate_XDF[e]) * (x_TD @ matrices.up_XDF[e])
      share_T = jnp.sum(jnp.where(expert_TR == e, weight_TR, 0), axis=1)
      out_TD += share_T[:, None] * (hidden @ matrices.down_XFD[e])
    return out_TD

  def dispatched(x_TD, weight_TR, matrices):
    options = {'product': PRODUCTS[product]}
    return ragged_dispatch(x_TD, expert_TR, weight_TR, matrices, jax.nn.silu, **options).out_TD

  cotangent = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)

  def value_and_gradients(f):
    out, vjp = jax.vjp(f, x_TD, weight_TR, matrices)
    return out, vjp(cotangent)

  got = jax.jit(lambda: value_and_gradients(dispatched))()
  expected = jax.jit(lambda: value_and_gradients(loop))()
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert np.abs(b).max() > 0 or n_padding == T
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('normalize', [True, False])
def test_routing_keeps_the_largest_probabilities(normalize):
  logits_TX = np.random.default_rng(0).normal(size=(T, X)).astype(np.float32)
  p_TX, expert_TR, weight_TR = route(logits_TX, R, normalize)
  exact_TX = np.exp(logits_TX.astype(np.float64))
  exact_TX /= exact_TX.sum(1, keepdims=True)
  order_TR = np.argsort(-exact_TX, axis=1)[:, :R]
  top_TR = np.take_along_axis(exact_TX, order_TR, axis=1)
  np.testing.assert_array_equal(expert_TR, order_TR)
  np.testing.assert_allclose(p_TX, exact_TX, rtol=1e-5)
  expected_TR = top_TR / top_TR.sum(1, keepdims=True) if normalize else top_TR
  np.testing.assert_allclose(weight_TR, expected_TR, rtol=1e-5)


def test_auxiliary_losses_equal_the_papers_formulas():
  logits_TX = np.random.default_rng(0).normal(size=(T, X)).astype(np.float32)
  p_TX, expert_TR, _ = route(logits_TX, R, True)
  real_T = np.array([1] * 6 + [0] * 3)
  got = auxiliary_losses(logits_TX, p_TX, expert_TR, real_T, NOTHING_DROPPED)
  exact_TX = np.exp(logits_TX[:6].astype(np.float64))
  total_T = exact_TX.sum(1)
  share_X = np.bincount(np.asarray(expert_TR[:6]).ravel(), minlength=X) / (6 * R)
  mean_X = (exact_TX / total_T[:, None]).mean(0)
  np.testing.assert_allclose(got.balance, X * (share_X * mean_X).sum(), rtol=1e-5)
  np.testing.assert_allclose(got.router_z, (np.log(total_T) ** 2).mean(), rtol=1e-5)
  np.testing.assert_allclose(got.max_load, X * share_X.max(), rtol=1e-6)
  assert got.dropped == got.rounds == 0


def test_balance_is_one_when_uniform_and_the_number_of_experts_when_collapsed():
  uniform_TX = np.zeros((X, X), np.float32)
  each_TR = np.arange(X)[:, None]
  losses = auxiliary_losses(uniform_TX, uniform_TX + 1 / X, each_TR, None, NOTHING_DROPPED)
  np.testing.assert_allclose([losses.balance, losses.max_load], 1, rtol=1e-6)
  one_TX = np.eye(X, dtype=np.float32)[np.zeros(X, int)]
  collapsed = auxiliary_losses(
    50 * one_TX, one_TX, np.zeros((X, 1), int), None, NOTHING_DROPPED
  )
  np.testing.assert_allclose([collapsed.balance, collapsed.max_load], X, rtol=1e-6)


def test_shares_of_tokens_in_parts_add_up_to_the_whole():
  logits_TX = np.random.default_rng(0).normal(size=(T, X)).astype(np.float32)
  p_TX, expert_TR, _ = route(logits_TX, R, True)
  real_T = np.array([1] * 6 + [0] * 3)
  whole = auxiliary_losses(logits_TX, p_TX, expert_TR, real_T, Dispatched(None, 5.0, 2.0))
  counts_X = np.bincount(np.asarray(expert_TR[:6]).ravel(), minlength=X) / R
  parts = [auxiliary_losses(logits_TX[part], p_TX[part], expert_TR[part], real_T[part],
                            Dispatched(None, n_dropped, 2.0), lambda tree: (6.0, counts_X))
           for part, n_dropped in ((slice(0, 4), 1.0), (slice(4, 9), 4.0))]
  assert min(min(part) for part in parts) > 0
  for name, total in whole._asdict().items():
    np.testing.assert_allclose(sum(getattr(part, name) for part in parts), total, rtol=1e-6,
                               err_msg=name)


def capacity_loop(config, x_TD, expert_TR, weight_TR, matrices):
  """Returns outputs and the number dropped: first choices first, then earlier tokens first."""
  n_slots = int(np.ceil(config.capacity_factor * T * R / X))
  out_TD, taken_X, n_dropped = np.zeros((T, D)), np.zeros(X, int), 0
  gate_XDF, up_XDF, down_XFD = (np.asarray(w, np.float64) for w in matrices)
  for r in range(R):
    for t in range(T):
      e = expert_TR[t, r]
      if e == X:
        continue
      if taken_X[e] == n_slots:
        n_dropped += 1
        continue
      taken_X[e] += 1
      gate = x_TD[t] @ gate_XDF[e]
      hidden = gate / (1 + np.exp(-gate)) * (x_TD[t] @ up_XDF[e])
      out_TD[t] += weight_TR[t, r] * (hidden @ down_XFD[e])
  return out_TD, n_dropped


@pytest.mark.parametrize('factor', [0.3, 0.75, 1.25, 100.0])
@pytest.mark.parametrize('routing', ['random', 'one', 'padded'])
def test_capacity_equals_a_loop_over_choices(factor, routing):
  x_TD, expert_TR, weight_TR, matrices = experts_and_tokens()
  if routing == 'one':
    expert_TR[:] = [3, 1]
  if routing == 'padded':
    expert_TR[::2] = X
  config = MoEConfig(n_experts=X, top_k=R, capacity_factor=factor)
  dispatch = configured_dispatch(config)
  got = jax.jit(lambda: dispatch(x_TD, expert_TR, weight_TR, matrices, jax.nn.silu))()
  expected_TD, n_dropped = capacity_loop(config, x_TD, expert_TR, weight_TR, matrices)
  np.testing.assert_allclose(got.out_TD, expected_TD, rtol=1e-4, atol=1e-5)
  assert got.n_dropped == n_dropped
  assert factor not in (0.3, 100.0) or (n_dropped > 0) == (factor == 0.3)


def test_gradients_through_slots_are_those_of_finite_differences():
  x_TD, expert_TR, weight_TR, matrices = experts_and_tokens()
  dispatch = capacity_dispatch(MoEConfig(n_experts=X, top_k=R, capacity_factor=0.75))

  @jax.jit
  def outputs(*moving):
    return dispatch(moving[0], expert_TR, moving[1], moving[2], jnp.tanh).out_TD

  moving = (x_TD, weight_TR, matrices)
  check_grads(outputs, moving, 1, ['rev'], atol=2e-2, rtol=2e-2)
  gradients = jax.grad(lambda moving: jnp.sum(outputs(*moving) ** 2))(moving)
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradients))


def test_capacity_counts_exactly_and_never_beyond_the_tokens():
  def slots(factor, n_tokens, n_experts):
    return capacity(MoEConfig(n_experts=n_experts, top_k=2, capacity_factor=factor), n_tokens)

  assert slots(1.0, 16, 8) == 4 and slots(1.0, 17, 8) == 5
  assert slots(1.1, 100, 22) == 10  # 1.1 * 100 * 2 / 22, which floats put above 10
  assert slots(50.0, 16, 8) == 16


def test_backward_of_a_gather_adds_up_what_was_used():
  x_SD = jnp.asarray(np.random.default_rng(0).normal(size=(3, D)), jnp.float32)
  source_N, used_SK = np.array([2, 0, 2, 3]), np.array([[1, 4], [4, 4], [0, 2]])
  g_ND = jnp.arange(4 * D, dtype=jnp.float32).reshape(4, D)
  out_ND, vjp = jax.vjp(lambda x: gathered(x, source_N, used_SK), x_SD)
  np.testing.assert_array_equal(out_ND, np.stack([x_SD[2], x_SD[0], x_SD[2], np.zeros(D)]))
  np.testing.assert_array_equal(vjp(g_ND)[0], np.stack([g_ND[1], np.zeros(D), g_ND[0] + g_ND[2]]))


def test_seams_reach_the_layers_and_figures_are_summed_over_them():
  config = ModelConfig(
    vocab_size=16, context_length=8, n_layers=2, d_model=8, n_heads=2, n_kv_heads=2, d_head=4,
    moe=MoEConfig(n_experts=4, d_expert=4, capacity_factor=0.25),
  )
  totals = []

  def total(tree):
    totals.append(tree)
    return tree

  tokens_BL = np.arange(12).reshape(2, 6)
  params = init(config, 0)
  _, aux = apply(build(config, Seams(token_sum=total)), params)(tokens_BL, np.ones((2, 6), int))
  assert len(totals) == config.n_layers
  # Each expert takes ceil(0.25 * 12 * 2 / 4) = 2 of the 24 choices of 12 tokens.
  assert 2 * (24 - 8) / 24 <= float(aux.dropped) <= 2 * (24 - 2) / 24
  assert 2 <= float(aux.max_load) <= 2 * 4

  def nowhere(x_TD, expert_TR, weight_TR, experts, activation):
    return jnp.zeros_like(x_TD), jnp.float32(6), jnp.float32(3)

  _, aux = apply(build(config, Seams(expert_dispatch=nowhere)), params)(tokens_BL)
  assert (float(aux.dropped), float(aux.rounds)) == (2 * 6 / 24, 2 * 3)
