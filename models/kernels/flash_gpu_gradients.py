"""Owns the backward kernels of attention on Hopper GPUs.

Both compute the weights again from the log-sum-exp. The gradient of queries has tiles of
queries; the gradients of keys and values have tiles of keys, whose products are transposed,
and visit the queries of all heads of their group.
"""

import functools
from typing import Any, Callable, Optional

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

from models.kernels.flash_gpu_tiles import (
  Operands, Parts, Place, Problem, axis, copy_keys, in_roles, launch, logits, plan,
)
from models.kernels.hopper import (
  COLUMN_VALUES, COMPUTE_GROUPS, MATRIX, ROW_VALUES, ROWS, Held, Ring, held, ring, tiles,
)

# Of queries: the output's cotangent [B, L, H, E], the log-sum-exp in base 2 [B, H, L] and the sum
# over E of output times cotangent, less the cotangent of the log-sum-exp [B, H, L].
Known = tuple[jax.Array, jax.Array, jax.Array]


def _gradient(
  weights_RC: jax.Array, d_weights_RC: jax.Array, inner_RC: jax.Array,
  capped_RC: Optional[jax.Array],
) -> jax.Array:
  """Returns the gradient of q k^T, less the scale."""
  d_logits_RC = weights_RC * (d_weights_RC - inner_RC)
  return d_logits_RC if capped_RC is None else d_logits_RC * (1 - capped_RC * capped_RC)


def _queries_kernel(
  problem: Problem, block: int, parts: Parts, place: Place, operands: Operands, g_BLHE, lse_BHL,
  inner_BHL, d_q_BLHE, held_q: Held, ring_k: Ring, ring_v: Ring,
) -> None:
  """Computes the gradient of a tile of queries."""
  warpgroup, b, head = problem.warpgroup, place.batch, place.head

  def compute() -> None:
    q_RE, g_RE, *vectors = held_q.fetch(place.group, [
      operands.q_BLHE.at[b, place.rows, head], g_BLHE.at[b, place.rows, head],
      lse_BHL.at[b, head, place.rows], inner_BHL.at[b, head, place.rows],
      *problem.segments(operands.q_segments_BL.at[b, place.rows]),
    ])
    lse_R, inner_R = (warpgroup.load(x, ROW_VALUES) for x in vectors[:2])
    rows = axis(problem, place.start, vectors[2:], ROW_VALUES)
    slope = operands.slopes_H[head]

    def step(j: jax.Array, sum_RE: jax.Array, masked: bool) -> jax.Array:
      k_CE, *segments_C = ring_k.take(j - place.low)
      products_RC = warpgroup.transposed_product(q_RE, k_CE)
      columns = axis(problem, j * block, segments_C, COLUMN_VALUES)
      pair = logits(problem, products_RC, rows, columns, slope, by_keys=False, masked=masked)
      shape = products_RC.shape
      weights_RC = pair.exp2(warpgroup.spread(lse_R, shape, ROW_VALUES))
      (v_CE,) = ring_v.take(j - place.low)
      d_weights_RC = warpgroup.transposed_product(g_RE, v_CE)
      ring_v.release(j - place.low)
      inner_RC = warpgroup.spread(inner_R, shape, ROW_VALUES)
      d_logits_RC = _gradient(weights_RC, d_weights_RC, inner_RC, pair.capped_RC)
      sum_RE = warpgroup.plus_product(sum_RE, d_logits_RC.astype(q_RE.dtype), k_CE)
      ring_k.release(j - place.low)
      return sum_RE

    sum_RE = place.walk(parts, step, warpgroup.full(q_RE.shape, 0.0, MATRIX))
    q_RE[...] = (sum_RE * problem.scale).astype(q_RE.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_RE, d_q_BLHE.at[b, place.rows, head])
    plgpu.wait_smem_to_gmem(0)

  copy = functools.partial(copy_keys, problem, block, place, operands, ring_k, ring_v)
  in_roles(place, copy, compute)


def queries_gradient(problem: Problem, operands: Operands, known: Known) -> jax.Array:
  """Returns the gradient of the queries, [B, L, H, E]."""
  E, dtype = operands.q_BLHE.shape[-1], operands.q_BLHE.dtype
  # The registers hold a block of 128 columns beside narrow heads, not its tanh as well.
  block, n_slots = plan(E, n_held=2, largest_block=128 if E <= 64 and not problem.softcap else 64)
  tile, blocks = tiles((COMPUTE_GROUPS, ROWS, E), dtype), tiles((n_slots, block, E), dtype)
  vector = plgpu.SMEM((COMPUTE_GROUPS, ROWS), jnp.float32)
  q_segments = problem.segments(plgpu.SMEM((COMPUTE_GROUPS, ROWS), jnp.int32))
  k_segments = problem.segments(plgpu.SMEM((n_slots, block), jnp.int32))
  scratch = [
    held([tile, tile, vector, vector, *q_segments]), ring([blocks, *k_segments], n_slots),
    ring([blocks], n_slots),
  ]
  result = jax.ShapeDtypeStruct(operands.q_BLHE.shape, dtype)
  return launch(
    'flash_queries_gradient', _queries_kernel, problem, operands, known, result, block, scratch,
    by_keys=False,
  )


def _each_head(place: Place, operands: Operands, run: Callable, carry: Any) -> Any:
  """Runs run(query head, step at which block 0 would come, carry) over a key head's group."""
  n_heads = operands.q_BLHE.shape[2] // operands.k_BMKE.shape[2]

  def body(i: jax.Array, carry: Any) -> Any:
    return run(place.head * n_heads + i, i * place.n_blocks - place.low, carry)

  return jax.lax.fori_loop(0, n_heads, body, carry)


def _copy_queries(
  problem: Problem, block: int, place: Place, operands: Operands, known: Known, ring_q: Ring,
  ring_g: Ring,
) -> None:
  """Copies the blocks of queries and of what is known of them that a tile of keys visits."""
  (g_BLHE, lse_BHL, inner_BHL), b = known, place.batch

  def of_head(head: jax.Array, first: jax.Array, _) -> None:
    def put(i: jax.Array, _) -> None:
      at = pl.ds(i * block, block)
      segments = problem.segments(operands.q_segments_BL.at[b, at])
      ring_q.put(
        first + i, [operands.q_BLHE.at[b, at, head], lse_BHL.at[b, head, at], *segments]
      )
      ring_g.put(first + i, [g_BLHE.at[b, at, head], inner_BHL.at[b, head, at]])

    jax.lax.fori_loop(place.low, place.low + place.n_blocks, put, None)

  _each_head(place, operands, of_head, None)
  n_steps = operands.q_BLHE.shape[2] // operands.k_BMKE.shape[2] * place.n_blocks
  ring_q.drain(n_steps)
  ring_g.drain(n_steps)


def _keys_kernel(
  wanted: str, problem: Problem, block: int, parts: Parts, place: Place, operands: Operands,
  g_BLHE, lse_BHL, inner_BHL, *refs,
) -> None:
  """Computes the gradients of a tile of keys, 'k', of its values, 'v', or of both, 'kv'."""
  *results_BMKE, held_kv, ring_q, ring_g = refs
  warpgroup, b = problem.warpgroup, place.batch

  def compute() -> None:
    k_RE, v_RE, *segments_R = held_kv.fetch(place.group, [
      operands.k_BMKE.at[b, place.rows, place.head],
      operands.v_BMKE.at[b, place.rows, place.head],
      *problem.segments(operands.k_segments_BM.at[b, place.rows]),
    ])
    rows = axis(problem, place.start, segments_R, ROW_VALUES)

    def of_head(head: jax.Array, first: jax.Array, sums: dict[str, jax.Array]):
      slope = operands.slopes_H[head]

      def step(i: jax.Array, sums: dict[str, jax.Array], masked: bool):
        q_CE, lse_C, *segments_C = ring_q.take(first + i)
        products_RC = warpgroup.transposed_product(k_RE, q_CE)
        columns = axis(problem, i * block, segments_C, COLUMN_VALUES)
        pair = logits(problem, products_RC, rows, columns, slope, by_keys=True, masked=masked)
        shape = products_RC.shape
        lse_RC = warpgroup.spread(warpgroup.load(lse_C, COLUMN_VALUES), shape, COLUMN_VALUES)
        weights_RC = pair.exp2(lse_RC)
        g_CE, inner_C = ring_g.take(first + i)
        factors = {'v': (weights_RC, g_CE)}
        if 'k' in wanted:
          d_weights_RC = warpgroup.transposed_product(v_RE, g_CE)
          inner_C = warpgroup.load(inner_C, COLUMN_VALUES)
          inner_RC = warpgroup.spread(inner_C, shape, COLUMN_VALUES)
          factors['k'] = (_gradient(weights_RC, d_weights_RC, inner_RC, pair.capped_RC), q_CE)
        factors = {x: (a.astype(k_RE.dtype), b) for x, (a, b) in factors.items()}
        sums = {x: warpgroup.plus_product(total, *factors[x]) for x, total in sums.items()}
        ring_g.release(first + i)
        ring_q.release(first + i)
        return sums

      return place.walk(parts, step, sums)

    sums = _each_head(place, operands, of_head, {x: warpgroup.full(k_RE.shape, 0.0, MATRIX) for x in wanted})
    blocks, scales = {'k': k_RE, 'v': v_RE}, {'k': problem.scale, 'v': 1.0}
    for x in wanted:
      blocks[x][...] = (sums[x] * scales[x]).astype(k_RE.dtype)
    plgpu.commit_smem()
    for x, result_BMKE in zip(wanted, results_BMKE, strict=True):
      plgpu.copy_smem_to_gmem(blocks[x], result_BMKE.at[b, place.rows, place.head])
    plgpu.wait_smem_to_gmem(0)

  known = (g_BLHE, lse_BHL, inner_BHL)
  copy = functools.partial(_copy_queries, problem, block, place, operands, known, ring_q, ring_g)
  in_roles(place, copy, compute)


def keys_gradients(
  problem: Problem, operands: Operands, known: Known
) -> tuple[jax.Array, jax.Array]:
  """Returns the gradients of the keys and of the values, [B, M, K, E] each."""
  E, dtype = operands.k_BMKE.shape[-1], operands.k_BMKE.dtype
  block, n_slots = plan(E, n_held=2, largest_block=64)
  tile, blocks = tiles((COMPUTE_GROUPS, ROWS, E), dtype), tiles((n_slots, block, E), dtype)
  vector = plgpu.SMEM((n_slots, block), jnp.float32)
  q_segments = problem.segments(plgpu.SMEM((n_slots, block), jnp.int32))
  k_segments = problem.segments(plgpu.SMEM((COMPUTE_GROUPS, ROWS), jnp.int32))
  scratch = [
    held([tile, tile, *k_segments]), ring([blocks, vector, *q_segments], n_slots),
    ring([blocks, vector], n_slots),
  ]
  # Two sums of wide heads are more than a warpgroup's registers hold.
  d_k_BMKE, d_v_BMKE = (
    result
    for wanted in (('kv',) if E <= 128 else ('k', 'v'))
    for result in launch(
      f'flash_{wanted}_gradients', functools.partial(_keys_kernel, wanted), problem, operands,
      known, [jax.ShapeDtypeStruct(operands.k_BMKE.shape, dtype) for _ in wanted], block, scratch,
      by_keys=True,
    )
  )
  return d_k_BMKE, d_v_BMKE
