"""The lists of live block pairs against the mask written out, position by position."""

import itertools

import numpy as np
import pytest

from models.kernels.interface import Mask
from models.kernels.pairs import FIRST, LAST, MASKED, live_pairs

MASKS = [
  Mask(), Mask(window=5), Mask(causal=False), Mask(causal=False, window=4), Mask(chunk=8),
  Mask(chunk=6, window=4, q_offset=3), Mask(q_offset=-7), Mask(causal=False, chunk=5, q_offset=40),
]
LENGTHS = [(37, 37), (20, 41), (16, 16)]
BLOCKS = [(4, 4), (8, 4), (4, 16)]


@pytest.mark.parametrize('by_keys', [False, True])
@pytest.mark.parametrize('mask', MASKS, ids=str)
def test_pairs_cover_what_is_visible_and_flag_what_is_hidden(mask, by_keys):
  for (L, M), (q_block, k_block) in itertools.product(LENGTHS, BLOCKS):
    pairs = live_pairs(mask, L, M, q_block, k_block, by_keys=by_keys)
    queries, keys = np.arange(L)[:, None] + mask.q_offset, np.arange(M)
    visible = np.broadcast_to(mask.visible(queries, keys), (L, M))
    visited = np.zeros((L, M), bool)
    for q, k, flags in zip(*pairs):
      cell = slice(q * q_block, (q + 1) * q_block), slice(k * k_block, (k + 1) * k_block)
      visited[cell] = True
      assert visible[cell].all() or flags & MASKED
    assert not (visible & ~visited).any()


@pytest.mark.parametrize('by_keys', [False, True])
@pytest.mark.parametrize('mask', MASKS, ids=str)
def test_every_block_begins_and_ends_once(mask, by_keys):
  for (L, M), (q_block, k_block) in itertools.product(LENGTHS, BLOCKS):
    pairs = live_pairs(mask, L, M, q_block, k_block, by_keys=by_keys)
    owner = pairs.k_block if by_keys else pairs.q_block
    n_owners = -(-M // k_block) if by_keys else -(-L // q_block)
    np.testing.assert_array_equal(np.unique(owner), range(n_owners))
    assert (np.diff(owner) >= 0).all()
    for flag, edge in ((FIRST, 0), (LAST, -1)):
      flagged = np.flatnonzero(pairs.flags & flag)
      expected = [np.flatnonzero(owner == i)[edge] for i in range(n_owners)]
      np.testing.assert_array_equal(flagged, expected)


def test_dead_blocks_are_no_pairs():
  # Causal, 8 blocks of 4: the triangle. Window 4: the diagonal and its left neighbor.
  assert len(live_pairs(Mask(), 32, 32, 4, 4, by_keys=False).q_block) == 8 * 9 // 2
  assert len(live_pairs(Mask(window=4), 32, 32, 4, 4, by_keys=True).q_block) == 8 + 7
  assert len(live_pairs(Mask(chunk=8), 32, 32, 4, 4, by_keys=False).q_block) == 4 * 3
