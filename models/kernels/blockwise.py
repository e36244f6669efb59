"""Owns attention in plain XLA whose memory is linear in the length: the one for CPUs.

Queries are cut into blocks of rows, and one loop goes over them; each sees about its reachable
keys only, of which there are a few numbers, each with a branch of its own. Backward computes
the weights again from the saved log-sum-exp (Dao et al. 2022, algorithm 4). Letters here: Z
lanes, a row of the batch and a key head each.
"""

import dataclasses
import functools
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from models.kernels.interface import HIDDEN, Attended, Mask, check_operands, softcapped
from models.products import transposed_product

MAX_SIZES = 16  # numbers of keys; more skip more dead keys of a causal mask


class Reaches(NamedTuple):
  """What each block of queries looks at: sizes[size] keys from `start`, lists over blocks."""

  sizes: tuple[int, ...]
  size: tuple[int, ...]
  start: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is static: the mask, rows of a block and the scalar options."""

  mask: Mask
  block: int
  scale: float
  softcap: float


class Rows(NamedTuple):
  """What a block of queries brings; in the loop everything leads with the number of blocks."""

  q_ZGLE: jax.Array
  segment_ids_ZL: Optional[jax.Array]
  index: jax.Array  # key index of the first query
  size: jax.Array  # which of the numbers of keys
  key_start: jax.Array


class Keys(NamedTuple):
  """All keys of the call."""

  k_ZME: jax.Array
  v_ZME: jax.Array
  segment_ids_ZM: Optional[jax.Array]


def reaches(mask: Mask, n_queries: int, n_keys: int, block: int) -> Reaches:
  """Returns what the blocks of queries look at, in at most MAX_SIZES different numbers of keys."""
  ranges = [
    mask.reach(start, min(start + block, n_queries), n_keys)
    for start in range(0, n_queries, block)
  ]
  step = -(-max(1, *(high - low for low, high in ranges)) // MAX_SIZES)
  rounded = [min(max(1, -(-(high - low) // step)) * step, n_keys) for low, high in ranges]
  sizes = tuple(sorted(set(rounded)))
  starts = tuple(min(low, n_keys - size) for (low, _), size in zip(ranges, rounded))
  return Reaches(sizes, tuple(map(sizes.index, rounded)), starts)


def _take(keys: Keys, start: jax.Array, n_keys: int) -> Keys:
  """Returns `n_keys` keys from `start`."""
  cut = functools.partial(
    jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=n_keys, axis=1
  )
  return Keys(cut(keys.k_ZME), cut(keys.v_ZME), jax.tree.map(cut, keys.segment_ids_ZM))


def _logits(
  problem: Problem, slopes_ZG: Optional[jax.Array], rows: Rows, keys: Keys
) -> tuple[jax.Array, jax.Array]:
  """Returns soft-capped products and biased, masked logits, float32 [Z, G * L, M]."""
  Z, G, L, E = rows.q_ZGLE.shape
  M = keys.k_ZME.shape[1]
  products_ZRM = jnp.einsum(
    'zre,zme->zrm', rows.q_ZGLE.reshape(Z, G * L, E), keys.k_ZME,
    preferred_element_type=jnp.float32,
  )
  capped_ZRM = softcapped(products_ZRM * problem.scale, problem.softcap)
  queries_L1 = rows.index + np.arange(L)[:, None]
  keys_M = rows.key_start + np.arange(M)
  visible_ZLM = problem.mask.visible(queries_L1, keys_M)[None]
  if rows.segment_ids_ZL is not None and keys.segment_ids_ZM is not None:
    same_ZLM = rows.segment_ids_ZL[:, :, None] == keys.segment_ids_ZM[:, None]
    visible_ZLM = visible_ZLM & same_ZLM & (keys.segment_ids_ZM != 0)[:, None]
  logits_ZGLM = capped_ZRM.reshape(Z, G, L, M)
  if slopes_ZG is not None:
    distance_LM = jnp.abs(queries_L1 - keys_M).astype(jnp.float32)
    logits_ZGLM -= slopes_ZG[:, :, None, None] * distance_LM
  logits_ZGLM += jnp.where(visible_ZLM, np.float32(0), np.float32(HIDDEN))[:, None]
  return capped_ZRM, logits_ZGLM.reshape(Z, G * L, M)


def _forward_block(
  problem: Problem, slopes_ZG: Optional[jax.Array], rows: Rows, keys: Keys
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [Z, G, L, E] and log-sum-exp [Z, G, L] of a block."""
  _, logits_ZRM = _logits(problem, slopes_ZG, rows, keys)
  # At least HIDDEN / 2: a query that sees no key has weights 0, not 1.
  top_ZR1 = jnp.maximum(jnp.max(logits_ZRM, axis=-1, keepdims=True), HIDDEN / 2)
  weights_ZRM = jnp.exp(logits_ZRM - top_ZR1)
  total_ZR1 = jnp.sum(weights_ZRM, axis=-1, keepdims=True)
  out_ZRE = jnp.einsum(
    'zrm,zme->zre', weights_ZRM.astype(keys.v_ZME.dtype), keys.v_ZME,
    preferred_element_type=jnp.float32,
  )
  seen_ZR1 = total_ZR1 > 0
  total_ZR1 = jnp.where(seen_ZR1, total_ZR1, 1)
  lse_ZR1 = jnp.where(seen_ZR1, top_ZR1 + jnp.log(total_ZR1), HIDDEN)
  out_ZRE = (out_ZRE / total_ZR1).astype(rows.q_ZGLE.dtype)
  shape = rows.q_ZGLE.shape
  return out_ZRE.reshape(shape), lse_ZR1.reshape(shape[:-1])


class Cotangents(NamedTuple):
  """What backward knows of a block of queries: forward's results and their cotangents."""

  lse_ZGL: jax.Array
  inner_ZGL: jax.Array  # sum over E of out * its cotangent, minus that of the log-sum-exp
  g_ZGLE: jax.Array


def _backward_block(
  problem: Problem, slopes_ZG: Optional[jax.Array], rows: Rows, keys: Keys, cotangents: Cotangents
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of a block's queries and, from it, of its keys and values."""
  Z, G, L, E = rows.q_ZGLE.shape
  q_ZRE = rows.q_ZGLE.reshape(Z, G * L, E)
  g_ZRE = cotangents.g_ZGLE.reshape(Z, G * L, E)
  capped_ZRM, logits_ZRM = _logits(problem, slopes_ZG, rows, keys)
  lse_ZR1 = jnp.maximum(cotangents.lse_ZGL, HIDDEN / 2).reshape(Z, G * L, 1)
  weights_ZRM = jnp.exp(logits_ZRM - lse_ZR1)
  d_weights_ZRM = jnp.einsum(
    'zre,zme->zrm', g_ZRE, keys.v_ZME, preferred_element_type=jnp.float32
  )
  inner_ZR1 = cotangents.inner_ZGL.reshape(Z, G * L, 1)
  d_logits_ZRM = weights_ZRM * (d_weights_ZRM - inner_ZR1) * problem.scale
  if problem.softcap:
    d_logits_ZRM *= 1 - (capped_ZRM / problem.softcap) ** 2
  d_logits_ZRM = d_logits_ZRM.astype(q_ZRE.dtype)
  d_q_ZRE = jnp.einsum('zrm,zme->zre', d_logits_ZRM, keys.k_ZME)
  d_k_ZME = transposed_product(d_logits_ZRM, q_ZRE, jnp.float32)
  d_v_ZME = transposed_product(weights_ZRM.astype(g_ZRE.dtype), g_ZRE, jnp.float32)
  return d_q_ZRE.reshape(rows.q_ZGLE.shape), d_k_ZME, d_v_ZME


def _blocks(
  problem: Problem, q_NZGLE: jax.Array, segments_NZL: Optional[jax.Array], keys: Keys
) -> tuple[Rows, tuple[int, ...]]:
  """Returns what all blocks of queries bring, and the numbers of keys that they look at."""
  N = q_NZGLE.shape[0]
  seen = reaches(problem.mask, N * problem.block, keys.k_ZME.shape[1], problem.block)
  index_N = np.arange(N) * problem.block + problem.mask.q_offset
  scalars = (jnp.asarray(x, jnp.int32) for x in (index_N, seen.size, seen.start))
  return Rows(q_NZGLE, segments_NZL, *scalars), seen.sizes


def _forward(problem: Problem, q_NZGLE, slopes_ZG, segments_NZL, keys: Keys):
  """Returns outputs and log-sum-exp of all blocks, and what backward needs."""
  blocks, sizes = _blocks(problem, q_NZGLE, segments_NZL, keys)

  def of_size(n_keys: int, rows: Rows):
    return _forward_block(problem, slopes_ZG, rows, _take(keys, rows.key_start, n_keys))

  branches = [functools.partial(of_size, n_keys) for n_keys in sizes]
  result = jax.lax.map(lambda rows: jax.lax.switch(rows.size, branches, rows), blocks)
  return result, (q_NZGLE, slopes_ZG, segments_NZL, keys, *result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem: Problem, q_NZGLE, slopes_ZG, segments_NZL, keys: Keys):
  """Returns outputs [N, Z, G, block, E] and log-sum-exp [N, Z, G, block]."""
  return _forward(problem, q_NZGLE, slopes_ZG, segments_NZL, keys)[0]


def _backward(problem: Problem, residuals, g):
  """Returns the gradients of queries, keys and values, a block of queries at a time."""
  q_NZGLE, slopes_ZG, segments_NZL, keys, out_NZGLE, lse_NZGL = residuals
  g_NZGLE, g_lse_NZGL = g
  inner_NZGL = jnp.sum(out_NZGLE.astype(jnp.float32) * g_NZGLE.astype(jnp.float32), axis=-1)
  cotangents = Cotangents(lse_NZGL, inner_NZGL - g_lse_NZGL, g_NZGLE)
  blocks, sizes = _blocks(problem, q_NZGLE, segments_NZL, keys)

  def of_size(n_keys: int, totals, rows: Rows, cotangents: Cotangents):
    taken = _take(keys, rows.key_start, n_keys)
    d_q_ZGLE, *d_keys = _backward_block(problem, slopes_ZG, rows, taken, cotangents)
    return [_added(t, d, rows.key_start) for t, d in zip(totals, d_keys)], d_q_ZGLE

  branches = [functools.partial(of_size, n_keys) for n_keys in sizes]
  (d_k_ZME, d_v_ZME), d_q_NZGLE = jax.lax.scan(
    lambda totals, inputs: jax.lax.switch(inputs[0].size, branches, totals, *inputs),
    [jnp.zeros(x.shape, jnp.float32) for x in (keys.k_ZME, keys.v_ZME)], (blocks, cotangents),
  )
  dtype, d_slopes_ZG = keys.k_ZME.dtype, jax.tree.map(jnp.zeros_like, slopes_ZG)
  return d_q_NZGLE, d_slopes_ZG, None, Keys(d_k_ZME.astype(dtype), d_v_ZME.astype(dtype), None)


def _added(total_ZME: jax.Array, part_ZME: jax.Array, start: jax.Array) -> jax.Array:
  """Returns the total with a part added to the keys from `start`."""
  old_ZME = jax.lax.dynamic_slice_in_dim(total_ZME, start, part_ZME.shape[1], axis=1)
  return jax.lax.dynamic_update_slice_in_dim(total_ZME, old_ZME + part_ZME, start, axis=1)


_attend.defvjp(_forward, _backward)


def _in_lanes(x_BMKE: jax.Array) -> jax.Array:
  """Returns [B, M, K, E] as [Z, M, E]."""
  B, M, K, E = x_BMKE.shape
  return x_BMKE.transpose(0, 2, 1, 3).reshape(B * K, M, E)


def _blocked(x: jax.Array, axis: int, block: int) -> jax.Array:
  """Returns x with `axis` cut into whole blocks, [n_blocks, ..., block, ...]."""
  shape = x.shape[:axis] + (x.shape[axis] // block, block) + x.shape[axis + 1 :]
  return jnp.moveaxis(x.reshape(shape), axis, 0)


def attention(
  q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array, *, scale: float, mask: Mask = Mask(),
  segment_ids_BL: Optional[jax.Array] = None, key_segment_ids_BM: Optional[jax.Array] = None,
  softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None, block: int = 128,
) -> Attended:
  """Returns attention by blocks of `block` queries; see `interface.Attention`."""
  check_operands(
    q_BLHE, k_BMKE, v_BMKE, segment_ids_BL, key_segment_ids_BM, alibi_slopes_H
  )
  B, L, H, E = q_BLHE.shape
  K = k_BMKE.shape[2]
  Z, G = B * K, H // K
  block = min(block, L)
  padding = -L % block
  if key_segment_ids_BM is None:
    key_segment_ids_BM = segment_ids_BL
  q_BLHE = jnp.pad(q_BLHE, ((0, 0), (0, padding), (0, 0), (0, 0)))
  q_ZGLE = q_BLHE.reshape(B, -1, K, G, E).transpose(0, 2, 3, 1, 4).reshape(Z, G, -1, E)
  slopes_ZG = segments_NZL = segments_ZM = None
  if alibi_slopes_H is not None:
    slopes_ZG = jnp.tile(jnp.asarray(alibi_slopes_H, jnp.float32).reshape(K, G), (B, 1))
  if segment_ids_BL is not None and key_segment_ids_BM is not None:
    segments_ZL = jnp.repeat(jnp.pad(segment_ids_BL, ((0, 0), (0, padding))), K, axis=0)
    segments_NZL, segments_ZM = _blocked(segments_ZL, 1, block), jnp.repeat(
      key_segment_ids_BM, K, axis=0
    )
  keys = Keys(_in_lanes(k_BMKE), _in_lanes(v_BMKE), segments_ZM)
  problem = Problem(mask, block, scale, softcap)
  out_NZGLE, lse_NZGL = _attend(
    problem, _blocked(q_ZGLE, 2, block), slopes_ZG, segments_NZL, keys
  )
  out_BLHE = out_NZGLE.reshape(-1, B, K, G, block, E).transpose(1, 0, 4, 2, 3, 5)
  lse_BHL = lse_NZGL.reshape(-1, B, H, block).transpose(1, 2, 0, 3)
  return Attended(out_BLHE.reshape(B, -1, H, E)[:, :L], lse_BHL.reshape(B, H, -1)[:, :, :L])
