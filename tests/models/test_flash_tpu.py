"""The TPU kernels in plain interpret mode over drawn shapes, their blocks and their cost."""

import functools
import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.kernels import blocks, flash_tpu
from models.kernels.interface import Mask
from models.kernels.tpu_grid import Operands, Problem, cost, specs, visited_pairs
from tests.models.attention_harness import TOLERANCE, Case, errors, rejected

ATTEND = functools.partial(flash_tpu.attention, q_block=128, k_block=128, interpret=True)


@pytest.mark.parametrize('dtype', TOLERANCE)
@pytest.mark.parametrize('width', [32, 40, 64, 128, 256])
def test_every_width_equals_the_oracle(width, dtype):
  case = Case(L=150, M=150, H=2, K=1, E=width, B=1, scale=width**-0.5, segments=True)
  measured = errors(ATTEND, case, dtype)
  assert not rejected(measured, dtype), measured


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
  lengths=st.tuples(st.integers(1, 300), st.integers(1, 300)), heads=st.sampled_from([1, 2]),
  causal=st.booleans(), window=st.integers(0, 200), chunk=st.sampled_from([0, 100]),
  q_offset=st.integers(-40, 200), segments=st.booleans(), alibi=st.booleans(),
  wide=st.sampled_from([(128, 256), (256, 128)]),
)
def test_any_shape(lengths, heads, causal, window, chunk, q_offset, segments, alibi, wide):
  case = Case(
    *lengths, H=2, K=heads, E=32, mask=Mask(causal, window, chunk, q_offset), softcap=2.0, B=1,
    segments=segments, alibi=alibi,
  )
  attend = functools.partial(
    flash_tpu.attention, q_block=wide[0], k_block=wide[1], interpret=True
  )
  measured = errors(attend, case)
  assert not rejected(measured), measured


def _problem(length: int, block: int, mask: Mask = Mask(), softcap: float = 0.0) -> Problem:
  """Returns a problem of as many keys as queries."""
  return Problem(mask, 1.0, softcap, length, length, block, block, True, False, False)


@pytest.mark.parametrize('by_keys', [False, True])
@pytest.mark.parametrize('key_heads', [2, 4])
def test_the_cost_counts_the_blocks_that_a_walk_over_the_grid_fetches(key_heads, by_keys):
  B, H, E, L = 2, 4, 32, 512
  q, k = (jax.ShapeDtypeStruct((B, heads, L, E), jnp.bfloat16) for heads in (H, key_heads))
  problem, pairs = visited_pairs(_problem(L, 128, Mask(window=150)), by_keys=by_keys)
  arrays = [('q', jnp.bfloat16), ('k', jnp.bfloat16), ('row', jnp.float32),
            ('q row', jnp.int32), ('key row', jnp.int32)]
  estimate = cost(
    problem, Operands(q, k, k, None, None, None), pairs, arrays, by_keys=by_keys, n_dots=3
  )
  axes = [range(B), range(H), range(len(pairs.flags))]
  if by_keys:
    axes = [range(B), range(key_heads), range(len(pairs.flags)), range(H // key_heads)]
  n_bytes = 0
  for kind, dtype in arrays:
    spec = specs(problem, H, key_heads, E, by_keys=by_keys)[kind]
    walk = [tuple(map(int, spec.index_map(*step, *pairs, None)))
            for step in itertools.product(*axes)]
    fetches = 1 + sum(a != b for a, b in itertools.pairwise(walk))
    size = np.prod([n for n in spec.block_shape if n is not None])
    n_bytes += fetches * size * jnp.dtype(dtype).itemsize
  assert estimate.bytes_accessed == n_bytes
  logits = B * H * 9 * 128 * 128  # four blocks on the diagonal, three and two left of it
  assert (estimate.flops, estimate.transcendentals) == (3 * 2 * logits * E, logits)


def test_softcapping_costs_a_second_exponential():
  x = jax.ShapeDtypeStruct((1, 1, 256, 32), jnp.float32)
  transcendentals = [
    cost(*_visited(_problem(256, 128, softcap=cap), x), [], by_keys=False, n_dots=2).transcendentals
    for cap in (0.0, 1.5)
  ]
  assert transcendentals == [3 * 128**2, 6 * 128**2]


def _visited(problem: Problem, x: jax.ShapeDtypeStruct):
  """Returns a problem, its operands and its pairs."""
  problem, pairs = visited_pairs(problem, by_keys=False)
  return problem, Operands(x, x, x, None, None, None), pairs


def test_only_kinds_of_pairs_that_occur_become_steps():
  kinds = {
    name: visited_pairs(_problem(512, 128, mask), by_keys=False)[0].steps
    for name, mask in (('all', Mask(causal=False)), ('causal', Mask()), ('near', Mask(window=9)))
  }
  assert kinds == {'all': (False,), 'causal': (False, True), 'near': (True,)}


def test_more_pairs_than_fit_are_refused_with_the_alternative():
  with pytest.raises(ValueError, match='131,328 pairs, more than the 80,000.*larger blocks'):
    visited_pairs(_problem(262_144, 512), by_keys=False)
  assert len(visited_pairs(_problem(262_144, 1024), by_keys=False)[1].flags) == 32_896


TABLE = {
  ('chip', 'bfloat16', 64, 0): (256, 512), ('chip', 'bfloat16', 128, 0): (512, 256),
  ('chip', 'bfloat16', 128, 4096): (1024, 512),
}


@pytest.mark.parametrize('shape, want', [
  (('bfloat16', 32, 100), (256, 512)), (('bfloat16', 64, 5000), (256, 512)),
  (('bfloat16', 65, 4095), (512, 256)), (('bfloat16', 128, 4096), (1024, 512)),
  (('bfloat16', 256, 4096), blocks.DEFAULT), (('float32', 64, 4096), blocks.DEFAULT),
])
def test_blocks_are_those_of_the_nearest_entry(shape, want, monkeypatch):
  monkeypatch.setattr(blocks, 'TABLE', TABLE)
  assert blocks.blocks_for('chip', *shape) == want
  assert blocks.blocks_for('other chip', *shape) == blocks.DEFAULT


def test_the_table_holds_blocks_that_the_kernels_take():
  for (kind, dtype, width, tokens), sizes in blocks.TABLE.items():
    assert kind.startswith('TPU') and dtype in TOLERANCE and flash_tpu.takes_width(width)
    assert tokens >= 0 and all(size % 128 == 0 for size in sizes)


def test_the_kernels_take_their_blocks_from_the_table(monkeypatch):
  seen = []

  def recorded(problem, **options):
    seen.append((problem.q_block, problem.k_block))
    return visited_pairs(problem, **options)

  monkeypatch.setattr(flash_tpu, 'visited_pairs', recorded)
  monkeypatch.setattr(blocks, 'TABLE', {('cpu', 'float32', 64, 0): (128, 256)})
  x = jnp.zeros((1, 512, 1, 32))
  jax.eval_shape(functools.partial(flash_tpu.attention, scale=1.0), x, x, x)
  assert seen == [(128, 256)]
  assert blocks.device_kind() == 'cpu'
