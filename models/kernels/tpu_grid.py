"""Owns the grid of the TPU's attention kernels: the call, the blocks of a step, what it costs."""

import dataclasses
from typing import Any, NamedTuple, Optional

import jax
from jax.experimental import pallas as pl
import numpy as np

from models.kernels.interface import Mask
from models.kernels.pairs import MASKED, Pairs, live_pairs

MAX_PAIRS = 80_000  # twelve bytes each in a scalar memory of one MiB


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is static about a call; lengths are those before padding to whole blocks."""

  mask: Mask
  scale: float
  softcap: float
  n_queries: int
  n_keys: int
  q_block: int
  k_block: int
  has_segments: bool
  has_slopes: bool
  interpret: Any
  steps: tuple[bool, ...] = (False, True)  # whether pairs are masked: all kinds that occur


class Operands(NamedTuple):
  """Arrays of a call, lengths padded to whole blocks; segments None where there are none."""

  q_BHLE: jax.Array
  k_BKME: jax.Array
  v_BKME: jax.Array
  slopes_H: jax.Array
  q_segments_B1L: Optional[jax.Array]
  k_segments_B1M: Optional[jax.Array]


def visited_pairs(problem: Problem, *, by_keys: bool) -> tuple[Problem, Pairs]:
  """Returns the pairs that a kernel visits, and the problem that says which kinds occur.

  Raises ValueError where they are more than a TPU's scalar memory holds.
  """
  pairs = live_pairs(
    problem.mask, problem.n_queries, problem.n_keys, problem.q_block, problem.k_block,
    by_keys=by_keys,
  )
  if len(pairs.flags) > MAX_PAIRS:
    raise ValueError(
      f'{problem.n_queries:,} queries and {problem.n_keys:,} keys in blocks of '
      f'{problem.q_block} and {problem.k_block} make {len(pairs.flags):,} pairs, more than the '
      f'{MAX_PAIRS:,} that flash_tpu takes; give it larger blocks'
    )
  kinds = tuple(np.unique(pairs.flags & MASKED != 0).tolist())
  return dataclasses.replace(problem, steps=kinds), pairs


def _changes(blocks: np.ndarray) -> int:
  """Returns how often a block is fetched that stays as long as its index does."""
  return 1 + int(np.count_nonzero(np.diff(blocks)))


def cost(
  problem: Problem, operands: Operands, pairs: Pairs, arrays: list[tuple[str, Any]],
  *, by_keys: bool, n_dots: int,
) -> pl.CostEstimate:
  """Returns what a kernel computes and moves, for the compiler's estimates.

  `arrays` are kind and dtype of all that it reads and writes. A block is moved when its index
  changes from one grid step to the next; that two heads may share a block is left out.
  """
  B, H, _, E = operands.q_BHLE.shape
  K, n_pairs = operands.k_BKME.shape[1], len(pairs.flags)
  walks = B * K if by_keys else B * H  # over all pairs, by keys with a whole group of heads
  q_fetches, k_fetches = walks * _changes(pairs.q_block), walks * _changes(pairs.k_block)
  q_head_fetches = B * H * n_pairs if by_keys and H > K else q_fetches
  moved = {
    'q': q_head_fetches * problem.q_block * E, 'k': k_fetches * problem.k_block * E,
    'row': q_head_fetches * problem.q_block, 'q row': q_fetches * problem.q_block,
    'key row': k_fetches * problem.k_block,
  }
  logits = B * H * n_pairs * problem.q_block * problem.k_block
  return pl.CostEstimate(
    flops=2 * n_dots * logits * E, transcendentals=logits * (2 if problem.softcap else 1),
    bytes_accessed=sum(moved[kind] * np.dtype(dtype).itemsize for kind, dtype in arrays),
  )


def specs(problem: Problem, heads: int, key_heads: int, width: int, *, by_keys: bool) -> dict:
  """Returns the block spec of every kind of array: 'q', 'k', 'row', 'q row' and 'key row'.

  A 'row' has a number per query and head, a 'q row' per query, a 'key row' per key.
  """
  G = heads // key_heads

  def q_head(h, g):
    return h * G + g[0] if by_keys else h

  def k_head(h):
    return h if by_keys else jax.lax.div(h, G)

  def at(block, index):
    """Returns a block spec; grid indices come first, prefetched scalars last."""

    def index_map(b, h, p, *rest):
      *group, q_block, k_block, _, _ = rest
      return index(b, h, group, q_block[p], k_block[p])

    return pl.BlockSpec(block, index_map)

  q, k = problem.q_block, problem.k_block
  return {
    'q': at((None, None, q, width), lambda b, h, g, i, j: (b, q_head(h, g), i, 0)),
    'k': at((None, None, k, width), lambda b, h, g, i, j: (b, k_head(h), j, 0)),
    'row': at((None, None, 1, q), lambda b, h, g, i, j: (b, q_head(h, g), 0, i)),
    'q row': at((None, 1, q), lambda b, h, g, i, j: (b, 0, i)),
    'key row': at((None, 1, k), lambda b, h, g, i, j: (b, 0, j)),
  }
