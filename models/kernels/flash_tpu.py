"""Owns the TPU's attention kernels, forward and backward (Dao et al. 2022; Mosaic by Pallas).

A grid step is one live pair of a block of queries and a block of keys (`pairs.live_pairs`);
dead pairs are no steps at all. Logits are [queries, keys], but [keys, queries] in the gradients
of keys and values. Statistics of a query are kept as columns repeated over the lanes, so that
none has to be spread again, and travel through memory as rows.
"""

import functools
from typing import Any, Callable, NamedTuple, Optional

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from models.kernels.blocks import blocks_for, device_kind
from models.kernels.interface import HIDDEN, Attended, Mask, check_operands, softcapped
from models.kernels.online import dot
from models.kernels.pairs import FIRST, LAST, MASKED
from models.kernels.tpu_grid import Operands, Problem, cost, specs, visited_pairs

LANES = 128


def _column(row_1L: jax.Array) -> jax.Array:
  """Returns a row [1, L] as a column repeated over the lanes, [L, LANES]."""
  return jnp.broadcast_to(row_1L, (LANES, row_1L.shape[1])).T


def _spread(column_LN: jax.Array, width: int) -> jax.Array:
  """Returns a column that is repeated over the lanes at another width, [L, width]."""
  copies = -(-width // LANES)
  return jnp.concatenate([column_LN] * copies, axis=1)[:, :width]


class Refs(NamedTuple):
  """Inputs of a grid step; all blocks of one head."""

  q_LE: Any
  k_ME: Any
  v_ME: Any
  q_segments_1L: Any
  k_segments_1M: Any


def _logits(
  problem: Problem, refs: Refs, slope: Any, q_block: jax.Array, k_block: jax.Array,
  masked: bool, by_keys: bool,
) -> tuple[jax.Array, jax.Array]:
  """Returns soft-capped products and the logits of a pair of blocks, float32.

  They are [queries, keys], or [keys, queries] if `by_keys`; so the array that comes first in
  every product after them need not be transposed.
  """
  x, y = (refs.k_ME, refs.q_LE) if by_keys else (refs.q_LE, refs.k_ME)
  products_LM = dot(x[...], y[...], (1, 1))
  capped_LM = softcapped(products_LM * problem.scale, problem.softcap)
  logits_LM = capped_LM
  shape = logits_LM.shape
  queries_LM = jax.lax.broadcasted_iota(jnp.int32, shape, int(by_keys)) + (
    q_block * problem.q_block + problem.mask.q_offset
  )
  keys_LM = jax.lax.broadcasted_iota(jnp.int32, shape, int(not by_keys)) + (
    k_block * problem.k_block
  )
  if problem.has_slopes:
    logits_LM -= slope * jnp.abs(queries_LM - keys_LM).astype(jnp.float32)
  visible_LM = None
  if masked:
    visible_LM = problem.mask.visible(queries_LM, keys_LM) & (keys_LM < problem.n_keys)
  if problem.has_segments:
    rows, columns = refs.k_segments_1M, refs.q_segments_1L
    if by_keys:
      rows, columns = columns, rows
    columns_LM = _spread(_column(columns[...]), shape[1])
    same_LM = (rows[...] == columns_LM) & (columns_LM != 0)
    visible_LM = same_LM if visible_LM is None else visible_LM & same_LM
  if visible_LM is not None:
    logits_LM = jnp.where(visible_LM, logits_LM, HIDDEN)
  return capped_LM, logits_LM


def _on_pair(
  problem: Problem, flags: jax.Array, start: Callable, step: Callable[[bool], None],
  finish: Callable, *, opens: Any = True, closes: Any = True,
) -> None:
  """Runs a grid step: start before a block's first pair, finish after its last."""
  pl.when((flags & FIRST != 0) & opens)(start)
  for masked in problem.steps:
    pl.when((flags & MASKED != 0) == masked)(functools.partial(step, masked))
  pl.when((flags & LAST != 0) & closes)(finish)


def _forward_kernel(
  problem: Problem, q_block, k_block, flags, slopes_H, q, k, v, q_segments, k_segments,
  out_LE, lse_1L, top_LN, total_LN, sum_LE,
) -> None:
  """Accumulates one pair into the output and the statistics of its queries."""
  pair, slope = pl.program_id(2), slopes_H[pl.program_id(1)]
  refs = Refs(q, k, v, q_segments, k_segments)

  def start() -> None:
    # At least HIDDEN / 2: a query that sees no key has weights 0, not 1.
    top_LN[...] = jnp.full(top_LN.shape, HIDDEN / 2, jnp.float32)
    total_LN[...] = jnp.zeros(total_LN.shape, jnp.float32)
    sum_LE[...] = jnp.zeros(sum_LE.shape, jnp.float32)

  def step(masked: bool) -> None:
    _, logits_LM = _logits(problem, refs, slope, q_block[pair], k_block[pair], masked, False)
    old_LN = top_LN[...]
    new_LN = jnp.maximum(old_LN, jnp.max(logits_LM, axis=1, keepdims=True))
    weights_LM = jnp.exp(logits_LM - _spread(new_LN, logits_LM.shape[1]))
    fade_LN = jnp.exp(old_LN - new_LN)
    total_LN[...] = total_LN[...] * fade_LN + jnp.sum(weights_LM, axis=1, keepdims=True)
    faded_LE = sum_LE[...] * _spread(fade_LN, sum_LE.shape[1])
    sum_LE[...] = faded_LE + dot(weights_LM.astype(v.dtype), v[...], (1, 0))
    top_LN[...] = new_LN

  def finish() -> None:
    seen_LN = total_LN[...] > 0
    divisor_LN = jnp.where(seen_LN, total_LN[...], 1.0)
    out_LE[...] = (sum_LE[...] / _spread(divisor_LN, sum_LE.shape[1])).astype(out_LE.dtype)
    lse_1L[...] = jnp.where(seen_LN, top_LN[...] + jnp.log(divisor_LN), HIDDEN).T[:1]

  _on_pair(problem, flags[pair], start, step, finish)


def _weights_and_gradient(
  problem: Problem, refs: Refs, slope, q_block, k_block, masked: bool, g_LE, rows_2L,
  by_keys: bool,
) -> tuple[jax.Array, jax.Array]:
  """Returns the softmax weights and the gradient of the products of a pair of blocks.

  Both are [queries, keys], or [keys, queries] if `by_keys`. The rows are the log-sum-exp and
  the inner products of outputs and cotangents.
  """
  capped_LM, logits_LM = _logits(problem, refs, slope, q_block, k_block, masked, by_keys)
  lse_1L, inner_1L = jnp.maximum(rows_2L[:1], HIDDEN / 2), rows_2L[1:]
  if by_keys:
    weights_LM = jnp.exp(logits_LM - lse_1L)
    d_weights_LM = dot(refs.v_ME[...], g_LE[...], (1, 1)) - inner_1L
  else:
    M = logits_LM.shape[1]
    weights_LM = jnp.exp(logits_LM - _spread(_column(lse_1L), M))
    d_weights_LM = dot(g_LE[...], refs.v_ME[...], (1, 1)) - _spread(_column(inner_1L), M)
  d_logits_LM = weights_LM * d_weights_LM * problem.scale
  if problem.softcap:
    d_logits_LM *= 1 - (capped_LM / problem.softcap) ** 2
  return weights_LM, d_logits_LM


def _queries_kernel(
  problem: Problem, q_block, k_block, flags, slopes_H, q, k, v, q_segments, k_segments,
  g, rows, d_q_LE, sum_LE,
) -> None:
  """Accumulates one pair into the gradient of its queries."""
  pair, slope = pl.program_id(2), slopes_H[pl.program_id(1)]
  refs = Refs(q, k, v, q_segments, k_segments)

  def start() -> None:
    sum_LE[...] = jnp.zeros(sum_LE.shape, jnp.float32)

  def step(masked: bool) -> None:
    _, d_logits_LM = _weights_and_gradient(
      problem, refs, slope, q_block[pair], k_block[pair], masked, g, rows, by_keys=False
    )
    sum_LE[...] += dot(d_logits_LM.astype(k.dtype), k[...], (1, 0))

  def finish() -> None:
    d_q_LE[...] = sum_LE[...].astype(d_q_LE.dtype)

  _on_pair(problem, flags[pair], start, step, finish)


def _keys_kernel(
  problem: Problem, q_block, k_block, flags, slopes_H, q, k, v, q_segments, k_segments,
  g, rows, d_k_ME, d_v_ME, sum_k_ME, sum_v_ME,
) -> None:
  """Accumulates one pair and one query head into the gradients of its keys and values."""
  pair, refs = pl.program_id(2), Refs(q, k, v, q_segments, k_segments)
  group, n_groups = pl.program_id(3), pl.num_programs(3)
  slope = slopes_H[pl.program_id(1) * n_groups + group]

  def start() -> None:
    sum_k_ME[...] = jnp.zeros(sum_k_ME.shape, jnp.float32)
    sum_v_ME[...] = jnp.zeros(sum_v_ME.shape, jnp.float32)

  def step(masked: bool) -> None:
    weights_ML, d_logits_ML = _weights_and_gradient(
      problem, refs, slope, q_block[pair], k_block[pair], masked, g, rows, by_keys=True
    )
    sum_v_ME[...] += dot(weights_ML.astype(g.dtype), g[...], (1, 0))
    sum_k_ME[...] += dot(d_logits_ML.astype(q.dtype), q[...], (1, 0))

  def finish() -> None:
    d_k_ME[...] = sum_k_ME[...].astype(d_k_ME.dtype)
    d_v_ME[...] = sum_v_ME[...].astype(d_v_ME.dtype)

  _on_pair(
    problem, flags[pair], start, step, finish, opens=group == 0, closes=group == n_groups - 1
  )


def _without_segments(kernel: Callable) -> Callable:
  """Returns a kernel that is given no segments: fewer blocks to keep track of in every step."""

  def call(q_block, k_block, flags, slopes_H, q, k, v, *rest):
    return kernel(q_block, k_block, flags, slopes_H, q, k, v, None, None, *rest)

  return call


def _call(
  problem: Problem, kernel: Callable, operands: Operands, extra: dict[str, tuple[str, jax.Array]],
  outs: dict[str, tuple[str, Any]], *, by_keys: bool, scratch: list, n_dots: int,
) -> Any:
  """Runs a kernel over all live pairs of every head.

  The grid is (batch, head, pair), or (batch, key head, pair, head of its group) by keys.
  `extra` gives further operands and `outs` the results' dtypes, each with its kind, one of
  those of `specs`. A step of the kernel computes `n_dots` products of the size of q k^T.
  """
  B, H, L, E = operands.q_BHLE.shape
  K, M = operands.k_BKME.shape[1:3]
  problem, pairs = visited_pairs(problem, by_keys=by_keys)
  n_pairs = len(pairs.flags)
  dtype = operands.q_BHLE.dtype
  arrays = [('q', operands.q_BHLE), ('k', operands.k_BKME), ('k', operands.v_BKME)]
  name = 'flash_tpu' + kernel.__name__.removesuffix('_kernel')
  kernel = functools.partial(kernel, problem)
  if problem.has_segments:
    arrays += [('q row', operands.q_segments_B1L), ('key row', operands.k_segments_B1M)]
  else:
    kernel = _without_segments(kernel)
  arrays += extra.values()
  inputs = [(kind, x.dtype) for kind, x in arrays]
  shapes = {'q': (B, H, L, E), 'k': (B, K, M, E), 'row': (B, H, 1, L)}
  blocks = specs(problem, H, K, E, by_keys=by_keys)
  semantics = ('parallel', 'parallel', 'arbitrary') + ('arbitrary',) * by_keys
  return pl.pallas_call(
    kernel,
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=4,
      grid=(B, K, n_pairs, H // K) if by_keys else (B, H, n_pairs),
      in_specs=[blocks[kind] for kind, _ in inputs],
      out_specs=[blocks[kind] for kind, _ in outs.values()],
      scratch_shapes=scratch,
    ),
    out_shape=[jax.ShapeDtypeStruct(shapes[kind], dtype) for kind, dtype in outs.values()],
    compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
    cost_estimate=cost(
      problem, operands, pairs, [*inputs, *outs.values()], by_keys=by_keys, n_dots=n_dots
    ),
    interpret=problem.interpret, name=name,
  )(*(jnp.asarray(x) for x in pairs), operands.slopes_H, *(x for _, x in arrays))


def _forward(problem: Problem, operands: Operands):
  """Returns the output [B, H, L, E], the log-sum-exp [B, H, 1, L] and residuals."""
  E = operands.q_BHLE.shape[-1]
  columns = [pltpu.VMEM((problem.q_block, LANES), jnp.float32) for _ in range(2)]
  out_BHLE, lse_BH1L = _call(
    problem, _forward_kernel, operands, {},
    {'out': ('q', operands.q_BHLE.dtype), 'lse': ('row', jnp.float32)}, by_keys=False,
    scratch=[*columns, pltpu.VMEM((problem.q_block, E), jnp.float32)], n_dots=2,
  )
  return (out_BHLE, lse_BH1L), (operands, out_BHLE, lse_BH1L)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(problem: Problem, operands: Operands):
  """Returns the output [B, H, L, E] and the log-sum-exp [B, H, 1, L]."""
  return _forward(problem, operands)[0]


def _backward(problem: Problem, residuals, g):
  """Returns the gradients of queries, keys and values."""
  operands, out_BHLE, lse_BH1L = residuals
  g_BHLE, g_lse_BH1L = g
  E = out_BHLE.shape[-1]
  inner_BHL = jnp.sum(out_BHLE.astype(jnp.float32) * g_BHLE.astype(jnp.float32), axis=-1)
  # One array of two rows: a grid step keeps track of one copy less.
  rows_BH2L = jnp.concatenate([lse_BH1L, inner_BHL[:, :, None] - g_lse_BH1L], axis=2)
  extra = {'g': ('q', g_BHLE), 'rows': ('two rows', rows_BH2L)}
  (d_q_BHLE,) = _call(
    problem, _queries_kernel, operands, extra, {'d_q': ('q', operands.q_BHLE.dtype)},
    by_keys=False, scratch=[pltpu.VMEM((problem.q_block, E), jnp.float32)], n_dots=3,
  )
  dtype = operands.k_BKME.dtype
  d_k_BKME, d_v_BKME = _call(
    problem, _keys_kernel, operands, extra, {'d_k': ('k', dtype), 'd_v': ('k', dtype)},
    by_keys=True, scratch=[pltpu.VMEM((problem.k_block, E), jnp.float32) for _ in range(2)],
    n_dots=4,
  )
  return (Operands(d_q_BHLE, d_k_BKME, d_v_BKME, jnp.zeros_like(operands.slopes_H), None, None),)


_attend.defvjp(_forward, _backward)


def _padded(x: jax.Array, axis: int, block: int) -> jax.Array:
  """Returns x with zeros appended so that `axis` is whole blocks."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = (0, -x.shape[axis] % block)
  return jnp.pad(x, padding)


def takes_width(width: int) -> bool:
  """Returns whether the kernels take heads of this width."""
  return 32 <= width <= 256 and width % 8 == 0


def _check_supported(q_BLHE: jax.Array, q_block: int, k_block: int) -> None:
  """Raises ValueError for what the kernels lack, with the alternative."""
  dtype, width = q_BLHE.dtype, q_BLHE.shape[-1]
  if dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f'flash_tpu takes float32 or bfloat16, not {dtype}; blockwise takes it')
  if not takes_width(width):
    raise ValueError(
      f'flash_tpu takes heads of width 32 to 256 in steps of 8, not {width}; blockwise takes it'
    )
  if min(q_block, k_block) < LANES or q_block % LANES or k_block % LANES:
    raise ValueError(f'blocks {q_block} and {k_block} of flash_tpu are not multiples of {LANES}')


def attention(
  q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array, *, scale: float, mask: Mask = Mask(),
  segment_ids_BL: Optional[jax.Array] = None, key_segment_ids_BM: Optional[jax.Array] = None,
  softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None, q_block: int = 0,
  k_block: int = 0, interpret: Any = False,
) -> Attended:
  """Returns attention by the TPU kernels; see `interface.Attention`.

  Heads are 32 to 256 wide in steps of 8, blocks multiples of 128 rows, those of
  `blocks.TABLE` where 0; `interpret` is that of `pallas_call`. Raises ValueError for other
  widths, blocks and dtypes.
  """
  check_operands(
    q_BLHE, k_BMKE, v_BMKE, segment_ids_BL, key_segment_ids_BM, alibi_slopes_H
  )
  B, L, H, E = q_BLHE.shape
  M = k_BMKE.shape[1]
  reach = min(n for n in (M, mask.window, mask.chunk) if n)
  table = blocks_for(device_kind(), q_BLHE.dtype.name, E, reach)
  q_block, k_block = q_block or table[0], k_block or table[1]
  _check_supported(q_BLHE, q_block, k_block)
  q_block, k_block = (min(n, -(-x // LANES) * LANES) for n, x in ((q_block, L), (k_block, M)))
  has_segments, has_slopes = segment_ids_BL is not None, alibi_slopes_H is not None
  if has_segments and key_segment_ids_BM is None:
    key_segment_ids_BM = segment_ids_BL
  slopes_H = np.zeros(H) if alibi_slopes_H is None else alibi_slopes_H
  problem = Problem(
    mask, scale, softcap, L, M, q_block, k_block, has_segments, has_slopes, interpret
  )
  operands = Operands(
    _padded(q_BLHE.transpose(0, 2, 1, 3), 2, q_block),
    *(_padded(x.transpose(0, 2, 1, 3), 2, k_block) for x in (k_BMKE, v_BMKE)),
    jnp.asarray(slopes_H, jnp.float32),
    _padded(segment_ids_BL, 1, q_block)[:, None] if has_segments else None,
    _padded(key_segment_ids_BM, 1, k_block)[:, None] if has_segments else None,
  )
  out_BHLE, lse_BH1L = _attend(problem, operands)
  return Attended(out_BHLE[:, :, :L].transpose(0, 2, 1, 3), lse_BH1L[:, :, 0, :L])
