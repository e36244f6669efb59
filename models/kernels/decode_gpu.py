"""Owns the GPU's kernel for single tokens over a cache (Triton by Pallas).

The keys that a row sees are split over programs, so that few rows still fill the device; the
parts are merged by log-sum-exp (flash-decoding, Dao et al. 2023). Contiguous and paged caches
differ only in where a key lies.
"""

import functools
from typing import Any, Optional

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
import jax.numpy as jnp
import numpy as np

from models.kernels import online
from models.kernels.decoding import (
  Cache, ContiguousCache, Decoded, check_operands, merged, visible_range,
)
from models.kernels.online import Problem, Range

WIDTHS = (32, 64, 128, 256)  # Triton works on powers of two
LEAST_ROWS = 16  # of a matrix product on the tensor cores
PROGRAMS = 264  # two for each multiprocessor of an H100
BLOCK = 64  # keys


def _kernel(
  problem: Problem, block: int, is_paged: bool, layer_1, lengths_B, q_RE, slopes_R, keys, values,
  *rest,
) -> None:
  """Attends over one split of a row's keys for one key head; `rest` is the table if paged, outs."""
  *table, out_RE, lse_R = rest
  b, h, split = pl.program_id(0), pl.program_id(1), pl.program_id(2)
  layer, length = layer_1[0], lengths_B[b]
  seen = Range(length, *visible_range(length, problem.window, problem.ahead))
  q, slopes_R1 = q_RE[...], slopes_R[...][:, None]
  low, high = seen.first // block, pl.cdiv(seen.stop, block)
  share = pl.cdiv(high - low, pl.num_programs(2))
  begin = low + split * share

  def fold(i: jax.Array, softmax: online.Softmax) -> online.Softmax:
    # Places past the end read the last key, which then weighs nothing.
    index_M = jnp.minimum(i * block + jnp.arange(block), seen.stop - 1)
    if is_paged:
      T = keys.shape[3]
      place = (layer, table[0][b, index_M // T], h, index_M % T)
    else:
      place = (layer, b, h, index_M)
    return online.folded(
      problem, softmax, q, keys[place], values[place], slopes_R1, i * block, seen, masked=True
    )

  softmax = online.empty(*q.shape)
  softmax = jax.lax.fori_loop(begin, jnp.minimum(begin + share, high), fold, softmax)
  out, lse_R1 = online.finished(softmax)
  out_RE[...] = out
  lse_R[...] = lse_R1[:, 0]


def _parts(
  problem: Problem, q_BKRE: jax.Array, slopes_KR: jax.Array, cache: Cache, layer_1: jax.Array,
  block: int, n_splits: int,
) -> tuple[jax.Array, jax.Array]:
  """Returns each split's output [S, B, K, R, E] and log-sum-exp [S, B, K, R], float32."""
  B, K, R, E = q_BKRE.shape
  is_paged = not isinstance(cache, ContiguousCache)
  whole = pl.BlockSpec()
  return pl.pallas_call(
    functools.partial(_kernel, problem, block, is_paged),
    grid=(B, K, n_splits),
    in_specs=[
      whole, whole, pl.BlockSpec((None, None, R, E), lambda b, k, s: (b, k, 0, 0)),
      pl.BlockSpec((None, R), lambda b, k, s: (k, 0)), *[whole] * (2 + is_paged),
    ],
    out_specs=[
      pl.BlockSpec((None, None, None, R, E), lambda b, k, s: (s, b, k, 0, 0)),
      pl.BlockSpec((None, None, None, R), lambda b, k, s: (s, b, k, 0)),
    ],
    out_shape=[jax.ShapeDtypeStruct((n_splits, B, K, R, E), jnp.float32),
               jax.ShapeDtypeStruct((n_splits, B, K, R), jnp.float32)],
    compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
    interpret=problem.interpret,
    name='decode_gpu',
  )(layer_1, cache.lengths_B, q_BKRE, slopes_KR, *cache[: 2 + is_paged])


def takes_width(width: int) -> bool:
  """Returns whether the kernel takes heads of this width."""
  return width in WIDTHS


def _check_supported(q_BHE: jax.Array, block: int) -> None:
  """Raises ValueError for what the kernel lacks, with the alternative."""
  if q_BHE.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(
      f'decode_gpu takes float32 or bfloat16, not {q_BHE.dtype}; decode_xla takes it'
    )
  if not takes_width(q_BHE.shape[-1]):
    raise ValueError(
      f'decode_gpu takes heads of width {", ".join(map(str, WIDTHS))}, not {q_BHE.shape[-1]}; '
      'decode_xla takes it'
    )
  if block < LEAST_ROWS or block & (block - 1):
    raise ValueError(f'block={block} of decode_gpu is not a power of two of at least {LEAST_ROWS}')


def _splits(cache: Cache, n_heads: int, window: int, block: int) -> int:
  """Returns how many programs share the keys of each row and key head, all rows' n_heads."""
  room = cache[0].shape[3]
  if not isinstance(cache, ContiguousCache):
    room *= cache.table_BJ.shape[1]
  n_blocks = -(-(min(room, window) if window else room) // block)
  return max(1, min(PROGRAMS // n_heads, n_blocks))


def attention(
  q_BHE: jax.Array, cache: Cache, layer: int | jax.Array, *, scale: float, window: int = 0,
  softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None, ahead: int = 0,
  block: int = BLOCK, n_splits: int = 0, interpret: Any = False,
) -> Decoded:
  """Returns attention of one token per row by the GPU kernel; see `decoding.DecodeAttention`.

  Works on `block` keys at a time; `n_splits` programs share a row's keys, 0 takes as many as
  fill the device; `interpret` is that of `pallas_call`. Raises ValueError for other widths and
  dtypes than the kernel takes.
  """
  check_operands(q_BHE, cache, alibi_slopes_H)
  _check_supported(q_BHE, block)
  (B, H, E), K = q_BHE.shape, cache[0].shape[2]
  G = H // K
  n_splits = n_splits or _splits(cache, B * K, window, block)
  n_rows = max(LEAST_ROWS, 1 << (G - 1).bit_length())
  rows = (0, n_rows - G)
  slopes_H = np.zeros(H, np.float32) if alibi_slopes_H is None else alibi_slopes_H
  slopes_KR = jnp.pad(jnp.asarray(slopes_H, jnp.float32).reshape(K, G), ((0, 0), rows))
  q_BKRE = jnp.pad(q_BHE.reshape(B, K, G, E), ((0, 0), (0, 0), rows, (0, 0)))
  problem = Problem(scale, window, softcap, ahead, alibi_slopes_H is not None, interpret)
  parts = _parts(
    problem, q_BKRE, slopes_KR, cache, jnp.asarray(layer, jnp.int32).reshape(1), block, n_splits
  )
  out_BKRE, lse_BKR = merged(*parts)
  out_BHE = out_BKRE[:, :, :G].reshape(B, H, E).astype(q_BHE.dtype)
  return Decoded(out_BHE, lse_BKR[:, :, :G].reshape(B, H))
