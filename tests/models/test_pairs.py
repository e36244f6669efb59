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
    n_needless = 0
    for q, k, flags in zip(*pairs):
      cell = slice(q * q_block, (q + 1) * q_block), slice(k * k_block, (k + 1) * k_block)
      visited[cell] = True
      n_needless += not visible[cell].any()
      assert visible[cell].all() or flags & MASKED
    assert not (visible & ~visited).any()
    owner, n_owners = (pairs.k_block, -(-M // k_block)) if by_keys else (pairs.q_block, -(-L // q_block))
    np.testing.assert_array_equal(np.unique(owner), range(n_owners))
    assert (np.diff(owner) >= 0).all()
    for flag, edge in ((FIRST, 0), (LAST, -1)):
      flagged = [np.flatnonzero((owner == i) & (pairs.flags & flag != 0)) for i in range(n_owners)]
      assert all(f.tolist() == [np.flatnonzero(owner == i)[edge]] for i, f in enumerate(flagged))
    # Only blocks that see nothing at all cost a pair with nothing in it.
    axis = 0 if by_keys else 1
    blind = ~np.add.reduceat(visible.any(axis), np.arange(0, len(visible.any(axis)),
                                                          k_block if by_keys else q_block)).astype(bool)
    assert n_needless <= blind.sum() + (mask.chunk > 0) * len(owner)
