"""Owns attention in plain XLA whose memory is linear in the length: the one for CPUs.

Queries are cut into blocks of rows; each block sees its reachable keys only. Neighbouring
blocks of like reach share one loop, so the program stays small. Backward computes the
weights again from the saved log-sum-exp (Dao et al. 2022, algorithm 4).
"""

import dataclasses
import functools
from typing import NamedTuple, Optional

import jax
import jax.numpy as jnp
import numpy as np

from models.kernels.interface import HIDDEN, Attended, Mask, check_operands, softcapped
from models.products import transposed_product

MAX_GROUPS = 8  # loops in the program; more skip more dead keys of a causal mask


@dataclasses.dataclass(frozen=True)
class Group:
  """Consecutive blocks of queries that look at equally many keys.

  Block i of the group has queries (first_block + i) * block and on, and the `n_keys` keys
  from key_starts[i].
  """

  first_block: int
  key_starts: tuple[int, ...]
  n_keys: int

  @property
  def blocks(self) -> slice:
    """Which of all blocks these are."""
    return slice(self.first_block, self.first_block + len(self.key_starts))


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is static: the mask, the blocks and the scalar options."""

  mask: Mask
  block: int
  scale: float
  softcap: float
  slopes_KG: Optional[tuple[tuple[float, ...], ...]]


class Rows(NamedTuple):
  """What a block of queries brings: everything leads with the number of blocks in a loop."""

  q_BKGLE: jax.Array
  segment_ids_BL: Optional[jax.Array]
  index: jax.Array  # key index of the first query
  key_start: jax.Array


class Keys(NamedTuple):
  """All keys of the call."""

  k_BKME: jax.Array
  v_BKME: jax.Array
  segment_ids_BM: Optional[jax.Array]


def groups(mask: Mask, n_queries: int, n_keys: int, block: int) -> list[Group]:
  """Returns the loops that cover all blocks of queries."""
  n_blocks = -(-n_queries // block)
  reaches = [
    mask.reach(i * block, min((i + 1) * block, n_queries), n_keys) for i in range(n_blocks)
  ]
  cuts = sorted({n_blocks * i // MAX_GROUPS for i in range(MAX_GROUPS + 1)})
  result: list[Group] = []
  for first, last in zip(cuts, cuts[1:]):
    longest = max(1, *(high - low for low, high in reaches[first:last]))
    starts = tuple(min(low, n_keys - longest) for low, _ in reaches[first:last])
    if result and result[-1].n_keys == longest:
      previous = result.pop()
      first, starts = previous.first_block, previous.key_starts + starts
    result.append(Group(first, starts, longest))
  return result


def _take(keys: Keys, start: jax.Array, n_keys: int) -> Keys:
  """Returns `n_keys` keys from `start`."""
  slices = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=n_keys)
  segments = keys.segment_ids_BM
  return Keys(
    slices(keys.k_BKME, axis=2), slices(keys.v_BKME, axis=2),
    None if segments is None else slices(segments, axis=1),
  )


def _logits(problem: Problem, rows: Rows, keys: Keys) -> tuple[jax.Array, jax.Array]:
  """Returns soft-capped products and biased, masked logits, float32 [B, K, G * L, M]."""
  B, K, G, L, E = rows.q_BKGLE.shape
  M = keys.k_BKME.shape[2]
  products_BKRM = jnp.einsum(
    'bkre,bkme->bkrm', rows.q_BKGLE.reshape(B, K, G * L, E), keys.k_BKME,
    preferred_element_type=jnp.float32,
  )
  capped_BKRM = softcapped(products_BKRM * problem.scale, problem.softcap)
  queries_L1 = rows.index + np.arange(L)[:, None]
  keys_M = rows.key_start + np.arange(M)
  visible_BLM = problem.mask.visible(queries_L1, keys_M)[None]
  if rows.segment_ids_BL is not None and keys.segment_ids_BM is not None:
    same_BLM = rows.segment_ids_BL[:, :, None] == keys.segment_ids_BM[:, None]
    visible_BLM = visible_BLM & same_BLM & (keys.segment_ids_BM != 0)[:, None]
  logits_BKGLM = capped_BKRM.reshape(B, K, G, L, M)
  if problem.slopes_KG is not None:
    slopes_KG11 = np.array(problem.slopes_KG, np.float32)[:, :, None, None]
    logits_BKGLM -= slopes_KG11 * jnp.abs(queries_L1 - keys_M).astype(jnp.float32)
  hidden_BLM = jnp.where(visible_BLM, np.float32(0), np.float32(HIDDEN))
  logits_BKGLM += hidden_BLM[:, None, None]
  return capped_BKRM, logits_BKGLM.reshape(B, K, G * L, M)


def _forward_rows(problem: Problem, rows: Rows, keys: Keys) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, K, G, L, E] and log-sum-exp [B, K, G, L] of a block."""
  _, logits_BKRM = _logits(problem, rows, keys)
  # At least HIDDEN / 2: a query that sees no key has weights 0, not 1.
  top_BKR1 = jnp.maximum(jnp.max(logits_BKRM, axis=-1, keepdims=True), HIDDEN / 2)
  weights_BKRM = jnp.exp(logits_BKRM - top_BKR1)
  total_BKR1 = jnp.sum(weights_BKRM, axis=-1, keepdims=True)
  out_BKRE = jnp.einsum(
    'bkrm,bkme->bkre', weights_BKRM.astype(keys.v_BKME.dtype), keys.v_BKME,
    preferred_element_type=jnp.float32,
  )
  seen_BKR1 = total_BKR1 > 0
  total_BKR1 = jnp.where(seen_BKR1, total_BKR1, 1)
  lse_BKR1 = jnp.where(seen_BKR1, top_BKR1 + jnp.log(total_BKR1), HIDDEN)
  out_BKRE = (out_BKRE / total_BKR1).astype(rows.q_BKGLE.dtype)
  shape = rows.q_BKGLE.shape
  return out_BKRE.reshape(shape), lse_BKR1.reshape(shape[:-1])


class Cotangents(NamedTuple):
  """What backward knows of a block of queries: forward's results and their cotangents."""

  lse_BKGL: jax.Array
  inner_BKGL: jax.Array  # sum over E of out * its cotangent, minus that of the log-sum-exp
  g_BKGLE: jax.Array


def _backward_rows(
  problem: Problem, rows: Rows, keys: Keys, cotangents: Cotangents
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the gradients of a block's queries and, from it, of its keys and values."""
  B, K, G, L, E = rows.q_BKGLE.shape
  q_BKRE = rows.q_BKGLE.reshape(B, K, G * L, E)
  g_BKRE = cotangents.g_BKGLE.reshape(B, K, G * L, E)
  capped_BKRM, logits_BKRM = _logits(problem, rows, keys)
  lse_BKR1 = jnp.maximum(cotangents.lse_BKGL, HIDDEN / 2).reshape(B, K, G * L, 1)
  weights_BKRM = jnp.exp(logits_BKRM - lse_BKR1)
  d_weights_BKRM = jnp.einsum(
    'bkre,bkme->bkrm', g_BKRE, keys.v_BKME, preferred_element_type=jnp.float32
  )
  inner_BKR1 = cotangents.inner_BKGL.reshape(B, K, G * L, 1)
  d_logits_BKRM = weights_BKRM * (d_weights_BKRM - inner_BKR1) * problem.scale
  if problem.softcap:
    d_logits_BKRM *= 1 - (capped_BKRM / problem.softcap) ** 2
  d_logits_BKRM = d_logits_BKRM.astype(q_BKRE.dtype)
  d_q_BKRE = jnp.einsum('bkrm,bkme->bkre', d_logits_BKRM, keys.k_BKME)
  d_k_BKME = transposed_product(d_logits_BKRM, q_BKRE, jnp.float32)
  d_v_BKME = transposed_product(weights_BKRM.astype(g_BKRE.dtype), g_BKRE, jnp.float32)
  return d_q_BKRE.reshape(rows.q_BKGLE.shape), d_k_BKME, d_v_BKME


def _blocked(x: jax.Array, axis: int, block: int) -> jax.Array:
  """Returns x with `axis` cut into whole blocks, [n_blocks, ..., block, ...]."""
  shape = x.shape[:axis] + (x.shape[axis] // block, block) + x.shape[axis + 1 :]
  return jnp.moveaxis(x.reshape(shape), axis, 0)


def _unblocked(x: jax.Array, axis: int) -> jax.Array:
  """Returns the inverse of `_blocked`."""
  x = jnp.moveaxis(x, 0, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _group_rows(
  problem: Problem, group: Group, q_NBKGLE: jax.Array, segments_NBL: Optional[jax.Array]
) -> Rows:
  """Returns the blocks of a group, stacked."""
  blocks = group.blocks
  index_N = np.arange(blocks.start, blocks.stop) * problem.block + problem.mask.q_offset
  return Rows(
    q_NBKGLE[blocks], None if segments_NBL is None else segments_NBL[blocks],
    jnp.asarray(index_N, jnp.int32), jnp.asarray(group.key_starts, jnp.int32),
  )


def _problem_groups(problem: Problem, n_blocks: int, n_keys: int) -> list[Group]:
  """Returns the groups of all blocks."""
  return groups(problem.mask, n_blocks * problem.block, n_keys, problem.block)


def _forward(problem: Problem, q_NBKGLE, segments_NBL, keys: Keys):
  """Returns outputs and log-sum-exp of all blocks, and what backward needs."""
  outs = []
  for group in _problem_groups(problem, q_NBKGLE.shape[0], keys.k_BKME.shape[2]):

    def step(rows: Rows, n_keys: int = group.n_keys):
      return _forward_rows(problem, rows, _take(keys, rows.key_start, n_keys))

    outs.append(jax.lax.map(step, _group_rows(problem, group, q_NBKGLE, segments_NBL)))
  result = jax.tree.map(lambda *xs: jnp.concatenate(xs), *outs)
  return result, (q_NBKGLE, segments_NBL, keys, *result)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem: Problem, q_NBKGLE, segments_NBL, keys: Keys):
  """Returns outputs [N, B, K, G, block, E] and log-sum-exp [N, B, K, G, block]."""
  return _forward(problem, q_NBKGLE, segments_NBL, keys)[0]


def _backward(problem: Problem, residuals, g):
  """Returns the gradients of queries, keys and values, a block of queries at a time."""
  q_NBKGLE, segments_NBL, keys, out_NBKGLE, lse_NBKGL = residuals
  g_NBKGLE, g_lse_NBKGL = g
  inner_NBKGL = jnp.sum(out_NBKGLE.astype(jnp.float32) * g_NBKGLE.astype(jnp.float32), axis=-1)
  cotangents = Cotangents(lse_NBKGL, inner_NBKGL - g_lse_NBKGL, g_NBKGLE)
  totals = [jnp.zeros(x.shape, jnp.float32) for x in (keys.k_BKME, keys.v_BKME)]
  d_q = []
  for group in _problem_groups(problem, q_NBKGLE.shape[0], keys.k_BKME.shape[2]):

    def step(totals, inputs: tuple[Rows, Cotangents], n_keys: int = group.n_keys):
      rows, cotangents = inputs
      d_q, *d_keys = _backward_rows(
        problem, rows, _take(keys, rows.key_start, n_keys), cotangents
      )
      return [_added(t, d, rows.key_start) for t, d in zip(totals, d_keys)], d_q

    rows = _group_rows(problem, group, q_NBKGLE, segments_NBL)
    totals, d_q_NBKGLE = jax.lax.scan(
      step, totals, (rows, jax.tree.map(lambda x: x[group.blocks], cotangents))
    )
    d_q.append(d_q_NBKGLE)
  d_k, d_v = (t.astype(keys.k_BKME.dtype) for t in totals)
  return jnp.concatenate(d_q), None, Keys(d_k, d_v, None)


def _added(total_BKME: jax.Array, part_BKME: jax.Array, start: jax.Array) -> jax.Array:
  """Returns the total with a part added to the keys from `start`."""
  old = jax.lax.dynamic_slice_in_dim(total_BKME, start, part_BKME.shape[2], axis=2)
  return jax.lax.dynamic_update_slice_in_dim(total_BKME, old + part_BKME, start, axis=2)


_attend.defvjp(_forward, _backward)


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
  block = min(block, L)
  padding = -L % block
  slopes_KG = None
  if alibi_slopes_H is not None:
    slopes_KG = tuple(map(tuple, np.asarray(alibi_slopes_H).reshape(K, -1).tolist()))
  problem = Problem(mask, block, scale, softcap, slopes_KG)
  if key_segment_ids_BM is None:
    key_segment_ids_BM = segment_ids_BL
  q_BLHE = jnp.pad(q_BLHE, ((0, 0), (0, padding), (0, 0), (0, 0)))
  q_BKGLE = q_BLHE.reshape(B, L + padding, K, H // K, E).transpose(0, 2, 3, 1, 4)
  segments_NBL = None
  if segment_ids_BL is not None:
    segments_NBL = _blocked(jnp.pad(segment_ids_BL, ((0, 0), (0, padding))), 1, block)
  keys = Keys(k_BMKE.transpose(0, 2, 1, 3), v_BMKE.transpose(0, 2, 1, 3), key_segment_ids_BM)
  out_NBKGLE, lse_NBKGL = _attend(problem, _blocked(q_BKGLE, 3, block), segments_NBL, keys)
  out_BLHE = _unblocked(out_NBKGLE, 3).transpose(0, 3, 1, 2, 4).reshape(B, -1, H, E)
  lse_BHL = _unblocked(lse_NBKGL, 3).reshape(B, H, -1)
  return Attended(out_BLHE[:, :L], lse_BHL[:, :, :L])
