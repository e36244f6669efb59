"""Owns the TPU's kernels for single tokens over a cache (Mosaic by Pallas).

All query heads of a key head are rows of one product. A contiguous cache comes in blocks that
the grid's pipeline fetches ahead; blocks without visible keys are not fetched. Pages stay in
HBM: a grid step is a row, which copies several pages at a time, all key heads together, while
it works on those before.
"""

import functools
from typing import Any, Callable, Optional

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
import numpy as np

from models.kernels import online
from models.kernels.decoding import (
  Cache, ContiguousCache, Decoded, PagedCache, check_operands, visible_range,
)
from models.kernels.online import Problem, Range, Softmax

SUBLANES, LANES = 8, 128
BLOCK = 512  # keys: at width 128 in bfloat16 a copy is 128 KiB
BUFFER_BYTES = 8 * 2**20  # of VMEM for pages on their way and at work


def _range(problem: Problem, length: jax.Array) -> Range:
  """Returns what the query of a row of this length sees."""
  return Range(length, *visible_range(length, problem.window, problem.ahead))


def _fold(
  problem: Problem, softmax: Softmax, q_RE: Any, k_ME: Any, v_ME: Any, slopes_R1: Any,
  start: jax.Array, seen: Range,
) -> None:
  """Adds a block of keys to the statistics, masked only where it has invisible keys.

  All but `start` and `seen` are references.
  """
  n_keys = k_ME.shape[0]
  whole = (start >= seen.first) & (start + n_keys <= seen.stop)

  def fold(masked: bool) -> None:
    before = Softmax(*(ref[...] for ref in softmax))
    after = online.folded(
      problem, before, q_RE[...], k_ME[...], v_ME[...], slopes_R1[...], start, seen, masked=masked
    )
    for ref, value in zip(softmax, after):
      ref[...] = value

  pl.when(whole)(functools.partial(fold, False))
  pl.when(~whole)(functools.partial(fold, True))


def _begin(softmax: Softmax) -> None:
  """Empties the statistics behind the references."""
  for ref, value in zip(softmax, online.empty(*softmax.sum_RE.shape)):
    ref[...] = value


def _finish(softmax: Softmax, out_RE: Any, lse_R1: Any) -> None:
  """Writes the results of the statistics behind the references."""
  out, lse = online.finished(Softmax(*(ref[...] for ref in softmax)))
  out_RE[...] = out.astype(out_RE.dtype)
  lse_R1[...] = lse


def _statistics(*leading: int, R: int, E: int) -> list:
  """Returns scratch for statistics."""
  return [pltpu.VMEM((*leading, R, width), jnp.float32) for width in (1, 1, E)]


def _contiguous_kernel(
  problem: Problem, lengths_B, layer_1, q_RE, slopes_R1, k_ME, v_ME, out_RE, lse_R1, *statistics
) -> None:
  """Adds one block of keys to a row and key head."""
  del layer_1  # the blocks' index maps read it
  step, n_steps, softmax = pl.program_id(2), pl.num_programs(2), Softmax(*statistics)
  seen = _range(problem, lengths_B[pl.program_id(0)])
  n_keys = k_ME.shape[0]
  start = (seen.first // n_keys + step) * n_keys
  pl.when(step == 0)(functools.partial(_begin, softmax))

  @pl.when(start < seen.stop)
  def _():
    _fold(problem, softmax, q_RE, k_ME, v_ME, slopes_R1, start, seen)

  pl.when(step == n_steps - 1)(functools.partial(_finish, softmax, out_RE, lse_R1))


def _contiguous(
  problem: Problem, q_BKRE: jax.Array, slopes_KR1: jax.Array, cache: ContiguousCache,
  layer_1: jax.Array, block: int,
) -> Any:
  """Returns the output [B, K, R, E] and the log-sum-exp [B, K, R, 1]."""
  (B, K, R, E), M = q_BKRE.shape, cache.k_NBKME.shape[3]
  block = min(block, M)
  n_steps = -(-M // block)
  if problem.window:  # so many blocks hold all keys of a window wherever it begins
    n_steps = min(n_steps, (problem.window + block - 2) // block + 1)

  def key_index(b, k, step, lengths_B, layer_1):
    seen = _range(problem, lengths_B[b])
    last = jnp.maximum(seen.stop - 1, 0) // block
    return layer_1[0], b, k, jnp.minimum(seen.first // block + step, last), 0

  key_spec = pl.BlockSpec((None, None, None, block, E), key_index)
  row_specs = [
    pl.BlockSpec((None, None, R, width), lambda b, k, *_: (b, k, 0, 0)) for width in (E, 1)
  ]
  return pl.pallas_call(
    functools.partial(_contiguous_kernel, problem),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(B, K, n_steps),
      in_specs=[row_specs[0], pl.BlockSpec((None, R, 1), lambda b, k, *_: (k, 0, 0)),
                key_spec, key_spec],
      out_specs=row_specs, scratch_shapes=_statistics(R=R, E=E),
    ),
    out_shape=[jax.ShapeDtypeStruct((B, K, R, E), q_BKRE.dtype),
               jax.ShapeDtypeStruct((B, K, R, 1), jnp.float32)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary')
    ),
    cost_estimate=_cost(q_BKRE, n_steps * block),
    interpret=problem.interpret,
  )(cache.lengths_B, layer_1, q_BKRE, slopes_KR1, cache.k_NBKME, cache.v_NBKME)


def _cost(q_BKRE: jax.Array, n_keys: int) -> pl.CostEstimate:
  """Returns what a call costs whose rows all have n_keys keys."""
  B, K, R, E = q_BKRE.shape
  return pl.CostEstimate(
    flops=4 * B * K * R * n_keys * E, transcendentals=B * K * R * n_keys,
    bytes_accessed=2 * B * K * n_keys * E * q_BKRE.dtype.itemsize,
  )


def _paged_kernel(
  problem: Problem, n_pages: int, table_BJ, lengths_B, layer_1, q_KRE, slopes_KR1, k_NPKTE, v_NPKTE,
  out_KRE, lse_KR1, k_SKME, v_SKME, semaphores_S2, *statistics,
) -> None:
  """Attends for one row, over chunks of n_pages pages; chunk i fills buffer i % 2 of S."""
  b, T = pl.program_id(0), k_NPKTE.shape[3]
  seen, span = _range(problem, lengths_B[b]), n_pages * T
  heads = range(q_KRE.shape[0])
  low, high = seen.first // span, pl.cdiv(seen.stop, span)

  def each_copy(chunk: jax.Array, act: Callable) -> None:
    """Calls act on the copy of every page of a chunk that has visible keys."""
    for i in range(n_pages):
      page = chunk * n_pages + i

      @pl.when((page * T < seen.stop) & ((page + 1) * T > seen.first))
      def _(i=i, page=page):
        for j, (pages, buffer) in enumerate(((k_NPKTE, k_SKME), (v_NPKTE, v_SKME))):
          act(pltpu.make_async_copy(
            pages.at[layer_1[0], table_BJ[b, page]],
            buffer.at[chunk % 2, :, pl.ds(i * T, T)], semaphores_S2.at[chunk % 2, j],
          ))

  def attend(chunk: jax.Array, _) -> None:
    pl.when(chunk + 1 < high)(lambda: each_copy(chunk + 1, lambda copy: copy.start()))
    each_copy(chunk, lambda copy: copy.wait())
    for h in heads:
      _fold(
        problem, Softmax(*(ref.at[h] for ref in statistics)), q_KRE.at[h],
        k_SKME.at[chunk % 2, h], v_SKME.at[chunk % 2, h], slopes_KR1.at[h], chunk * span, seen,
      )

  for h in heads:
    _begin(Softmax(*(ref.at[h] for ref in statistics)))
  pl.when(low < high)(lambda: each_copy(low, lambda copy: copy.start()))
  jax.lax.fori_loop(low, high, attend, None)
  for h in heads:
    _finish(Softmax(*(ref.at[h] for ref in statistics)), out_KRE.at[h], lse_KR1.at[h])


def _pages_at_a_time(cache: PagedCache, block: int) -> int:
  """Returns how many pages make `block` keys, fewer where two buffers of them don't fit."""
  _, _, K, T, E = cache.k_NPKTE.shape
  page_bytes = K * T * -(-E // LANES) * LANES * cache.k_NPKTE.dtype.itemsize
  fitting = BUFFER_BYTES // (4 * page_bytes)  # keys and values, two chunks of each
  return max(1, min(block // T, fitting, cache.table_BJ.shape[1]))


def _paged(
  problem: Problem, q_BKRE: jax.Array, slopes_KR1: jax.Array, cache: PagedCache,
  layer_1: jax.Array, block: int,
) -> Any:
  """Returns the output [B, K, R, E] and the log-sum-exp [B, K, R, 1]."""
  (B, K, R, E), (T, J) = q_BKRE.shape, (cache.k_NPKTE.shape[3], cache.table_BJ.shape[1])
  dtype = q_BKRE.dtype
  n_pages = _pages_at_a_time(cache, block)
  row_specs = [
    pl.BlockSpec((None, K, R, width), lambda b, *_: (b, 0, 0, 0)) for width in (E, 1)
  ]
  in_hbm = pl.BlockSpec(memory_space=pl.ANY)
  buffer = pltpu.VMEM((2, K, n_pages * T, E), dtype)
  return pl.pallas_call(
    functools.partial(_paged_kernel, problem, n_pages),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3, grid=(B,),
      in_specs=[row_specs[0], pl.BlockSpec((K, R, 1), lambda *_: (0, 0, 0)), in_hbm, in_hbm],
      out_specs=row_specs,
      scratch_shapes=[buffer, buffer, pltpu.SemaphoreType.DMA((2, 2)),
                      *_statistics(K, R=R, E=E)],
    ),
    out_shape=[jax.ShapeDtypeStruct((B, K, R, E), dtype),
               jax.ShapeDtypeStruct((B, K, R, 1), jnp.float32)],
    compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)),
    cost_estimate=_cost(q_BKRE, J * T),
    interpret=problem.interpret,
  )(cache.table_BJ, cache.lengths_B, layer_1, q_BKRE, slopes_KR1, cache.k_NPKTE, cache.v_NPKTE)


def takes_width(width: int) -> bool:
  """Returns whether the kernels take heads of this width."""
  return 32 <= width <= 256 and width % 8 == 0


def _check_supported(q_BHE: jax.Array, cache: Cache, block: int) -> None:
  """Raises ValueError for what the kernels lack, with the alternative."""
  if q_BHE.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(
      f'decode_tpu takes float32 or bfloat16, not {q_BHE.dtype}; decode_xla takes it'
    )
  width, tile = q_BHE.shape[-1], SUBLANES * 4 // q_BHE.dtype.itemsize
  if not takes_width(width):
    raise ValueError(
      f'decode_tpu takes heads of width 32 to 256 in steps of 8, not {width}; decode_xla takes it'
    )
  if block < 1 or block % tile:
    raise ValueError(f'block={block} of decode_tpu is not a multiple of {tile} from {tile} on')
  if isinstance(cache, PagedCache) and cache.k_NPKTE.shape[3] % tile:
    raise ValueError(
      f'decode_tpu takes pages of a multiple of {tile} tokens, not {cache.k_NPKTE.shape[3]}; '
      'decode_xla takes them'
    )


def attention(
  q_BHE: jax.Array, cache: Cache, layer: int | jax.Array, *, scale: float, window: int = 0,
  softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None, ahead: int = 0,
  block: int = BLOCK, interpret: Any = False,
) -> Decoded:
  """Returns attention of one token per row by the TPU kernels; see `decoding.DecodeAttention`.

  Works on `block` keys at a time; `interpret` is that of `pallas_call`. Raises ValueError for
  other widths, dtypes and pages than the kernels take.
  """
  check_operands(q_BHE, cache, alibi_slopes_H)
  _check_supported(q_BHE, cache, block)
  (B, H, E), K = q_BHE.shape, cache[0].shape[2]
  G = H // K
  rows = (0, -G % SUBLANES)
  slopes_H = np.zeros(H, np.float32) if alibi_slopes_H is None else alibi_slopes_H
  slopes_KR1 = jnp.pad(jnp.asarray(slopes_H, jnp.float32).reshape(K, G, 1), ((0, 0), rows, (0, 0)))
  q_BKRE = jnp.pad(q_BHE.reshape(B, K, G, E), ((0, 0), (0, 0), rows, (0, 0)))
  problem = Problem(scale, window, softcap, ahead, alibi_slopes_H is not None, interpret)
  run = _contiguous if isinstance(cache, ContiguousCache) else _paged
  out_BKRE, lse_BKR1 = run(
    problem, q_BKRE, slopes_KR1, cache, jnp.asarray(layer, jnp.int32).reshape(1), block
  )
  return Decoded(out_BKRE[:, :, :G].reshape(B, H, E), lse_BKR1[:, :, :G].reshape(B, H))
