"""Attention: the oracle against NumPy loops, every implementation against the oracle."""

import dataclasses
import functools
import math
import types

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import (
  check_attention, choose_attention, choose_decode_attention, configured_attention, hardware,
)
from models.config import ModelConfig
from models.kernels import blockwise, flash_tpu, oracle, unrolled
from models.kernels.interface import HIDDEN, Attended, Mask
from models.positions import alibi_slopes
from tests.models.attention_harness import TOLERANCE, Case, errors, rejected, value_and_gradients
from tests.models.programs import equations

IMPLEMENTATIONS = {
  'unrolled': functools.partial(unrolled.attention, block=8),
  'blockwise': functools.partial(blockwise.attention, block=8),
  'flash_tpu': functools.partial(
    flash_tpu.attention, q_block=128, k_block=128, interpret=True
  ),
}
# Every feature and every pair of masks and features at least once; lengths that end inside a block.
CASES = {
  'causal': Case(),
  'bidirectional': Case(L=20, M=41, mask=Mask(causal=False), K=1, softcap=1.5),
  'bidirectional window': Case(mask=Mask(causal=False, window=4), segments=True, alibi=True),
  'window': Case(mask=Mask(window=5), K=4, segments=True, alibi=True),
  'chunk': Case(mask=Mask(chunk=8), segments=True, softcap=0.7),
  'chunk and window after a prefix': Case(L=20, M=37, mask=Mask(chunk=8, window=3, q_offset=5)),
  'queries before all keys': Case(L=30, M=20, mask=Mask(q_offset=-6), segments=True),
  'wide heads': Case(E=64, H=2, K=1, scale=0.125),
  'one token': Case(L=1, M=9, mask=Mask(q_offset=8)),
}
# The TPU kernel's blocks have 128 rows, so its cases are longer and fewer.
LONG = {
  'causal': Case(L=300, M=300, E=32),
  'window, segments, alibi': Case(
    L=300, M=300, mask=Mask(window=50), segments=True, alibi=True, B=1, E=32
  ),
  'bidirectional, softcap, one key head': Case(
    L=200, M=330, mask=Mask(causal=False), K=1, softcap=1.5, B=1, E=64
  ),
  'chunk before all keys': Case(
    L=300, M=300, mask=Mask(chunk=80, q_offset=-30), softcap=0.7, B=1, E=40
  ),
}


def loops(q, k, v, *, scale, mask, segment_ids_BL=None, key_segment_ids_BM=None, softcap=0.0,
          alibi_slopes_H=None):
  """Returns attention in float64, one query, head and key at a time."""
  B, L, H, _ = q.shape
  M, K = k.shape[1:3]
  queries = np.ones((B, L)) if segment_ids_BL is None else segment_ids_BL
  keys = np.ones((B, M)) if segment_ids_BL is None else key_segment_ids_BM
  keys = queries if keys is None else keys
  out, lse = np.zeros(q.shape), np.full((B, H, L), HIDDEN)
  for b, i, h in np.ndindex(B, L, H):
    terms = []
    for j in range(M):
      at = i + mask.q_offset
      near = (not mask.causal or j <= at) and (not mask.window or abs(at - j) < mask.window)
      near = near and (not mask.chunk or at // mask.chunk == j // mask.chunk)
      if near and queries[b, i] == keys[b, j] and keys[b, j] != 0:
        logit = q[b, i, h] @ k[b, j, h // (H // K)] * scale
        logit = softcap * math.tanh(logit / softcap) if softcap else logit
        logit -= 0 if alibi_slopes_H is None else alibi_slopes_H[h] * abs(at - j)
        terms.append((math.exp(logit), v[b, j, h // (H // K)]))
    if terms:
      total = sum(w for w, _ in terms)
      out[b, i, h], lse[b, h, i] = sum(w * x for w, x in terms) / total, math.log(total)
  return out, lse


@pytest.mark.parametrize('name', CASES)
def test_the_oracle_equals_numpy_loops(name):
  case = CASES[name]
  q, k, v, *_ = case.operands()
  with jax.enable_x64():
    got = oracle.attention(q, k, v, **case.options())
    out, lse = np.asarray(got.out_BLHE), np.asarray(got.lse_BHL)
  expected = loops(q, k, v, **case.options())
  np.testing.assert_allclose(out, expected[0], rtol=1e-6, atol=1e-9)
  np.testing.assert_allclose(lse, expected[1], rtol=1e-6, atol=1e-9)


def test_the_oracles_gradients_equal_finite_differences_of_the_loops():
  case = Case(L=9, M=9, mask=Mask(window=5), segments=True, softcap=1.5)
  q, k, v, g_out, g_lse = case.operands()
  with jax.enable_x64():
    gradients = value_and_gradients(oracle.attention, case.operands(), **case.options())[2:]
  rng = np.random.default_rng(1)
  for i, gradient in enumerate(gradients):
    direction = rng.normal(size=gradient.shape)
    ends = []
    for sign in (1, -1):
      moved = [q, k, v]
      moved[i] = moved[i] + sign * 1e-5 * direction
      out, lse = loops(*moved, **case.options())
      ends.append((out * g_out).sum() + (np.where(lse == HIDDEN, 0, lse) * g_lse).sum())
    slope = (ends[0] - ends[1]) / 2e-5
    assert (np.asarray(gradient) * direction).sum() == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('case', CASES)
@pytest.mark.parametrize('name', ['unrolled', 'blockwise'])
def test_results_and_gradients_equal_the_oracle(name, case, dtype):
  measured = errors(IMPLEMENTATIONS[name], CASES[case], dtype)
  assert not rejected(measured, dtype), measured


@pytest.mark.parametrize('case', LONG)
def test_the_tpu_kernels_equal_the_oracle_in_interpret_mode(case):
  measured = errors(IMPLEMENTATIONS['flash_tpu'], LONG[case])
  assert not rejected(measured), measured


def test_the_tpu_kernels_equal_the_oracle_in_bfloat16():
  measured = errors(IMPLEMENTATIONS['flash_tpu'], LONG['causal'], 'bfloat16')
  assert not rejected(measured, 'bfloat16'), measured


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
  lengths=st.tuples(st.integers(1, 40), st.integers(1, 40)), heads=st.sampled_from([1, 2, 4]),
  width=st.sampled_from([8, 24]), causal=st.booleans(), window=st.integers(0, 20),
  chunk=st.integers(0, 12), q_offset=st.integers(-10, 20), block=st.integers(4, 16),
)
def test_any_shape(lengths, heads, width, causal, window, chunk, q_offset, block):
  case = Case(
    *lengths, K=heads, E=width, mask=Mask(causal, window, chunk, q_offset), softcap=2.0, B=1
  )
  for attend in (unrolled.attention, blockwise.attention):
    measured = errors(functools.partial(attend, block=block), case)
    assert not rejected(measured), (attend.__module__, measured)


def _one_key_too_far(*operands, mask, **options):
  """Returns attention whose causal mask lets each query see the next key too."""
  return unrolled.attention(
    *operands, mask=dataclasses.replace(mask, q_offset=mask.q_offset + 1), **options
  )


@jax.custom_vjp
def _leaky(x):
  return x


_leaky.defvjp(lambda x: (x, None), lambda _, g: (g * 1.0001,))


def _keys_gradient_off_by_a_ten_thousandth(q, k, v, **options):
  return unrolled.attention(q, _leaky(k), v, **options)


def test_the_harness_rejects_broken_kernels():
  assert {'out', 'lse'} <= set(rejected(errors(_one_key_too_far, Case())))
  assert rejected(errors(_keys_gradient_off_by_a_ten_thousandth, Case())) == ['d_k']

  def nan_for_blind_queries(*operands, **options):
    out, lse = unrolled.attention(*operands, **options)
    return Attended(jnp.where(lse.swapaxes(1, 2)[..., None] == HIDDEN, jnp.nan, out), lse)

  assert rejected(errors(nan_for_blind_queries, Case(segments=True))) == ['blind queries']


X = np.zeros((2, 8, 4, 32), np.float32)


@pytest.mark.parametrize('operands, options, says', [
  ((X, X[:, :, :2], X), {}, r'values \(2, 8, 4, 32\) do not fit'),
  ((X, X[:1], X[:1]), {}, 'do not fit; they are'),
  ((X, X[:, :, :3], X[:, :, :3]), {}, '4 query heads are not a multiple of 3 key heads'),
  ((X, X, X.astype(np.float16)), {}, 'cast them to one dtype'),
  ((X, X[:, :5], X[:, :5]), dict(segment_ids_BL=np.ones((2, 8), np.int32)),
   r'key segments \(2, 8\) do not fit'),
  ((X, X, X), dict(key_segment_ids_BM=np.ones((2, 8), np.int32)), 'give both'),
  ((X, X, X), dict(alibi_slopes_H=np.ones(3)), r'slopes \(3,\) do not fit 4 query heads'),
])
@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_operands_that_do_not_fit_are_refused_in_a_sentence(name, operands, options, says):
  with pytest.raises(ValueError, match=says):
    IMPLEMENTATIONS[name](*operands, scale=1.0, **options)


@pytest.mark.parametrize('x, options, says', [
  (X.astype(np.float16), {}, 'not float16; blockwise takes it'),
  (X[..., :16], {}, 'not 16; blockwise takes it'),
  (X, dict(q_block=96), 'blocks 96 and 512 of flash_tpu are not multiples of 128'),
])
def test_what_the_tpu_kernels_lack_is_said_with_the_alternative(x, options, says):
  with pytest.raises(ValueError, match=says):
    flash_tpu.attention(x, x, x, scale=1.0, **options)


@pytest.mark.parametrize('name', IMPLEMENTATIONS)
def test_large_logits_stay_finite(name):
  case = Case(scale=1e4, E=32)
  operands = [x.astype(np.float32) for x in case.operands()]
  results = value_and_gradients(IMPLEMENTATIONS[name], operands, **case.options())
  assert all(np.isfinite(x).all() for x in results)


def _largest_intermediate(attend, case: Case) -> int:
  """Returns the most elements that one equation of a forward and backward pass puts out."""
  operands = [x.astype(np.float32) for x in case.operands()]
  traced = jax.jit(lambda operands: value_and_gradients(attend, operands, **case.options()))
  jaxpr = traced.trace(operands).jaxpr.jaxpr
  return max(var.aval.size for e in equations(jaxpr) for var in e.outvars)


@pytest.mark.parametrize('name', ['unrolled', 'blockwise'])
def test_keys_are_not_repeated_for_grouped_heads(name):
  case = Case(L=1, M=640, H=8, K=1, E=32, mask=Mask(q_offset=639))
  one_copy = case.B * case.M * case.E
  assert _largest_intermediate(IMPLEMENTATIONS[name], case) == one_copy

  def repeating(q, k, v, **options):
    return oracle.attention(q, jnp.repeat(k, 8, axis=2), jnp.repeat(v, 8, axis=2), **options)

  assert _largest_intermediate(repeating, case) == 8 * one_copy


@pytest.mark.parametrize('name', ['unrolled', 'blockwise', 'oracle', 'auto'])
def test_each_configured_attention_is_causal_attention(name):
  case = Case(L=20, M=20)
  attend = configured_attention(ModelConfig(attention=name, attention_block=5))
  measured = errors(attend, case)
  assert not rejected(measured), measured


def test_the_choice_names_its_reason():
  config = ModelConfig()
  assert choose_attention(config, 'cpu', 256)[0] == 'unrolled'
  assert choose_attention(config, 'cpu', 8192) == (
    'blockwise', 'plain XLA with memory linear in the length'
  )
  wide = dataclasses.replace(config, d_head=64)
  assert choose_attention(wide, 'tpu', 256) == ('flash_tpu', 'the devices are TPUs')
  # The kernels refuse narrow heads, so they are not chosen for them.
  narrow = dataclasses.replace(config, d_head=16)
  assert choose_attention(narrow, 'tpu', 256)[0] == 'blockwise'
  # Hopper's tensor cores multiply bfloat16, not float32.
  halves = dataclasses.replace(wide, compute_dtype='bfloat16')
  assert choose_attention(halves, 'hopper', 256)[0] == 'flash_gpu'
  name, reason = choose_attention(wide, 'hopper', 256)
  assert (name, 'bfloat16 only' in reason) == ('blockwise', True)
  assert choose_attention(halves, 'gpu', 256)[0] == 'blockwise'
  named = dataclasses.replace(config, attention='oracle')
  assert choose_attention(named, 'tpu', 256) == ('oracle', 'model.attention names it')


@pytest.mark.parametrize('attention, changes, hardware_kind, says', [
  ('flash_tpu', {}, 'cpu', "attention=flash_tpu is for tpu devices, these are cpu; 'auto'"),
  ('flash_gpu', {}, 'gpu', 'is for hopper devices, these are gpu'),
  ('flash_gpu', {}, 'hopper', 'takes model.compute_dtype=bfloat16, not float32'),
  ('flash_tpu', {'d_head': 16}, 'tpu', 'takes no heads of width 16'),
])
def test_kernels_that_do_not_fit_are_refused(attention, changes, hardware_kind, says):
  config = ModelConfig(attention=attention, **{'d_head': 64, **changes})
  with pytest.raises(ValueError, match=says):
    check_attention(config, hardware_kind)
  check_attention(dataclasses.replace(config, attention='blockwise'), hardware_kind)


@pytest.mark.parametrize('platform, capability, expected', [
  ('cpu', None, 'cpu'), ('tpu', None, 'tpu'), ('gpu', '9.0', 'hopper'), ('gpu', '8.0', 'gpu'),
])
def test_hopper_gpus_are_told_by_their_compute_capability(platform, capability, expected):
  device = types.SimpleNamespace(platform=platform, compute_capability=capability)
  assert hardware(device) == expected


def test_the_choice_of_decoding_names_its_reason():
  wide, narrow = ModelConfig(d_head=64), ModelConfig(d_head=24)
  assert choose_decode_attention(wide, 'tpu') == ('decode_tpu', 'the devices are TPUs')
  assert choose_decode_attention(wide, 'gpu') == ('decode_gpu', 'the devices are GPUs')
  assert choose_decode_attention(wide, 'cpu') == (
    'decode_xla', 'plain XLA, there is no kernel for cpu'
  )
  assert choose_decode_attention(narrow, 'gpu') == (
    'decode_xla', 'plain XLA, the kernels take no heads of width 24'
  )


def _temporary_bytes(attend, length: int) -> int:
  """Returns the compiler's temporary bytes of a forward and backward pass."""
  shape = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)

  def loss(q, k, v):
    return attend(q, k, v, scale=0.2).out_BLHE.sum()

  compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_blockwise_memory_is_linear_in_the_length():
  small, large = (_temporary_bytes(blockwise.attention, n) for n in (1024, 4096))
  assert large < 4.5 * small
  dense_small, dense_large = (_temporary_bytes(oracle.attention, n) for n in (1024, 4096))
  assert dense_large > 12 * dense_small


def test_alibi_slopes_stay_with_their_heads():
  case = Case(H=4, K=2, alibi=True)
  assert len(set(alibi_slopes(case.H))) == 4
  swapped = {**case.options(), 'alibi_slopes_H': alibi_slopes(4)[::-1]}
  q, k, v, *_ = (x.astype(np.float32) for x in case.operands())
  one = blockwise.attention(q, k, v, **case.options()).out_BLHE
  other = blockwise.attention(q, k, v, **swapped).out_BLHE
  assert not np.allclose(one, other)
