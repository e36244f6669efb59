"""Owns attention on Hopper GPUs: the forward kernel (Dao 2023; Shah et al. 2024) and the call.

The two computing warpgroups take turns at the tensor cores, so that one multiplies while the
other is at its exponentials. Everything is in base 2 until the log-sum-exp is written.
"""

import functools
from typing import Any, Optional

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from models.kernels.flash_gpu_gradients import keys_gradients, queries_gradient
from models.kernels.flash_gpu_tiles import (
  LOG2E, TILE, Operands, Parts, Place, Problem, axis, copy_keys, in_roles, launch, logits, plan,
)
from models.kernels.hopper import (
  COLUMN_VALUES, COMPUTE_GROUPS, MATRIX, ROW_VALUES, ROWS, Held, Ring, held, ring, tiles,
)
from models.kernels.interface import HIDDEN, Attended, Mask, check_operands


def _forward_kernel(
  problem: Problem, block: int, parts: Parts, place: Place, operands: Operands, out_BLHE, lse_BHL,
  held_q: Held, ring_k: Ring, ring_v: Ring, lse_GR, turn,
) -> None:
  """Computes a tile of queries."""
  warpgroup, b, head = problem.warpgroup, place.batch, place.head

  def next_turn() -> None:
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)

  def compute() -> None:
    q_RE, *segments_R = held_q.fetch(place.group, [
      operands.q_BLHE.at[b, place.rows, head],
      *problem.segments(operands.q_segments_BL.at[b, place.rows]),
    ])
    rows = axis(problem, place.start, segments_R, ROW_VALUES)
    slope = operands.slopes_H[head]
    pl.when(place.group == 1)(next_turn)

    def step(j: jax.Array, carry, masked: bool):
      sum_RE, top_R, total_R = carry
      k_CE, *segments_C = ring_k.take(j - place.low)
      products_RC = warpgroup.transposed_product(q_RE, k_CE, next_turn)
      columns = axis(problem, j * block, segments_C, COLUMN_VALUES)
      ring_k.release(j - place.low)
      pair = logits(problem, products_RC, rows, columns, slope, by_keys=False, masked=masked)
      new_top_R = jnp.maximum(top_R, jnp.max(pair.values_RC, axis=1) * pair.factor)
      fade_R = jnp.exp2(top_R - new_top_R)
      weights_RC = pair.exp2(warpgroup.spread(new_top_R, products_RC.shape, ROW_VALUES))
      total_R = total_R * fade_R + jnp.sum(weights_RC, axis=1)
      sum_RE *= warpgroup.spread(fade_R, sum_RE.shape, ROW_VALUES)
      weights_RC = weights_RC.astype(q_RE.dtype)
      plgpu.barrier_arrive(turn)
      (v_CE,) = ring_v.take(j - place.low)
      plgpu.barrier_wait(turn)
      sum_RE = warpgroup.plus_product(sum_RE, weights_RC, v_CE)
      ring_v.release(j - place.low)
      return sum_RE, new_top_R, total_R

    sum_RE, top_R, total_R = place.walk(parts, step, (
      warpgroup.full(q_RE.shape, 0.0, MATRIX),
      # At least HIDDEN / 2: a query that sees no key has weights 0, not 1.
      warpgroup.full((ROWS,), HIDDEN / 2, ROW_VALUES), warpgroup.full((ROWS,), 0.0, ROW_VALUES),
    ))
    pl.when(place.group == 0)(next_turn)
    seen_R = total_R > 0
    total_R = jnp.where(seen_R, total_R, 1.0)
    out_RE = sum_RE * warpgroup.spread(1 / total_R, sum_RE.shape, ROW_VALUES)
    q_RE[...] = out_RE.astype(q_RE.dtype)
    lse_R = lse_GR.at[place.group]
    lse_R[...] = jnp.where(seen_R, top_R / LOG2E + jnp.log(total_R), HIDDEN)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_RE, out_BLHE.at[b, place.rows, head])
    plgpu.copy_smem_to_gmem(lse_R, lse_BHL.at[b, head, place.rows])
    plgpu.wait_smem_to_gmem(0)

  copy = functools.partial(copy_keys, problem, block, place, operands, ring_k, ring_v)
  in_roles(place, copy, compute)


def _forward(problem: Problem, operands: Operands):
  """Returns the output [B, L, H, E], the log-sum-exp [B, H, L] and residuals."""
  B, L, H, E = operands.q_BLHE.shape
  dtype = operands.q_BLHE.dtype
  block, n_slots = plan(E, n_held=1, largest_block=128 if E <= 128 else 64)
  results = [
    jax.ShapeDtypeStruct((B, L, H, E), dtype), jax.ShapeDtypeStruct((B, H, L), jnp.float32)
  ]
  vectors = [plgpu.SMEM((n, rows), jnp.int32)
             for n, rows in ((COMPUTE_GROUPS, ROWS), (n_slots, block))]
  blocks = tiles((n_slots, block, E), dtype)
  scratch = [
    held([tiles((COMPUTE_GROUPS, ROWS, E), dtype), *problem.segments(vectors[0])]),
    ring([blocks, *problem.segments(vectors[1])], n_slots), ring([blocks], n_slots),
    plgpu.SMEM((COMPUTE_GROUPS, ROWS), jnp.float32), plgpu.Barrier(num_arrivals=COMPUTE_GROUPS),
  ]
  out_BLHE, lse_BHL = launch(
    'flash_forward', _forward_kernel, problem, operands, (), results, block, scratch,
    by_keys=False,
  )
  return (out_BLHE, lse_BHL), (operands, out_BLHE, lse_BHL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem: Problem, operands: Operands):
  """Returns the output [B, L, H, E] and the log-sum-exp [B, H, L]."""
  return _forward(problem, operands)[0]


def _backward(problem: Problem, residuals, g):
  """Returns the gradients of queries, keys and values."""
  operands, out_BLHE, lse_BHL = residuals
  g_BLHE, g_lse_BHL = g
  products_BLHE = out_BLHE.astype(jnp.float32) * g_BLHE.astype(jnp.float32)
  inner_BHL = jnp.sum(products_BLHE, axis=-1).swapaxes(1, 2) - g_lse_BHL
  # A padded query weighs nothing, also where backward takes its block for one without a mask.
  is_real_L = np.arange(lse_BHL.shape[-1]) < problem.n_queries
  lse_BHL = jnp.where(is_real_L, jnp.maximum(lse_BHL, HIDDEN / 2) * LOG2E, -HIDDEN)
  known = (g_BLHE, lse_BHL, inner_BHL)
  d_q_BLHE = queries_gradient(problem, operands, known)
  d_k_BMKE, d_v_BMKE = keys_gradients(problem, operands, known)
  d_slopes_H = jnp.zeros_like(operands.slopes_H)
  return (Operands(d_q_BLHE, d_k_BMKE, d_v_BMKE, d_slopes_H, None, None),)


_attend.defvjp(_forward, _backward)


def takes_width(width: int) -> bool:
  """Returns whether the kernels take heads of this width."""
  return 32 <= width <= 256


def _check_supported(q_BLHE: jax.Array) -> None:
  """Raises ValueError for what the kernels lack, with the alternative."""
  dtype, width = q_BLHE.dtype, q_BLHE.shape[-1]
  if dtype != jnp.bfloat16:
    raise ValueError(f'flash_gpu takes bfloat16, not {dtype}; blockwise takes it')
  if not takes_width(width):
    raise ValueError(f'flash_gpu takes heads of width 32 to 256, not {width}; blockwise takes it')


def _padded(x_BLHE: jax.Array) -> jax.Array:
  """Returns x with zeros appended to whole tiles and to a width that copies can swizzle."""
  L, E = x_BLHE.shape[1], x_BLHE.shape[3]
  width = 32 if E == 32 else -(-E // 64) * 64
  return jnp.pad(x_BLHE, ((0, 0), (0, -L % TILE), (0, 0), (0, width - E)))


def _padded_ids(ids_BL: jax.Array) -> jax.Array:
  """Returns segments with padding appended to whole tiles."""
  return jnp.pad(ids_BL, ((0, 0), (0, -ids_BL.shape[1] % TILE)))


def attention(
  q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array, *, scale: float, mask: Mask = Mask(),
  segment_ids_BL: Optional[jax.Array] = None, key_segment_ids_BM: Optional[jax.Array] = None,
  softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None, interpret: Any = None,
) -> Attended:
  """Returns attention by Hopper's kernels; see `interface.Attention`.

  Operands are bfloat16, heads 32 to 256 wide; `interpret` is that of `plgpu.kernel`. Raises
  ValueError for other widths and dtypes.
  """
  check_operands(
    q_BLHE, k_BMKE, v_BMKE, segment_ids_BL, key_segment_ids_BM, alibi_slopes_H
  )
  _check_supported(q_BLHE)
  B, L, H, E = q_BLHE.shape
  M = k_BMKE.shape[1]
  has_segments, has_slopes = segment_ids_BL is not None, alibi_slopes_H is not None
  if not has_segments:
    segment_ids_BL, key_segment_ids_BM = jnp.ones((B, L), jnp.int32), jnp.ones((B, M), jnp.int32)
  elif key_segment_ids_BM is None:
    key_segment_ids_BM = segment_ids_BL
  slopes_H = np.zeros(H) if alibi_slopes_H is None else alibi_slopes_H
  problem = Problem(mask, scale, softcap, L, M, has_segments, has_slopes, interpret)
  operands = Operands(
    _padded(q_BLHE), _padded(k_BMKE), _padded(v_BMKE), jnp.asarray(slopes_H, jnp.float32),
    _padded_ids(segment_ids_BL), _padded_ids(key_segment_ids_BM),
  )
  out_BLHE, lse_BHL = _attend(problem, operands)
  return Attended(out_BLHE[:, :L, :, :E], lse_BHL[:, :, :L])
