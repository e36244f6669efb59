"""Owns cross-entropy over the vocabulary without holding the logits of all tokens.

The vocabulary may be spread over a group of devices, each with some rows of the unembedding.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from models.kernels.interface import softcapped
from models.products import transposed_product
from models.spread import Spread


class CrossEntropy(NamedTuple):
  """Weighted sums over tokens, float32 scalars; only `loss_sum` carries a gradient.

  loss_sum: cross-entropy in nats plus z_sum; z_sum: z_weight * log-normalizer squared;
  correct_sum: weight of tokens whose target is the most likely token. Where the vocabulary is
  spread over a group, each device returns an equal share of the sums.
  """

  loss_sum: jax.Array
  z_sum: jax.Array
  correct_sum: jax.Array


def _chunk_logits(h_TD: jax.Array, u_VD: jax.Array, softcap: float) -> jax.Array:
  """Returns float32 logits [T, V] of a chunk of tokens."""
  logits_TV = jnp.einsum(
    'td,vd->tv', h_TD, u_VD.astype(h_TD.dtype), preferred_element_type=jnp.float32
  )
  return softcapped(logits_TV, softcap)


def _is_target(logits_TV: jax.Array, targets_T: jax.Array, spread: Spread) -> jax.Array:
  """Returns which of the device's logits [T, V] are those of targets."""
  V = logits_TV.shape[1]
  return spread.rank() * V + jnp.arange(V) == targets_T[:, None]


def _target_logits(logits_TV: jax.Array, targets_T: jax.Array, spread: Spread) -> jax.Array:
  """Returns the logits of targets [T], zero for those that another device holds."""
  if spread.size == 1:
    return jnp.take_along_axis(logits_TV, targets_T[:, None], axis=-1)[:, 0]
  return jnp.sum(jnp.where(_is_target(logits_TV, targets_T, spread), logits_TV, 0.0), axis=-1)


def _normalizers(logits_TV: jax.Array, targets_T: jax.Array, spread: Spread):
  """Returns greatest logits, log-normalizers and target logits of the whole vocabulary, [T]."""
  top_T = spread.top(jnp.max(logits_TV, axis=-1))
  sum_T = jnp.sum(jnp.exp(logits_TV - top_T[:, None]), axis=-1)
  own_2T = jnp.stack([sum_T, _target_logits(logits_TV, targets_T, spread)])
  sum_T, target_logit_T = spread.total(own_2T)
  return top_T, top_T + jnp.log(sum_T), target_logit_T


def _chunk_sums(logits_TV, targets_T, weights_T, z_weight: float, spread: Spread):
  """Returns the sums of a chunk, and its log-normalizers [T]."""
  top_T, lse_T, target_logit_T = _normalizers(logits_TV, targets_T, spread)
  weights_T = weights_T / spread.size
  z_sum = z_weight * jnp.sum(weights_T * lse_T**2)
  loss_sum = jnp.sum(weights_T * (lse_T - target_logit_T)) + z_sum
  correct_sum = jnp.sum(weights_T * (target_logit_T >= top_T))
  return CrossEntropy(loss_sum, z_sum, correct_sum), lse_T


def _chunk_gradients(h_TD, u_VD, targets_T, weights_T, z_weight: float, softcap: float, spread):
  """Returns the sums of a chunk and the gradients of its loss, d_h [T, D], d_u [V, D].

  Over a group d_h is what the device's rows of the vocabulary add to it.
  """
  logits_TV = _chunk_logits(h_TD, u_VD, softcap)
  sums, lse_T = _chunk_sums(logits_TV, targets_T, weights_T, z_weight, spread)
  p_TV = jnp.exp(logits_TV - lse_T[:, None])
  is_target_TV = _is_target(logits_TV, targets_T, spread)
  p_weight_T = weights_T * (1 + 2 * z_weight * lse_T)
  d_logits_TV = p_TV * p_weight_T[:, None] - jnp.where(is_target_TV, weights_T[:, None], 0.0)
  if softcap:
    d_logits_TV *= 1 - (logits_TV / softcap) ** 2
  d_logits_TV = d_logits_TV.astype(h_TD.dtype)
  d_h_TD = jnp.einsum('tv,vd->td', d_logits_TV, u_VD.astype(h_TD.dtype))
  return sums, d_h_TD, transposed_product(d_logits_TV, h_TD, jnp.float32)


def _chunked(x_T: jax.Array, chunk: int) -> jax.Array:
  """Returns tokens [T, ...] as [n, chunk, ...], padded with zeros, chunk i = i::n.

  Chunks are strided so that tokens sharded over devices spread evenly over each chunk.
  """
  n = -(-x_T.shape[0] // chunk)
  padding = [(0, n * chunk - x_T.shape[0])] + [(0, 0)] * (x_T.ndim - 1)
  return jnp.pad(x_T, padding).reshape(chunk, n, *x_T.shape[1:]).swapaxes(0, 1)


def _unchunked(x_NT: jax.Array, n_tokens: int) -> jax.Array:
  """Returns the inverse of `_chunked`, [T, ...]."""
  x = x_NT.swapaxes(0, 1)
  return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])[:n_tokens]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _cross_entropy(
  h_TD, u_VD, targets_T, weights_T, z_weight, softcap, chunk, spread
) -> CrossEntropy:
  """Returns the sums over all tokens, chunk by chunk."""

  def chunk_sums(h_TD, targets_T, weights_T):
    logits_TV = _chunk_logits(h_TD, u_VD, softcap)
    return _chunk_sums(logits_TV, targets_T, weights_T, z_weight, spread)[0]

  if h_TD.shape[0] <= chunk:
    return chunk_sums(h_TD, targets_T, weights_T)

  def body(totals, inputs):
    return jax.tree.map(jnp.add, totals, chunk_sums(*inputs)), None

  inputs = tuple(_chunked(x, chunk) for x in (h_TD, targets_T, weights_T))
  return jax.lax.scan(body, CrossEntropy(*[jnp.zeros(())] * 3), inputs)[0]


def _forward(h_TD, u_VD, targets_T, weights_T, z_weight, softcap, chunk, spread):
  """Returns the sums and, as residuals, the finished gradients of the loss."""
  options = z_weight, softcap, spread
  if h_TD.shape[0] <= chunk:
    sums, d_h_TD, d_u_VD = _chunk_gradients(h_TD, u_VD, targets_T, weights_T, *options)
    return sums, (d_h_TD, d_u_VD.astype(u_VD.dtype))

  def body(totals, inputs):
    sums, d_h_TD, d_u_VD = _chunk_gradients(inputs[0], u_VD, *inputs[1:], *options)
    return jax.tree.map(jnp.add, totals, (sums, d_u_VD)), d_h_TD

  start = (CrossEntropy(*[jnp.zeros(())] * 3), jnp.zeros(u_VD.shape, jnp.float32))
  inputs = tuple(_chunked(x, chunk) for x in (h_TD, targets_T, weights_T))
  (sums, d_u_VD), d_h_NTD = jax.lax.scan(body, start, inputs)
  return sums, (_unchunked(d_h_NTD, h_TD.shape[0]), d_u_VD.astype(u_VD.dtype))


def _backward(z_weight, softcap, chunk, spread, gradients, cotangents: CrossEntropy):
  """Returns the residual gradients times the cotangent of the loss."""
  d_h_TD, d_u_VD = gradients
  g = cotangents.loss_sum
  return (d_h_TD * g).astype(d_h_TD.dtype), (d_u_VD * g).astype(d_u_VD.dtype), None, None


_cross_entropy.defvjp(_forward, _backward)


def cross_entropy(
  hidden_TD: jax.Array, unembedding_VD: jax.Array, targets_T: jax.Array, weights_T: jax.Array,
  *, z_weight: float = 0.0, softcap: float = 0.0, chunk: int = 1024, spread: Spread = Spread(),
) -> CrossEntropy:
  """Returns weighted sums of cross-entropy, z-loss and correct predictions.

  Gradients of hidden and unembedding are formed in the forward pass, `chunk` tokens at a
  time, so no [T, V] array outlives its chunk. The dots run in the dtype of the hidden
  states, the softmax in float32. Tokens of zero weight contribute exactly nothing,
  whatever their target. Only `loss_sum` is differentiable, with respect to the first two.
  """
  weights_T = jax.lax.stop_gradient(weights_T.astype(jnp.float32))
  targets_T = jnp.where(weights_T != 0, targets_T, 0)
  sums = _cross_entropy(
    hidden_TD, unembedding_VD, targets_T, weights_T, z_weight, softcap, chunk, spread
  )
  return CrossEntropy(sums.loss_sum, *jax.lax.stop_gradient(sums[1:]))


def token_log_probs(
  hidden_TD: jax.Array, unembedding_VD: jax.Array, targets_T: jax.Array, *,
  softcap: float = 0.0, chunk: int = 1024, spread: Spread = Spread(),
) -> jax.Array:
  """Returns the log-probability of each target in nats, float32 [T].

  The logits of at most `chunk` tokens exist at one time.
  """

  def chunk_log_probs(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
    logits_TV = _chunk_logits(inputs[0], unembedding_VD, softcap)
    _, lse_T, target_logit_T = _normalizers(logits_TV, inputs[1], spread)
    return target_logit_T - lse_T

  if hidden_TD.shape[0] <= chunk:
    return chunk_log_probs((hidden_TD, targets_T))
  chunks = jax.lax.map(chunk_log_probs, (_chunked(hidden_TD, chunk), _chunked(targets_T, chunk)))
  return _unchunked(chunks, hidden_TD.shape[0])
