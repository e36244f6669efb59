"""Owns Hopper's attention kernels, forward and backward (Dao 2023; Shah et al. 2024; Mosaic GPU).

A block of threads is three warpgroups: two multiply, each for 64 rows of a tile of 128, the third
copies the blocks that they need into a ring. A tile visits the live blocks of `live_ranges` only.
Forward and the gradient of queries have tiles of queries, the gradients of keys and values have
tiles of keys and visit the queries of all heads of their group. Exponentials are base 2.
"""

import dataclasses
import functools
import math
from typing import Any, Callable, NamedTuple, Optional

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from models.kernels.hopper import (
  COLUMN_VALUES, COMPUTE_GROUPS, MATRIX, ROW_VALUES, ROWS, SHARED_BYTES, Held, Ring, Warpgroup,
  held, ring, tiles,
)
from models.kernels.interface import HIDDEN, Attended, Mask, check_operands
from models.kernels.pairs import live_pairs, live_ranges

LOG2E = math.log2(math.e)
TILE = COMPUTE_GROUPS * ROWS
MAX_SLOTS = 4
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is static about a call; lengths are those before padding to whole tiles."""

  mask: Mask
  scale: float
  softcap: float
  n_queries: int
  n_keys: int
  has_segments: bool
  has_slopes: bool
  interpret: Any

  @property
  def warpgroup(self) -> Warpgroup:
    """The operations of a warpgroup."""
    return Warpgroup(interpreted=bool(self.interpret))


class Operands(NamedTuple):
  """Arrays of a call, lengths padded to whole tiles."""

  q_BLHE: jax.Array
  k_BMKE: jax.Array
  v_BMKE: jax.Array
  slopes_H: jax.Array
  q_segments_BL: jax.Array
  k_segments_BM: jax.Array


class Axis(NamedTuple):
  """Rows or columns of a product: where they start and whose segments they have."""

  start: jax.Array
  segments: Optional[jax.Array]


def _logits(
  problem: Problem, products: jax.Array, rows: Axis, columns: Axis, slope: Any, *,
  by_keys: bool, masked: bool,
) -> tuple[jax.Array, Optional[jax.Array]]:
  """Returns logits in base 2 and, with a soft-cap, the tanh in them; [rows, columns] each.

  Rows are queries and columns keys, by keys the other way round.
  """
  warpgroup, shape, capped = problem.warpgroup, products.shape, None
  if problem.softcap:
    capped = jnp.tanh(products * (problem.scale / problem.softcap))
    logits = capped * (problem.softcap * LOG2E)
  else:
    logits = products * (problem.scale * LOG2E)
  if not masked and not problem.has_slopes:
    return logits, capped
  starts = (columns.start, rows.start) if by_keys else (rows.start, columns.start)
  queries = warpgroup.iota(shape, int(by_keys)) + (starts[0] + problem.mask.q_offset)
  keys = warpgroup.iota(shape, int(not by_keys)) + starts[1]
  if problem.has_slopes:
    logits -= jnp.abs(queries - keys).astype(jnp.float32) * (slope * LOG2E)
  if masked:
    visible = problem.mask.visible(queries, keys) & (keys < problem.n_keys)
    if rows.segments is not None and columns.segments is not None:
      row_segments = warpgroup.spread(rows.segments, shape, ROW_VALUES)
      column_segments = warpgroup.spread(columns.segments, shape, COLUMN_VALUES)
      visible &= (row_segments == column_segments) & (column_segments != 0)
    logits = jnp.where(visible, logits, HIDDEN)
  return logits, capped


def _walk(parts: tuple[bool, bool, bool], range_ref: Any, step: Callable, carry: Any) -> Any:
  """Runs step(block, carry, masked) over a tile's live blocks: masked ones, whole ones, masked.

  `parts` says which of the three any tile has.
  """
  for i, (present, masked) in enumerate(zip(parts, (True, False, True))):
    if present:
      body = functools.partial(step, masked=masked)
      carry = jax.lax.fori_loop(range_ref[i], range_ref[i + 1], body, carry)
  return carry


def _parts(problem: Problem, ranges: np.ndarray) -> tuple[np.ndarray, tuple[bool, bool, bool]]:
  """Returns the ranges as the kernel walks them, [tiles, 4], and which parts any tile has.

  With segments all blocks are masked.
  """
  if problem.has_segments:
    ranges = ranges[:, [0, 3, 3, 3]]
  first, whole, last = (np.diff(ranges, axis=1) > 0).any(0).tolist()
  return ranges, (first, whole, last)


def _segments(problem: Problem, *refs: Any) -> tuple[Any, ...]:
  """Returns the references where the call has segments, else none."""
  return refs if problem.has_segments else ()


def _forward_kernel(
  problem: Problem, block: int, parts, q, k, v, slopes, q_segments, k_segments, ranges, out, lse,
  held_q: Held, ring_k: Ring, ring_v: Ring, lse_block, turn,
) -> None:
  """Computes a tile of queries; the two warpgroups take turns at the tensor cores."""
  tile, head, b = _tile(ranges), jax.lax.axis_index('head'), jax.lax.axis_index('batch')
  k_head = jax.lax.div(head, jnp.int32(q.shape[2] // k.shape[2]))
  group, range_ref, warpgroup = jax.lax.axis_index('group'), ranges.at[tile], problem.warpgroup
  low, high = range_ref[0], range_ref[3]

  def next_turn() -> None:
    plgpu.barrier_arrive(turn)
    plgpu.barrier_wait(turn)

  @pl.when(group == COMPUTE_GROUPS)
  def _():
    plgpu.set_max_registers(COPY_REGISTERS, action='decrease')

    def put(j: jax.Array, _) -> None:
      at = pl.ds(j * block, block)
      segments = _segments(problem, k_segments.at[b, at])
      ring_k.put(j - low, [k.at[b, at, k_head], *segments])
      ring_v.put(j - low, [v.at[b, at, k_head]])

    jax.lax.fori_loop(low, high, put, None)
    ring_k.drain(high - low)
    ring_v.drain(high - low)

  @pl.when(group < COMPUTE_GROUPS)
  def _():
    plgpu.set_max_registers(COMPUTE_REGISTERS, action='increase')
    start = tile * TILE + group * ROWS
    at = pl.ds(start, ROWS)
    blocks = held_q.fetch(
      group, [q.at[b, at, head], *_segments(problem, q_segments.at[b, at])]
    )
    q_RE = blocks[0]
    rows = Axis(start, *[warpgroup.load(x, ROW_VALUES) for x in blocks[1:]] or [None])
    slope = slopes[head]
    pl.when(group == 1)(next_turn)

    def step(j: jax.Array, carry, masked: bool):
      sum_RE, top_R, total_R = carry
      k_CE, *k_segments_C = ring_k.take(j - low)
      products_RC = warpgroup.transposed_product(q_RE, k_CE, next_turn)
      columns = Axis(
        j * block, *[warpgroup.load(x, COLUMN_VALUES) for x in k_segments_C] or [None]
      )
      ring_k.release(j - low)
      logits_RC, _ = _logits(
        problem, products_RC, rows, columns, slope, by_keys=False, masked=masked
      )
      new_top_R = jnp.maximum(top_R, jnp.max(logits_RC, axis=1))
      fade_R = jnp.exp2(top_R - new_top_R)
      weights_RC = jnp.exp2(logits_RC - warpgroup.spread(new_top_R, logits_RC.shape, ROW_VALUES))
      total_R = total_R * fade_R + jnp.sum(weights_RC, axis=1)
      sum_RE *= warpgroup.spread(fade_R, sum_RE.shape, ROW_VALUES)
      weights_RC = weights_RC.astype(k.dtype)
      plgpu.barrier_arrive(turn)
      (v_CE,) = ring_v.take(j - low)
      plgpu.barrier_wait(turn)
      sum_RE = warpgroup.plus_product(sum_RE, weights_RC, v_CE)
      ring_v.release(j - low)
      return sum_RE, new_top_R, total_R

    sum_RE, top_R, total_R = _walk(parts, range_ref, step, (
      warpgroup.full(q_RE.shape, 0.0, MATRIX),
      # At least HIDDEN / 2: a query that sees no key has weights 0, not 1.
      warpgroup.full((ROWS,), HIDDEN / 2, ROW_VALUES), warpgroup.full((ROWS,), 0.0, ROW_VALUES),
    ))
    pl.when(group == 0)(next_turn)
    seen_R = total_R > 0
    total_R = jnp.where(seen_R, total_R, 1.0)
    q_RE[...] = (sum_RE * warpgroup.spread(1 / total_R, sum_RE.shape, ROW_VALUES)).astype(q.dtype)
    lse_R = lse_block.at[group]
    lse_R[...] = jnp.where(seen_R, top_R / LOG2E + jnp.log(total_R), HIDDEN)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_RE, out.at[b, at, head])
    plgpu.copy_smem_to_gmem(lse_R, lse.at[b, head, at])
    plgpu.wait_smem_to_gmem(0)


def _gradient(
  problem: Problem, weights: jax.Array, d_weights: jax.Array, inner: jax.Array,
  capped: Optional[jax.Array],
) -> jax.Array:
  """Returns the gradient of q k^T without the scale."""
  d_logits = weights * (d_weights - inner)
  return d_logits if capped is None else d_logits * (1 - capped * capped)


def _queries_kernel(
  problem: Problem, block: int, parts, q, k, v, slopes, q_segments, k_segments, ranges, g, lse,
  inner, d_q, held_q: Held, ring_k: Ring, ring_v: Ring,
) -> None:
  """Computes the gradient of a tile of queries."""
  tile, head, b = _tile(ranges), jax.lax.axis_index('head'), jax.lax.axis_index('batch')
  k_head = jax.lax.div(head, jnp.int32(q.shape[2] // k.shape[2]))
  group, range_ref, warpgroup = jax.lax.axis_index('group'), ranges.at[tile], problem.warpgroup
  low, high = range_ref[0], range_ref[3]

  @pl.when(group == COMPUTE_GROUPS)
  def _():
    plgpu.set_max_registers(COPY_REGISTERS, action='decrease')

    def put(j: jax.Array, _) -> None:
      at = pl.ds(j * block, block)
      ring_k.put(
        j - low, [k.at[b, at, k_head], *_segments(problem, k_segments.at[b, at])]
      )
      ring_v.put(j - low, [v.at[b, at, k_head]])

    jax.lax.fori_loop(low, high, put, None)
    ring_k.drain(high - low)
    ring_v.drain(high - low)

  @pl.when(group < COMPUTE_GROUPS)
  def _():
    plgpu.set_max_registers(COMPUTE_REGISTERS, action='increase')
    start = tile * TILE + group * ROWS
    at = pl.ds(start, ROWS)
    q_RE, g_RE, *vectors = held_q.fetch(group, [
      q.at[b, at, head], g.at[b, at, head], lse.at[b, head, at], inner.at[b, head, at],
      *_segments(problem, q_segments.at[b, at]),
    ])
    lse_R, inner_R, *q_segments_R = [warpgroup.load(x, ROW_VALUES) for x in vectors]
    rows, slope = Axis(start, *q_segments_R or [None]), slopes[head]

    def step(j: jax.Array, sum_RE: jax.Array, masked: bool) -> jax.Array:
      k_CE, *k_segments_C = ring_k.take(j - low)
      products_RC = warpgroup.transposed_product(q_RE, k_CE)
      columns = Axis(
        j * block, *[warpgroup.load(x, COLUMN_VALUES) for x in k_segments_C] or [None]
      )
      logits_RC, capped_RC = _logits(
        problem, products_RC, rows, columns, slope, by_keys=False, masked=masked
      )
      shape = logits_RC.shape
      weights_RC = jnp.exp2(logits_RC - warpgroup.spread(lse_R, shape, ROW_VALUES))
      (v_CE,) = ring_v.take(j - low)
      d_weights_RC = warpgroup.transposed_product(g_RE, v_CE)
      ring_v.release(j - low)
      d_logits_RC = _gradient(
        problem, weights_RC, d_weights_RC, warpgroup.spread(inner_R, shape, ROW_VALUES), capped_RC
      )
      sum_RE = warpgroup.plus_product(sum_RE, d_logits_RC.astype(k.dtype), k_CE)
      ring_k.release(j - low)
      return sum_RE

    sum_RE = _walk(parts, range_ref, step, warpgroup.full(q_RE.shape, 0.0, MATRIX))
    q_RE[...] = (sum_RE * problem.scale).astype(q.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(q_RE, d_q.at[b, at, head])
    plgpu.wait_smem_to_gmem(0)


def _keys_kernel(
  wanted: tuple[str, ...], problem: Problem, block: int, parts, q, k, v, slopes, q_segments,
  k_segments, ranges, g, lse, inner, *refs,
) -> None:
  """Computes the gradients of a tile of keys and values, or one of the two (`wanted`)."""
  *outs, held_kv, ring_q, ring_g = refs
  tile, k_head, b = _tile(ranges), jax.lax.axis_index('head'), jax.lax.axis_index('batch')
  group, range_ref, warpgroup = jax.lax.axis_index('group'), ranges.at[tile], problem.warpgroup
  n_heads, (low, high) = q.shape[2] // k.shape[2], (range_ref[0], range_ref[3])

  def each_head(run: Callable, carry: Any) -> Any:
    """Runs run(query head, step of its first block, carry) over the heads of the group."""
    def body(i: jax.Array, carry: Any) -> Any:
      return run(k_head * n_heads + i, i * (high - low) - low, carry)
    return jax.lax.fori_loop(0, n_heads, body, carry)

  @pl.when(group == COMPUTE_GROUPS)
  def _():
    plgpu.set_max_registers(COPY_REGISTERS, action='decrease')

    def of_head(head: jax.Array, first: jax.Array, _) -> None:
      def put(i: jax.Array, _) -> None:
        at = pl.ds(i * block, block)
        ring_q.put(first + i, [
          q.at[b, at, head], lse.at[b, head, at], *_segments(problem, q_segments.at[b, at])
        ])
        ring_g.put(first + i, [g.at[b, at, head], inner.at[b, head, at]])
      jax.lax.fori_loop(low, high, put, None)

    each_head(of_head, None)
    ring_q.drain(n_heads * (high - low))
    ring_g.drain(n_heads * (high - low))

  @pl.when(group < COMPUTE_GROUPS)
  def _():
    plgpu.set_max_registers(COMPUTE_REGISTERS, action='increase')
    start = tile * TILE + group * ROWS
    at = pl.ds(start, ROWS)
    k_RE, v_RE, *k_segments_R = held_kv.fetch(group, [
      k.at[b, at, k_head], v.at[b, at, k_head], *_segments(problem, k_segments.at[b, at])
    ])
    rows = Axis(start, *[warpgroup.load(x, ROW_VALUES) for x in k_segments_R] or [None])

    def of_head(head: jax.Array, first: jax.Array, sums):
      slope = slopes[head]

      def step(i: jax.Array, sums: dict[str, jax.Array], masked: bool):
        sums = dict(sums)
        q_CE, *vectors = ring_q.take(first + i)
        products_RC = warpgroup.transposed_product(k_RE, q_CE)
        lse_C, *q_segments_C = [warpgroup.load(x, COLUMN_VALUES) for x in vectors]
        columns = Axis(i * block, *q_segments_C or [None])
        logits_RC, capped_RC = _logits(
          problem, products_RC, rows, columns, slope, by_keys=True, masked=masked
        )
        shape = logits_RC.shape
        weights_RC = jnp.exp2(logits_RC - warpgroup.spread(lse_C, shape, COLUMN_VALUES))
        g_CE, inner_C = ring_g.take(first + i)
        if 'v' in wanted:
          sums['v'] = warpgroup.plus_product(sums['v'], weights_RC.astype(q.dtype), g_CE)
        if 'k' in wanted:
          d_weights_RC = warpgroup.transposed_product(v_RE, g_CE)
          inner_RC = warpgroup.spread(
            warpgroup.load(inner_C, COLUMN_VALUES), shape, COLUMN_VALUES
          )
          d_logits_RC = _gradient(problem, weights_RC, d_weights_RC, inner_RC, capped_RC)
          sums['k'] = warpgroup.plus_product(sums['k'], d_logits_RC.astype(q.dtype), q_CE)
        ring_g.release(first + i)
        ring_q.release(first + i)
        return sums

      return _walk(parts, range_ref, step, sums)

    sums = each_head(of_head, {x: warpgroup.full(k_RE.shape, 0.0, MATRIX) for x in wanted})
    blocks = {'k': k_RE, 'v': v_RE}
    scales = {'k': problem.scale, 'v': 1.0}
    for name, out in zip(wanted, outs, strict=True):
      blocks[name][...] = (sums[name] * scales[name]).astype(k.dtype)
    plgpu.commit_smem()
    for name, out in zip(wanted, outs, strict=True):
      plgpu.copy_smem_to_gmem(blocks[name], out.at[b, at, k_head])
    plgpu.wait_smem_to_gmem(0)


def _tile(ranges: Any) -> jax.Array:
  """Returns the tile of a block of threads, the last first: causal ones are longest."""
  return ranges.shape[0] - 1 - jax.lax.axis_index('tile')


class Plan(NamedTuple):
  """Blocks and slots of a kernel that fit into shared memory."""

  block: int
  n_slots: int


def plan(width: int, n_held: int, largest_block: int) -> Plan:
  """Returns the largest blocks of which at least two pairs fit beside the tiles held.

  A row of a block takes 16 bytes for vectors beside its bfloat16 cells.
  """
  row_bytes = 2 * width + 16
  room = SHARED_BYTES - n_held * TILE * row_bytes - 1024  # barriers
  for block in (128, 64, 32):
    n_slots = room // (2 * block * row_bytes)
    if block <= largest_block and n_slots >= 2:
      return Plan(block, min(n_slots, MAX_SLOTS))
  raise ValueError(f'heads of width {width} leave no room for blocks')


def _launch(
  problem: Problem, kernel: Callable, operands: Operands, extra: tuple, outs: list, fits: Plan,
  scratch: list, *, by_keys: bool,
) -> Any:
  """Runs a kernel over the tiles of all heads, of queries or of keys.

  `kernel(problem, block, parts, ...)` takes operands, ranges, extra operands, results and
  scratch.
  """
  B, L, H, _ = operands.q_BLHE.shape
  M, K = operands.k_BMKE.shape[1:3]
  sizes = (fits.block, TILE) if by_keys else (TILE, fits.block)
  pairs = live_pairs(problem.mask, problem.n_queries, problem.n_keys, *sizes, by_keys=by_keys)
  ranges, parts = _parts(problem, live_ranges(pairs, by_keys=by_keys))
  heads, tiles_of_head = (K, M // TILE) if by_keys else (H, L // TILE)
  return plgpu.kernel(
    functools.partial(kernel, problem, fits.block, parts),
    out_type=outs, scratch_types=scratch,
    grid=(heads, tiles_of_head, B), grid_names=('head', 'tile', 'batch'),
    num_threads=COMPUTE_GROUPS + 1, thread_name='group',
    compiler_params=plgpu.CompilerParams(approx_math=True), interpret=problem.interpret,
  )(*operands, jnp.asarray(ranges), *extra)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype of an array."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _forward(problem: Problem, operands: Operands):
  """Returns the output [B, L, H, E], the log-sum-exp [B, H, L] and residuals."""
  B, L, H, E = operands.q_BLHE.shape
  dtype = operands.q_BLHE.dtype
  fits = plan(E, 1, 128 if E <= 128 else 64)
  n, block = fits.n_slots, fits.block
  vector, segments = functools.partial(plgpu.SMEM, dtype=jnp.float32), _segment_blocks(problem)
  out_BLHE, lse_BHL = _launch(
    problem, _forward_kernel, operands, (),
    [_like(operands.q_BLHE), jax.ShapeDtypeStruct((B, H, L), jnp.float32)], fits,
    [
      held([tiles((COMPUTE_GROUPS, ROWS, E), dtype), *segments(COMPUTE_GROUPS, ROWS)]),
      ring([tiles((n, block, E), dtype), *segments(n, block)], n),
      ring([tiles((n, block, E), dtype)], n), vector((COMPUTE_GROUPS, ROWS)),
      plgpu.Barrier(num_arrivals=COMPUTE_GROUPS),
    ],
    by_keys=False,
  )
  return (out_BLHE, lse_BHL), (operands, out_BLHE, lse_BHL)


def _segment_blocks(problem: Problem) -> Callable[[int, int], list]:
  """Returns f(blocks, rows) -> shared memory of segments, none without segments."""
  return lambda n, rows: [plgpu.SMEM((n, rows), jnp.int32)] * problem.has_segments


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem: Problem, operands: Operands):
  """Returns the output [B, L, H, E] and the log-sum-exp [B, H, L]."""
  return _forward(problem, operands)[0]


def _queries_gradient(problem: Problem, operands: Operands, extra: tuple) -> jax.Array:
  """Returns the gradient of the queries."""
  E, dtype = operands.q_BLHE.shape[-1], operands.q_BLHE.dtype
  fits = plan(E, 2, 128 if E <= 64 else 64)
  n, block, segments = fits.n_slots, fits.block, _segment_blocks(problem)
  tile = tiles((COMPUTE_GROUPS, ROWS, E), dtype)
  vector = plgpu.SMEM((COMPUTE_GROUPS, ROWS), jnp.float32)
  return _launch(
    problem, _queries_kernel, operands, extra, _like(operands.q_BLHE), fits,
    [
      held([tile, tile, vector, vector, *segments(COMPUTE_GROUPS, ROWS)]),
      ring([tiles((n, block, E), dtype), *segments(n, block)], n),
      ring([tiles((n, block, E), dtype)], n),
    ],
    by_keys=False,
  )


def _keys_gradients(
  problem: Problem, operands: Operands, extra: tuple, wanted: tuple[str, ...]
) -> list[jax.Array]:
  """Returns the gradients of the keys 'k', the values 'v', or both."""
  E, dtype = operands.k_BMKE.shape[-1], operands.k_BMKE.dtype
  fits = plan(E, 2, 64)
  n, block, segments = fits.n_slots, fits.block, _segment_blocks(problem)
  tile, blocks = tiles((COMPUTE_GROUPS, ROWS, E), dtype), tiles((n, block, E), dtype)
  vector = plgpu.SMEM((n, block), jnp.float32)
  kernel = functools.partial(_keys_kernel, wanted)
  return _launch(
    problem, kernel, operands, extra, [_like(operands.k_BMKE) for _ in wanted], fits,
    [
      held([tile, tile, *segments(COMPUTE_GROUPS, ROWS)]),
      ring([blocks, vector, *segments(n, block)], n), ring([blocks, vector], n),
    ],
    by_keys=True,
  )


def _backward(problem: Problem, residuals, g):
  """Returns the gradients of queries, keys and values."""
  operands, out_BLHE, lse_BHL = residuals
  g_BLHE, g_lse_BHL = g
  products_BLHE = out_BLHE.astype(jnp.float32) * g_BLHE.astype(jnp.float32)
  inner_BHL = jnp.sum(products_BLHE, axis=-1).swapaxes(1, 2) - g_lse_BHL
  extra = (g_BLHE, jnp.maximum(lse_BHL, HIDDEN / 2) * LOG2E, inner_BHL)
  d_q_BLHE = _queries_gradient(problem, operands, extra)
  # Two sums of wide heads are more than a warpgroup's registers hold.
  split = (('k', 'v'),) if out_BLHE.shape[-1] <= 128 else (('k',), ('v',))
  d_k_BMKE, d_v_BMKE = (
    x for wanted in split for x in _keys_gradients(problem, operands, extra, wanted)
  )
  d_slopes_H = jnp.zeros_like(operands.slopes_H)
  return (Operands(d_q_BLHE, d_k_BMKE, d_v_BMKE, d_slopes_H, None, None),)


_attend.defvjp(_forward, _backward)


def takes_width(width: int) -> bool:
  """Returns whether the kernels take heads of this width."""
  return 32 <= width <= 256


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
  B, L, H, E = q_BLHE.shape
  M = k_BMKE.shape[1]
  if q_BLHE.dtype != jnp.bfloat16:
    raise ValueError(f'flash_gpu takes bfloat16, not {q_BLHE.dtype}; blockwise takes it')
  if not takes_width(E):
    raise ValueError(f'flash_gpu takes heads of width 32 to 256, not {E}; blockwise takes it')
  has_segments, has_slopes = segment_ids_BL is not None, alibi_slopes_H is not None
  if not has_segments:
    segment_ids_BL, key_segment_ids_BM = jnp.ones((B, L), jnp.int32), jnp.ones((B, M), jnp.int32)
  elif key_segment_ids_BM is None:
    key_segment_ids_BM = segment_ids_BL
  slopes_H = np.zeros(H) if alibi_slopes_H is None else alibi_slopes_H
  problem = Problem(mask, scale, softcap, L, M, has_segments, has_slopes, interpret)
  operands = Operands(
    *(_padded(x) for x in (q_BLHE, k_BMKE, v_BMKE)), jnp.asarray(slopes_H, jnp.float32),
    *(jnp.pad(x, ((0, 0), (0, -x.shape[1] % TILE)))
      for x in (segment_ids_BL, key_segment_ids_BM)),
  )
  out_BLHE, lse_BHL = _attend(problem, operands)
  return Attended(out_BLHE[:, :L, :, :E], lse_BHL[:, :, :L])


def _padded(x_BLHE: jax.Array) -> jax.Array:
  """Returns x with zeros appended to whole tiles and to a width that copies can swizzle."""
  L, E = x_BLHE.shape[1], x_BLHE.shape[3]
  wide = 32 if E <= 32 else -(-E // 64) * 64
  return jnp.pad(x_BLHE, ((0, 0), (0, -L % TILE), (0, 0), (0, wide - E)))
