"""Cross-entropy sums and gradients against closed forms in NumPy float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.loss import cross_entropy, token_log_probs

T, D, V = 11, 5, 7


def inputs(seed=0):
  """Returns hidden states, unembedding, targets and weights, some of them zero."""
  rng = np.random.default_rng(seed)
  hidden_TD = rng.normal(size=(T, D)).astype(np.float32)
  unembedding_VD = rng.normal(size=(V, D)).astype(np.float32)
  weights_T = rng.uniform(size=T).astype(np.float32)
  weights_T[[2, 7]] = 0
  return hidden_TD, unembedding_VD, rng.integers(0, V, T), weights_T


def witness(hidden_TD, unembedding_VD, targets_T, weights_T, z_weight=0.0, softcap=0.0):
  """Returns loss, z and correct sums, d_hidden and d_unembedding, token by token."""
  hidden_TD, unembedding_VD = hidden_TD.astype(np.float64), unembedding_VD.astype(np.float64)
  loss = z = correct = 0.0
  d_hidden, d_unembedding = np.zeros_like(hidden_TD), np.zeros_like(unembedding_VD)
  for t in range(len(hidden_TD)):
    raw = unembedding_VD @ hidden_TD[t]
    logits = softcap * np.tanh(raw / softcap) if softcap else raw
    lse = np.log(np.exp(logits).sum())
    w = float(weights_T[t])
    z += w * z_weight * lse**2
    loss += w * (lse - logits[targets_T[t]]) + w * z_weight * lse**2
    correct += w * (np.argmax(logits) == targets_T[t])
    p = np.exp(logits - lse)
    d = w * (p - np.eye(V)[targets_T[t]] + 2 * z_weight * lse * p)
    if softcap:
      d = d / np.cosh(raw / softcap) ** 2
    d_hidden[t] = d @ unembedding_VD
    d_unembedding += np.outer(d, hidden_TD[t])
  return (loss, z, correct), d_hidden, d_unembedding


@pytest.mark.parametrize('chunk', [4, 64])
@pytest.mark.parametrize('options', [{}, dict(z_weight=0.1), dict(z_weight=0.02, softcap=1.5)])
def test_sums_and_gradients_equal_numpy(chunk, options):
  args = inputs()
  sums, d_hidden, d_unembedding = witness(*args, **options)

  def loss(hidden_TD, unembedding_VD):
    out = cross_entropy(hidden_TD, unembedding_VD, *args[2:], chunk=chunk, **options)
    return 3.0 * out.loss_sum, out

  gradients, got = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(*args[:2])
  np.testing.assert_allclose(got, sums, rtol=2e-6)
  np.testing.assert_allclose(gradients[0], 3 * d_hidden, rtol=2e-5, atol=2e-6)
  np.testing.assert_allclose(gradients[1], 3 * d_unembedding, rtol=2e-5, atol=2e-6)
  alone = cross_entropy(*args, chunk=chunk, **options)
  np.testing.assert_allclose(alone, sums, rtol=2e-6)


@pytest.mark.parametrize('chunk', [4, 64])
def test_tokens_of_zero_weight_contribute_nothing_whatever_their_target(chunk):
  hidden_TD, unembedding_VD, targets_T, weights_T = inputs()
  garbage_T = targets_T.copy()
  garbage_T[[2, 7]] = [-5, 10**6]

  def gradients(targets_T):
    def loss(hidden_TD, unembedding_VD):
      out = cross_entropy(hidden_TD, unembedding_VD, targets_T, weights_T, chunk=chunk)
      return out.loss_sum, out
    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden_TD, unembedding_VD)

  got, expected = gradients(garbage_T), gradients(targets_T)
  jax.tree.map(np.testing.assert_array_equal, got, expected)
  np.testing.assert_array_equal(np.asarray(got[0][0])[[2, 7]], 0)


def test_only_the_loss_is_differentiable():
  args = inputs()
  for field in ('z_sum', 'correct_sum'):
    gradient = jax.grad(lambda h: getattr(
      cross_entropy(h, *args[1:], z_weight=0.1), field))(args[0])
    np.testing.assert_array_equal(gradient, 0)


def test_no_array_of_all_tokens_by_vocabulary_exists():
  n_tokens, vocab, chunk = 256, 512, 32
  hidden, table = jnp.zeros((n_tokens, 8)), jnp.zeros((vocab, 8))
  loss = lambda h, u: cross_entropy(  # noqa: E731
    h, u, jnp.zeros(n_tokens, int), jnp.ones(n_tokens), chunk=chunk).loss_sum
  memory = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, table).compile().memory_analysis()
  assert memory.temp_size_in_bytes < n_tokens * vocab * 4 / 2


def test_bfloat16_hidden_states_give_float32_sums_and_table_gradients():
  hidden_TD, unembedding_VD, targets_T, weights_T = inputs()
  half_TD = jnp.asarray(hidden_TD, jnp.bfloat16)
  loss = functools.partial(cross_entropy, targets_T=targets_T, weights_T=weights_T, chunk=4)
  gradients = jax.grad(lambda h, u: loss(h, u).loss_sum, (0, 1))(half_TD, unembedding_VD)
  assert gradients[0].dtype == jnp.bfloat16 and gradients[1].dtype == jnp.float32
  _, d_hidden, d_unembedding = witness(hidden_TD, unembedding_VD, targets_T, weights_T)
  for got, want in zip(gradients, (d_hidden, d_unembedding)):
    assert np.linalg.norm(np.asarray(got, np.float64) - want) < 0.02 * np.linalg.norm(want)


def test_token_log_probabilities_equal_numpy():
  hidden_TD, unembedding_VD, targets_T, _ = inputs()
  raw_TV = hidden_TD.astype(np.float64) @ unembedding_VD.T
  for softcap in (0.0, 1.2):
    logits_TV = softcap * np.tanh(raw_TV / softcap) if softcap else raw_TV
    lse_T = np.log(np.exp(logits_TV).sum(1))
    expected = logits_TV[np.arange(T), targets_T] - lse_T
    got = token_log_probs(hidden_TD, unembedding_VD, targets_T, softcap=softcap)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
