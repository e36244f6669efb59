"""Attention of single tokens over caches: every implementation against the oracle."""

import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st
import jax.numpy as jnp
import numpy as np
import pytest

from models.kernels import decode_xla
from models.kernels.decoding import ContiguousCache, Decoded, PagedCache, merged
from models.kernels.interface import HIDDEN
from tests.models.decoding_harness import CASES, Case, errors, expected, in_pages, rejected


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('page', [None, 16, 5])
def test_xla_equals_the_oracle(name, page):
  case = in_pages(CASES[name], page)
  measured = errors(decode_xla.attention, case)
  assert not rejected(measured, case), measured


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
  lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4), heads=st.sampled_from([1, 2, 6]),
  window=st.integers(0, 20), ahead=st.integers(0, 2), page=st.sampled_from([None, 4, 16]),
)
def test_any_lengths(lengths, heads, window, ahead, page):
  case = Case(tuple(lengths), M=40, H=6, K=heads, E=8, window=window, ahead=ahead, page=page)
  measured = errors(decode_xla.attention, case)
  assert not rejected(measured, case), measured


def _sees_one_key_too_many(q_BHE, cache, layer, **options):
  cache = cache._replace(lengths_B=jnp.minimum(cache.lengths_B + 1, 37))
  return decode_xla.attention(q_BHE, cache, layer, **options)


def _off_by_a_ten_thousandth(q_BHE, cache, layer, **options):
  out_BHE, lse_BH = decode_xla.attention(q_BHE, cache, layer, **options)
  return Decoded(out_BHE * 1.0001, lse_BH)


def _nan_for_blind_queries(q_BHE, cache, layer, **options):
  out_BHE, lse_BH = decode_xla.attention(q_BHE, cache, layer, **options)
  return Decoded(jnp.where(lse_BH[..., None] == HIDDEN, jnp.nan, out_BHE), lse_BH)


def _reads_the_other_layer(q_BHE, cache, layer, **options):
  return decode_xla.attention(q_BHE, cache, 1 - layer, **options)


def _window_one_too_wide(q_BHE, cache, layer, *, window, **options):
  return decode_xla.attention(q_BHE, cache, layer, window=window + 1, **options)


def test_the_harness_rejects_broken_kernels():
  case = Case(window=7)
  seeing = dataclasses.replace(case, lengths=(1, 30, 20))
  assert rejected(errors(_off_by_a_ten_thousandth, case), case) == ['out']
  assert rejected(errors(_nan_for_blind_queries, case), case) == ['blind queries']
  assert rejected(errors(_sees_one_key_too_many, seeing), seeing) == ['out', 'lse']
  assert rejected(errors(_reads_the_other_layer, seeing), seeing) == ['out', 'lse']
  assert rejected(errors(_window_one_too_wide, seeing), seeing) == ['out', 'lse']


def test_parts_merge_to_the_whole():
  case = Case(softcap=1.0)
  q_BHE, cache = jnp.asarray(case.operands()[0]), case.cache()
  parts = []
  for low, high in ((0, 15), (15, 30), (30, 37)):
    k, v = (x[:, :, :, low:high] for x in cache[:2])
    part = ContiguousCache(k, v, jnp.clip(cache.lengths_B - low, 0, high - low))
    parts.append(decode_xla.attention(q_BHE, part, case.layer, **case.options()))
  out_BHE, lse_BH = merged(*(jnp.stack(x) for x in zip(*parts)))
  want_BHE, want_BH = expected(case)
  assert (out_BHE[2] == 0).all() and (lse_BH[2] == HIDDEN).all()
  np.testing.assert_allclose(out_BHE, want_BHE, atol=1e-5)
  np.testing.assert_allclose(lse_BH, want_BH, rtol=1e-5)


Q = jnp.zeros((2, 4, 32))
KEYS, LENGTHS = jnp.zeros((1, 2, 2, 8, 32)), jnp.ones(2, jnp.int32)


@pytest.mark.parametrize('q, cache, options, says', [
  (Q, ContiguousCache(KEYS[..., :16], KEYS[..., :16], LENGTHS), {}, 'do not fit; they are'),
  (Q, ContiguousCache(KEYS, KEYS[:, :, :, :4], LENGTHS), {}, 'do not fit; they are'),
  (Q[:, :3], ContiguousCache(KEYS, KEYS, LENGTHS), {}, '3 query heads are not a multiple of 2'),
  (Q, ContiguousCache(KEYS, KEYS.astype(jnp.bfloat16), LENGTHS), {}, 'cast them to one dtype'),
  (Q[:1], ContiguousCache(KEYS, KEYS, LENGTHS), {}, '1 queries do not fit a cache of 2 rows'),
  (Q, PagedCache(KEYS, KEYS, jnp.zeros((3, 4), jnp.int32), LENGTHS), {}, 'a cache of 3 rows'),
  (Q, ContiguousCache(KEYS, KEYS, LENGTHS), dict(alibi_slopes_H=np.ones(3)), 'slopes'),
])
def test_operands_that_do_not_fit_are_refused_in_a_sentence(q, cache, options, says):
  with pytest.raises(ValueError, match=says):
    decode_xla.attention(q, cache, 0, scale=1.0, **options)
