"""Owns the list of live blocks: which blocks of keys each block of queries has to look at."""

from typing import NamedTuple

import numpy as np

from models.kernels.interface import Mask

FIRST, LAST, MASKED = 1, 2, 4  # flags of a pair


class Pairs(NamedTuple):
  """Pairs of blocks in the order in which a kernel visits them, int32 [n] each.

  FIRST and LAST flag where the block that the kernel accumulates for begins and ends;
  MASKED flags pairs in which the mask hides something.
  """

  q_block: np.ndarray
  k_block: np.ndarray
  flags: np.ndarray


def live_pairs(
  mask: Mask, n_queries: int, n_keys: int, q_block: int, k_block: int, *, by_keys: bool
) -> Pairs:
  """Returns the pairs in which the mask leaves something visible.

  They are in the order of the query blocks, or of the key blocks for the gradients of keys
  and values. A block that pairs with none gets one masked pair, so that its result is
  written.
  """
  n_q, n_k = -(-n_queries // q_block), -(-n_keys // k_block)
  live = np.zeros((n_q, n_k), bool)
  whole = np.zeros((n_q, n_k), bool)
  for i in range(n_q):
    start, stop = i * q_block, min((i + 1) * q_block, n_queries)
    low, high = mask.reach(start, stop, n_keys)
    if low < high:
      live[i, low // k_block : -(-high // k_block)] = True
    low, high = mask.common_reach(start, stop, n_keys)
    if low < high:
      whole[i, -(-low // k_block) : high // k_block] = True
  if by_keys:
    live[0, ~live.any(0)] = True
    k, q = np.nonzero(live.T)
    owner = k
  else:
    live[~live.any(1), 0] = True
    q, k = np.nonzero(live)
    owner = q
  changes = owner[1:] != owner[:-1]
  flags = FIRST * np.r_[True, changes] + LAST * np.r_[changes, True] + MASKED * ~whole[q, k]
  return Pairs(q.astype(np.int32), k.astype(np.int32), flags.astype(np.int32))


def live_ranges(pairs: Pairs, *, by_keys: bool) -> np.ndarray:
  """Returns where each owner's blocks begin, are whole, end being whole, and end: int32 [n, 4].

  Owners are blocks of queries, or of keys. The blocks that an owner pairs with have no gap,
  nor do those among them in which the mask hides nothing.
  """
  owner, other = (pairs.k_block, pairs.q_block) if by_keys else (pairs.q_block, pairs.k_block)
  ranges = np.zeros((owner.max() + 1, 4), np.int32)
  for i in range(len(ranges)):
    blocks = other[owner == i]
    whole = blocks[pairs.flags[owner == i] & MASKED == 0]
    for run in (blocks, whole):
      assert len(run) == 0 or np.ptp(run) == len(run) - 1, 'a gap between blocks'
    low, high = blocks[0], blocks[-1] + 1
    ranges[i] = (low, whole[0], whole[-1] + 1, high) if len(whole) else (low, high, high, high)
  return ranges
