"""Mixture of experts against a loop over experts in NumPy float64 and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.moe import Experts, auxiliary_losses, ragged_dispatch, route

T, D, X, F, R = 9, 4, 5, 3, 2


def experts_and_tokens(seed=0):
  """Returns random tokens [T, D], expert choices, weights and expert matrices."""
  rng = np.random.default_rng(seed)
  matrices = Experts(*[rng.normal(size=shape).astype(np.float32)
                       for shape in ((X, D, F), (X, D, F), (X, F, D))])
  expert_TR = np.stack([rng.permutation(X - 1)[:R] for _ in range(T)])  # the last gets none
  weight_TR = rng.uniform(size=(T, R)).astype(np.float32)
  return rng.normal(size=(T, D)).astype(np.float32), expert_TR, weight_TR, matrices


def test_dispatch_equals_a_loop_over_experts_and_so_do_its_gradients():
  x_TD, expert_TR, weight_TR, matrices = experts_and_tokens()

  def loop(x_TD, weight_TR, matrices):
    out_TD = jnp.zeros((T, D))
    for e in range(X):
      hidden = jax.nn.silu(x_TD @ matrices.gate_XDF[e]) * (x_TD @ matrices.up_XDF[e])
      share_T = jnp.sum(jnp.where(expert_TR == e, weight_TR, 0), axis=1)
      out_TD += share_T[:, None] * (hidden @ matrices.down_XFD[e])
    return out_TD

  def dispatched(x_TD, weight_TR, matrices):
    return ragged_dispatch(x_TD, expert_TR, weight_TR, matrices, jax.nn.silu)

  cotangent = np.random.default_rng(1).normal(size=(T, D)).astype(np.float32)

  def value_and_gradients(f):
    out, vjp = jax.vjp(f, x_TD, weight_TR, matrices)
    return out, vjp(cotangent)

  got = jax.jit(lambda: value_and_gradients(dispatched))()
  expected = jax.jit(lambda: value_and_gradients(loop))()
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
    assert np.abs(b).max() > 0
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
  got = auxiliary_losses(logits_TX, p_TX, expert_TR, real_T)
  exact_TX = np.exp(logits_TX[:6].astype(np.float64))
  total_T = exact_TX.sum(1)
  share_X = np.bincount(np.asarray(expert_TR[:6]).ravel(), minlength=X) / (6 * R)
  mean_X = (exact_TX / total_T[:, None]).mean(0)
  np.testing.assert_allclose(got.balance, X * (share_X * mean_X).sum(), rtol=1e-5)
  np.testing.assert_allclose(got.router_z, (np.log(total_T) ** 2).mean(), rtol=1e-5)


def test_balance_is_one_when_uniform_and_the_number_of_experts_when_collapsed():
  uniform_TX = np.zeros((X, X), np.float32)
  each_TR = np.arange(X)[:, None]
  losses = auxiliary_losses(uniform_TX, uniform_TX + 1 / X, each_TR, None)
  np.testing.assert_allclose(losses.balance, 1, rtol=1e-6)
  one_TX = np.eye(X, dtype=np.float32)[np.zeros(X, int)]
  collapsed = auxiliary_losses(50 * one_TX, one_TX, np.zeros((X, 1), int), None)
  np.testing.assert_allclose(collapsed.balance, X, rtol=1e-6)
