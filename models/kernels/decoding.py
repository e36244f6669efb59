"""Owns what attention of single tokens over a cache takes and returns.

Caches are head-major: the keys of one row and head lie together, so that a block of them is
whole tiles on a TPU whatever the number of heads, and one matrix without a transpose in XLA.
They are stacked over layers and read in place; no layer is ever copied out for a kernel.
Letters here: P pages, T tokens of a page, J entries of a row's block table.
"""

from typing import NamedTuple, Optional, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from models.kernels.interface import HIDDEN

PAGE = 16  # tokens: one tile of bfloat16 on a TPU, the least that a GPU's matrix unit takes


class ContiguousCache(NamedTuple):
  """Keys and values of rows with `lengths_B` (int32) tokens so far, room for M in each.

  A model may keep a tuple of [1, B, K, M, E] in place of the stack; see `of_layer`.
  """

  k_NBKME: jax.Array
  v_NBKME: jax.Array
  lengths_B: jax.Array


class PagedCache(NamedTuple):
  """Keys and values in pages that rows own by their block tables.

  Token t of row b is token t % T of page table_BJ[b, t // T]. Tables and lengths are int32;
  entries of a table past its row's length may be any number.
  """

  k_NPKTE: jax.Array
  v_NPKTE: jax.Array
  table_BJ: jax.Array
  lengths_B: jax.Array


Cache = ContiguousCache | PagedCache


def of_layer(cache: Cache, layer: int | jax.Array) -> tuple[Cache, int | jax.Array]:
  """Returns the stacked cache that holds a layer and the layer's index in it.

  Where a model's layers are unrolled each may have arrays of its own: XLA on CPUs copies a
  layer that it reads out of a stack.
  """
  keys, values, *rest = cache
  if isinstance(keys, tuple):
    return type(cache)(keys[layer], values[layer], *rest), 0
  return cache, layer


class Decoded(NamedTuple):
  """Output [B, H, E] in the dtype of the queries and float32 log-sum-exp [B, H].

  A query that sees no key has output 0 and log-sum-exp HIDDEN.
  """

  out_BHE: jax.Array
  lse_BH: jax.Array


class DecodeAttention(Protocol):
  """Attention of one query per row and head over a layer of a cache.

  Queries [B, H, E] have the dtype of the cache; H is a multiple of K. A row's query stands
  `ahead` positions after the last of its keys: 0 where its own key is in the cache. It sees
  keys at indices below its row's length and, with a window w > 0, less than w away. Other
  keys may hold any finite numbers. `layer` is an index, maybe traced; slopes are ALiBi's.
  """

  def __call__(
    self, q_BHE: jax.Array, cache: Cache, layer: int | jax.Array, *, scale: float,
    window: int = 0, softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None,
    ahead: int = 0,
  ) -> Decoded: ...


def visible_range(lengths: jax.Array, window: int, ahead: int) -> tuple[jax.Array, jax.Array]:
  """Returns the first key that each query sees and the end of its keys; may be empty."""
  first = jnp.maximum(lengths + ahead - window, 0) if window else jnp.zeros_like(lengths)
  return jnp.minimum(first, lengths), lengths


def merged(outs: jax.Array, lses: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns attention over all keys from attention over parts of them.

  Takes outputs [S, ..., E] and log-sum-exps [S, ...] of S parts; returns [..., E] float32 and
  [...]: the softmax of the log-sum-exps weighs the outputs.
  """
  top = jnp.maximum(jnp.max(lses, axis=0), HIDDEN / 2)
  weights = jnp.exp(lses - top)
  total = jnp.sum(weights, axis=0)
  seen = total > 0
  total = jnp.where(seen, total, 1.0)
  out = jnp.sum(outs.astype(jnp.float32) * (weights / total)[..., None], axis=0)
  return out, jnp.where(seen, top + jnp.log(total), HIDDEN)


def check_operands(
  q_BHE: jax.Array, cache: Cache, alibi_slopes_H: Optional[np.ndarray] = None
) -> None:
  """Raises ValueError in one sentence when queries and a cache do not fit."""
  (B, H, E), (keys, values) = q_BHE.shape, cache[:2]
  if keys.ndim != 5 or keys.shape != values.shape or keys.shape[4] != E:
    raise ValueError(
      f'queries {q_BHE.shape}, keys {keys.shape} and values {values.shape} do not fit; they are '
      '[B, H, E] and twice [N, B, K, M, E], or [N, P, K, T, E] in pages'
    )
  if H % keys.shape[2]:
    raise ValueError(f'{H} query heads are not a multiple of {keys.shape[2]} key heads')
  if not q_BHE.dtype == keys.dtype == values.dtype:
    raise ValueError(
      f'queries, keys and values are {q_BHE.dtype}, {keys.dtype} and {values.dtype}; cast them '
      'to one dtype'
    )
  n_rows = len(cache.table_BJ) if isinstance(cache, PagedCache) else keys.shape[1]
  if not B == n_rows == len(cache.lengths_B):
    raise ValueError(
      f'{B} queries do not fit a cache of {n_rows} rows and {len(cache.lengths_B)} lengths'
    )
  if alibi_slopes_H is not None and alibi_slopes_H.shape != (H,):
    raise ValueError(f'ALiBi slopes {alibi_slopes_H.shape} do not fit {H} query heads')
