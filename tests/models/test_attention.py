"""Attention: both implementations against NumPy float64 loops, and against each other."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import block_attention, configured_attention, dense_attention
from models.config import ModelConfig
from models.positions import alibi_slopes

B, L, H, K, E = 2, 13, 4, 2, 6
SEGMENTS = np.array([[1] * 5 + [2] * 6 + [0] * 2, [4] * 13])
OPTIONS = {
  'plain': {},
  'segments': dict(segment_ids_BL=SEGMENTS),
  'window': dict(window=3),
  'window_segments': dict(window=4, segment_ids_BL=SEGMENTS),
  'softcap': dict(softcap=0.7),
  'alibi': dict(alibi_slopes_H=alibi_slopes(H), segment_ids_BL=SEGMENTS),
}


def inputs(n_keys=L, seed=0):
  """Returns random queries, keys, values and an output cotangent of unit scale."""
  rng = np.random.default_rng(seed)
  shapes = ((B, L, H, E), (B, n_keys, K, E), (B, n_keys, K, E), (B, L, H, E))
  return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def loops(q, k, v, *, scale, segment_ids_BL=None, key_segment_ids_BM=None, window=0,
          softcap=0.0, alibi_slopes_H=None, q_offset=0):
  """Returns attention in float64, one query, head and key at a time."""
  q, k, v = (x.astype(np.float64) for x in (q, k, v))
  queries = np.ones(q.shape[:2]) if segment_ids_BL is None else segment_ids_BL
  keys = queries if key_segment_ids_BM is None else key_segment_ids_BM
  if segment_ids_BL is None:
    keys = np.ones(k.shape[:2])
  out = np.zeros(q.shape)
  for b in range(q.shape[0]):
    for i in range(q.shape[1]):
      for h in range(q.shape[2]):
        terms = []
        for j in range(k.shape[1]):
          distance = i + q_offset - j
          near = distance >= 0 and (window == 0 or distance < window)
          if near and queries[b, i] == keys[b, j] and keys[b, j] != 0:
            logit = q[b, i, h] @ k[b, j, h // (H // K)] * scale
            logit = softcap * math.tanh(logit / softcap) if softcap else logit
            logit -= 0 if alibi_slopes_H is None else alibi_slopes_H[h] * distance
            terms.append((math.exp(logit), v[b, j, h // (H // K)]))
        if terms:
          out[b, i, h] = sum(w * x for w, x in terms) / sum(w for w, _ in terms)
  return out


def relative(a, b):
  """Returns ||a - b|| / ||b||."""
  return np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)


def value_and_gradients(attend, q, k, v, cotangent, **options):
  """Returns the output of an attention function and its gradients, jitted."""

  @jax.jit
  def both(q, k, v, cotangent):
    out, vjp = jax.vjp(functools.partial(attend, **options), q, k, v)
    return out, vjp(cotangent)

  return both(q, k, v, cotangent)


@pytest.mark.parametrize('name', OPTIONS)
def test_blocks_and_dense_equal_numpy_loops_and_their_gradients_agree(name):
  options = dict(scale=0.4, **OPTIONS[name])
  expected = loops(*inputs()[:3], **options)
  blocks, gradients = value_and_gradients(block_attention, *inputs(), block=4, **options)
  dense, dense_gradients = value_and_gradients(dense_attention, *inputs(), **options)
  assert relative(dense, expected) < 1e-6 and relative(blocks, expected) < 1e-6
  for got, want in zip(gradients, dense_gradients, strict=True):
    assert relative(got, np.asarray(want)) < 2e-6


def test_gradients_equal_finite_differences_of_the_loops():
  q, k, v, cotangent = inputs()
  options = dict(scale=0.4, segment_ids_BL=SEGMENTS, window=5, softcap=1.5)
  _, gradients = value_and_gradients(block_attention, q, k, v, cotangent, block=4, **options)
  rng = np.random.default_rng(1)
  for i, gradient in enumerate(gradients):
    direction = rng.normal(size=gradient.shape)
    ends = []
    for sign in (1, -1):
      moved = [x.astype(np.float64) for x in (q, k, v)]
      moved[i] = moved[i] + sign * 1e-4 * direction
      ends.append((loops(*moved, **options) * cotangent).sum())
    slope = (ends[0] - ends[1]) / 2e-4
    assert abs((np.asarray(gradient) * direction).sum() - slope) < 1e-4 * max(1, abs(slope))


def test_grouped_heads_equal_repeated_heads():
  q, k, v, cotangent = inputs()
  repeated = [np.repeat(x, H // K, axis=2) for x in (k, v)]
  options = dict(scale=0.4, block=4)
  grouped, gradients = value_and_gradients(block_attention, q, k, v, cotangent, **options)
  full, full_gradients = value_and_gradients(block_attention, q, *repeated, cotangent, **options)
  assert relative(grouped, np.asarray(full)) < 1e-6
  for got, want in zip(gradients[1:], full_gradients[1:], strict=True):
    summed = np.asarray(want).reshape(B, L, K, H // K, E).sum(axis=3)
    assert relative(got, summed) < 1e-6


@pytest.mark.parametrize('attend', [dense_attention, functools.partial(block_attention, block=4)])
def test_queries_may_stand_after_the_first_keys(attend):
  q, k, v, _ = inputs(n_keys=20)
  got = jax.jit(functools.partial(attend, scale=0.3, q_offset=7, window=9))(q, k, v)
  assert relative(got, loops(q, k, v, scale=0.3, q_offset=7, window=9)) < 1e-6


def test_padding_gives_zeros_and_no_gradient():
  out, gradients = value_and_gradients(
    block_attention, *inputs(), block=4, scale=1.0, segment_ids_BL=SEGMENTS
  )
  np.testing.assert_array_equal(out[0, 11:], 0)
  for gradient in gradients:
    np.testing.assert_array_equal(gradient[0, 11:], 0)


def test_large_logits_stay_finite():
  out, gradients = value_and_gradients(block_attention, *inputs(), block=4, scale=1e4)
  assert np.isfinite(out).all() and all(np.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize('name', ['dense', 'blocks', 'auto'])
def test_each_configured_attention_is_causal_attention(name):
  q, k, v, _ = inputs()
  attend = configured_attention(ModelConfig(attention=name, attention_block=5))
  attend = jax.jit(functools.partial(attend, scale=0.4))
  assert relative(attend(q, k, v), loops(q, k, v, scale=0.4)) < 1e-6


def test_the_comparison_rejects_a_broken_attention():
  def broken(q, k, v, **options):
    return dense_attention(q, jnp.roll(k, 1, axis=1), v, **options)

  q, k, v, _ = inputs()
  assert relative(broken(q, k, v, scale=0.4), loops(q, k, v, scale=0.4)) > 1e-2


def test_bfloat16_inputs_use_a_float32_softmax():
  q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in inputs())
  out = jax.jit(functools.partial(block_attention, scale=0.4, block=4))(q, k, v)
  assert out.dtype == jnp.bfloat16
  expected = loops(*(np.asarray(x, np.float32) for x in (q, k, v)), scale=0.4)
  assert relative(out, expected) < 6e-3  # 2^-8 of rounding in weights and in the output
