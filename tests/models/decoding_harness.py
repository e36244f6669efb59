"""Holds attention of single tokens over a cache to the oracle in float64, row by row."""

import dataclasses
import functools
from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np

from models.kernels import oracle
from models.kernels.decoding import PAGE, Cache, ContiguousCache, PagedCache
from models.kernels.interface import HIDDEN, Mask
from models.positions import alibi_slopes
from tests.models.attention_harness import TOLERANCE, relative

FAR = 1e4  # what invisible places hold: a kernel that reads one is far off


@dataclasses.dataclass(frozen=True)
class Case:
  """A problem: lengths of its rows, sizes and features; `page` None is a contiguous cache."""

  lengths: tuple[int, ...] = (1, 37, 0, 20)
  M: int = 37
  H: int = 4
  K: int = 2
  E: int = 32
  window: int = 0
  softcap: float = 0.0
  alibi: bool = False
  scale: float = 0.3
  ahead: int = 0
  page: Optional[int] = None
  layer: int = 1
  dtype: str = 'float32'

  def operands(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns queries [B, H, E], keys and values [B, K, M, E] of unit scale, in the dtype."""
    rng = np.random.default_rng(0)
    B, M, H, K, E = len(self.lengths), self.M, self.H, self.K, self.E
    shapes = ((B, H, E), (B, K, M, E), (B, K, M, E))
    return tuple(rng.normal(size=shape).astype(jnp.dtype(self.dtype)) for shape in shapes)

  def options(self) -> dict:
    """Returns the keyword arguments of an attention."""
    slopes = alibi_slopes(self.H) if self.alibi else None
    return dict(scale=self.scale, window=self.window, softcap=self.softcap, ahead=self.ahead,
                alibi_slopes_H=slopes)

  def cache(self) -> Cache:
    """Returns the cache of the operands as the last of two layers, FAR wherever no key is."""
    _, k_BKME, v_BKME = self.operands()
    lengths_B = jnp.asarray(self.lengths, jnp.int32)
    beyond_BM = np.arange(self.M) >= np.array(self.lengths)[:, None]
    arrays = []
    for x_BKME in (k_BKME, v_BKME):
      x_NBKME = np.full((2, *x_BKME.shape), FAR, x_BKME.dtype)
      x_NBKME[self.layer] = np.where(beyond_BM[:, None, :, None], x_NBKME[0], x_BKME)
      arrays.append(x_NBKME)
    if self.page is None:
      return ContiguousCache(*map(jnp.asarray, arrays), lengths_B)
    pools, table_BJ = zip(*(paged(x_NBKME, self.lengths, self.page) for x_NBKME in arrays))
    return PagedCache(*map(jnp.asarray, pools), jnp.asarray(table_BJ[0]), lengths_B)


def paged(
  x_NBKME: np.ndarray, lengths: tuple[int, ...], page: int
) -> tuple[np.ndarray, np.ndarray]:
  """Returns pages [N, P, K, T, E] in random order with some to spare, and the block table."""
  N, B, K, M, E = x_NBKME.shape
  J = -(-M // page)
  rng = np.random.default_rng(2)
  table_BJ = rng.permutation(B * J + 3)[: B * J].reshape(B, J).astype(np.int32)
  pages_NPKTE = np.full((N, B * J + 3, K, page, E), FAR, x_NBKME.dtype)
  for b, m in np.ndindex(B, M):
    pages_NPKTE[:, table_BJ[b, m // page], :, m % page] = x_NBKME[:, b, :, m]
  for b, n in enumerate(lengths):
    table_BJ[b, -(-n // page):] = 10**6  # entries past the length may be anything
  return pages_NPKTE, table_BJ


@functools.cache
def expected(case: Case) -> tuple[np.ndarray, np.ndarray]:
  """Returns output [B, H, E] and log-sum-exp [B, H] by the oracle.

  Each row's query is asked at every position, over its own keys only, and the answer at its
  own position is taken.
  """
  B, L = len(case.lengths), case.M + case.ahead
  q_BHE, k_BKME, v_BKME = (np.asarray(x, np.float64) for x in case.operands())
  own_BM = (np.arange(case.M) < np.array(case.lengths)[:, None]).astype(np.int32)
  options = {k: v for k, v in case.options().items() if k not in ('window', 'ahead')}
  attend = functools.partial(oracle.attention, mask=Mask(window=case.window), **options)
  with jax.enable_x64():
    out_BLHE, lse_BHL = jax.jit(attend)(
      np.repeat(q_BHE[:, None], L, axis=1), k_BKME.swapaxes(1, 2), v_BKME.swapaxes(1, 2),
      segment_ids_BL=np.ones((B, L), np.int32), key_segment_ids_BM=own_BM,
    )
  rows, places = np.arange(B), np.maximum(np.array(case.lengths) - 1 + case.ahead, 0)
  return np.asarray(out_BLHE)[rows, places], np.asarray(lse_BHL)[rows, :, places]


def errors(attend, case: Case) -> dict[str, float]:
  """Returns the relative errors of both results, the worst of all rows.

  A query that sees nothing has to give exactly 0 and HIDDEN, or its error is infinite.
  """
  q_BHE = jnp.asarray(case.operands()[0])
  run = jax.jit(lambda q, cache: attend(q, cache, case.layer, **case.options()))
  out_BHE, lse_BH = (np.asarray(x, np.float64) for x in run(q_BHE, case.cache()))
  want_BHE, want_BH = expected(dataclasses.replace(case, page=None))
  blind_B = (want_BH == HIDDEN).all(1)
  if (out_BHE[blind_B] != 0).any() or (lse_BH[blind_B] != np.float32(HIDDEN)).any():
    return {'blind queries': np.inf}
  rows = np.flatnonzero(~blind_B)
  return {'out': max((relative(out_BHE[b], want_BHE[b]) for b in rows), default=0.0),
          'lse': max((relative(lse_BH[b], want_BH[b]) for b in rows), default=0.0)}


def rejected(measured: dict[str, float], case: Case) -> list[str]:
  """Returns the names of the results that are off by more than the tolerance, or NaN."""
  return [name for name, error in measured.items() if not error <= TOLERANCE[case.dtype]]


# Every feature alone and together; lengths that end inside a block, at its end, and at 0.
CASES = {
  'plain': Case(),
  'one key head': Case(H=8, K=1, E=64, softcap=1.5),
  'a key head each': Case(K=4, window=5, alibi=True, E=40),
  'window': Case(window=7, softcap=0.7),
  'window, query ahead': Case(window=3, ahead=1, alibi=True),
  'far ahead of its window': Case(lengths=(5, 9, 0), M=9, window=4, ahead=6),
  'three heads to a key head': Case(H=6, K=2, E=128, ahead=1),
  'wide': Case(E=256, H=2, K=1, scale=0.06, alibi=True),
  'bfloat16': Case(dtype='bfloat16', E=64, softcap=2.0),
}


def in_pages(case: Case, page: int = PAGE) -> Case:
  """Returns the case with its keys in pages."""
  return dataclasses.replace(case, page=page)


# Rows of several blocks of 32 keys: windows that begin inside a block, blocks that are all dead.
LONG = {
  'long': Case((150, 97, 0, 33), M=150),
  'long, window': Case((150, 97, 0, 33), M=150, window=40, alibi=True, ahead=1, softcap=1.0),
}


def programs(attend) -> dict[str, tuple]:
  """Returns (function, abstract arguments) by name: calls of real sizes, for compilers only.

  Every width and dtype, grouped heads of three kinds, both caches, all features at once.
  """
  sizes = {
    f'{dtype}, width {E}, {H} over {K} heads': Case((0,) * 4, 1000, H, K, E, dtype=dtype, ahead=1)
    for dtype in TOLERANCE for E, H, K in ((32, 8, 8), (64, 8, 1), (128, 32, 8), (256, 12, 4))
  }
  sizes['every feature'] = Case(
    (0,) * 4, 4096, 32, 8, 128, 700, softcap=20.0, alibi=True, ahead=1, dtype='bfloat16'
  )
  result = {}
  for name, case in sizes.items():
    B, dtype = len(case.lengths), jnp.dtype(case.dtype)
    lengths_B = jax.ShapeDtypeStruct((B,), jnp.int32)
    rows = jax.ShapeDtypeStruct((2, B, case.K, case.M, case.E), dtype)
    J = -(-case.M // PAGE)
    pages = jax.ShapeDtypeStruct((2, B * J, case.K, PAGE, case.E), dtype)
    table_BJ = jax.ShapeDtypeStruct((B, J), jnp.int32)
    query = jax.ShapeDtypeStruct((B, case.H, case.E), dtype)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    call = functools.partial(attend, **case.options())
    caches = ContiguousCache(rows, rows, lengths_B), PagedCache(pages, pages, table_BJ, lengths_B)
    for cache, ending in zip(caches, ('', ', in pages')):
      result[name + ending] = call, (query, cache, layer)
  return result
