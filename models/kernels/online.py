"""Owns the online softmax of decoding kernels: one block of keys at a time (Milakov & Gimelshein
2018), as pure functions that Pallas kernels for TPUs and GPUs call inside.

R rows are the query heads of one key head, padded to what the hardware takes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from models.kernels.interface import HIDDEN, softcapped


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is static about a call."""

  scale: float
  window: int
  softcap: float
  ahead: int
  has_slopes: bool
  interpret: Any


class Softmax(NamedTuple):
  """Statistics of the keys so far: largest logit, total weight, weighted sum of values."""

  top_R1: jax.Array
  total_R1: jax.Array
  sum_RE: jax.Array


class Range(NamedTuple):
  """A row's length and the keys that its query sees, first..stop-1."""

  length: jax.Array
  first: jax.Array
  stop: jax.Array


def empty(R: int, E: int) -> Softmax:
  """Returns the statistics of no keys."""
  # At least HIDDEN / 2: a query that sees no key has weights 0, not 1.
  top_R1 = jnp.full((R, 1), HIDDEN / 2, jnp.float32)
  return Softmax(top_R1, jnp.zeros((R, 1), jnp.float32), jnp.zeros((R, E), jnp.float32))


def dot(x: jax.Array, y: jax.Array, contract: tuple[int, int]) -> jax.Array:
  """Returns the float32 product of two matrices over one dimension of each."""
  precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
  return jax.lax.dot_general(
    x, y, (((contract[0],), (contract[1],)), ((), ())), precision=precision,
    preferred_element_type=jnp.float32,
  )


def folded(
  problem: Problem, softmax: Softmax, q_RE: jax.Array, k_ME: jax.Array, v_ME: jax.Array,
  slopes_R1: jax.Array, start: jax.Array, seen: Range, *, masked: bool,
) -> Softmax:
  """Returns the statistics with a block of M keys from index `start` added.

  Masked: keys outside the range weigh nothing, whatever memory holds in their place, NaN too.
  """
  logits_RM = softcapped(dot(q_RE, k_ME, (1, 1)) * problem.scale, problem.softcap)
  M = k_ME.shape[0]
  keys_1M = jax.lax.broadcasted_iota(jnp.int32, (1, M), 1) + start
  if problem.has_slopes:
    distance_1M = seen.length - 1 + problem.ahead - keys_1M
    logits_RM -= slopes_R1 * distance_1M.astype(jnp.float32)
  if masked:
    keys_M1 = jax.lax.broadcasted_iota(jnp.int32, (M, 1), 0) + start
    logits_RM = jnp.where((keys_1M >= seen.first) & (keys_1M < seen.stop), logits_RM, HIDDEN)
    v_ME = jnp.where((keys_M1 >= seen.first) & (keys_M1 < seen.stop), v_ME, 0)
  top_R1 = jnp.maximum(softmax.top_R1, jnp.max(logits_RM, axis=1, keepdims=True))
  weights_RM, fade_R1 = jnp.exp(logits_RM - top_R1), jnp.exp(softmax.top_R1 - top_R1)
  return Softmax(
    top_R1, softmax.total_R1 * fade_R1 + jnp.sum(weights_RM, axis=1, keepdims=True),
    softmax.sum_RE * fade_R1 + dot(weights_RM.astype(v_ME.dtype), v_ME, (1, 0)),
  )


def finished(softmax: Softmax) -> tuple[jax.Array, jax.Array]:
  """Returns the output [R, E] and the log-sum-exp [R, 1], float32; 0 and HIDDEN of no keys."""
  seen_R1 = softmax.total_R1 > 0
  total_R1 = jnp.where(seen_R1, softmax.total_R1, 1.0)
  lse_R1 = jnp.where(seen_R1, softmax.top_R1 + jnp.log(total_R1), HIDDEN)
  return softmax.sum_RE / total_R1, lse_R1
