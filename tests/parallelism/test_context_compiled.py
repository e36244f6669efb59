"""Context parallelism with the TPU's kernels through the TPU compiler, with no TPU."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import pytest

from experiments.benchmarks.tpu_programs import IN_HBM
from models.kernels import flash_tpu
from models.kernels.interface import Mask
from models.positions import alibi_slopes
from parallelism import context
from parallelism.mesh import MeshConfig
from parallelism.topologies import compile_only_mesh

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

TOKENS, H, K, E = 1024, 8, 4, 128  # of a device
START, DONE = 'collective-permute-start', 'collective-permute-done'
KERNEL = 'tpu_custom_call'
ROWS, STATISTICS = P('data', 'context'), P('data', None, 'context')


def _by_autodiff(attend, n_devices):
  """A ring whose backward is JAX's transpose of its forward: what the one in use is better than."""
  def attended(q_BLHE, k_BLKE, v_BLKE, *, scale, mask):
    ring = context.Ring(attend, n_devices, 'context', scale, 0.0, mask)
    return context._forward(
        ring, context.Queries(q_BLHE, None, None), context.Keys(k_BLKE, v_BLKE, None))[0]
  return attended


@functools.cache
def _compiled(make, n_devices, window=0, features=False):
  """Returns forward and backward for eight v5e chips, a row of TOKENS tokens per device."""
  mesh = compile_only_mesh('v5e:2x4', MeshConfig(context=n_devices))
  split, B, L = make(flash_tpu.attention, n_devices), 8 // n_devices, TOKENS * n_devices

  def local(q, k, v, g, g_lse, segments):
    options = {'alibi_slopes_H': alibi_slopes(H), 'segment_ids_BL': segments} if features else {}
    results, vjp = jax.vjp(
        lambda *qkv: tuple(split(*qkv, scale=0.1, mask=Mask(window=window), **options)), q, k, v)
    return *results, *vjp((g, g_lse))

  def operand(shape, spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

  q, k = (operand((B, L, heads, E), ROWS) for heads in (H, K))
  g_lse, segments = operand((B, H, L), STATISTICS, jnp.float32), operand((B, L), ROWS, jnp.int32)
  mapped = jax.shard_map(local, mesh=mesh, in_specs=(ROWS,) * 4 + (STATISTICS, ROWS),
                         out_specs=(ROWS, STATISTICS, ROWS, ROWS, ROWS), check_vma=False)
  return jax.jit(mapped).lower(q, k, k, q, g_lse, segments).compile(IN_HBM)


def _order(compiled):
  """Returns sends, receipts and kernels of each computation in the order of the program's run."""
  text = compiled.as_text()
  assert 'is_scheduled=true' in text
  names = rf'(?:{START}|{DONE}|all-to-all|conditional)(?=\()|{KERNEL}'
  return [re.findall(names, part) for part in re.split(r'\n\}\n', text)]


def _temporary(make, n_devices):
  return _compiled(make, n_devices).memory_analysis().temp_size_in_bytes


def test_a_ring_compiles_and_attends_while_keys_and_gradients_travel():
  parts = [part for part in _order(_compiled(context.ring, 8)) if START in part]
  *loops, _ = parts  # the last is what surrounds them
  assert [(part.count(START), part.count(KERNEL)) for part in loops] == [
      (2, 2), (4, 6)]  # forward; backward with gradients, where forward runs again
  for part in loops:
    n = part.count(START)
    assert part[:n] == [START] * n and part[-n:] == [DONE] * n
  assert not any('conditional' in part for part in parts)


def test_memory_of_a_ring_is_the_same_for_any_number_of_devices():
  assert _temporary(context.ring, 8) == pytest.approx(_temporary(context.ring, 4), rel=0.01)


@pytest.mark.slow
def test_autodiff_through_a_ring_keeps_all_that_arrives():
  assert _temporary(_by_autodiff, 8) > 1.7 * _temporary(_by_autodiff, 4)
  assert _temporary(_by_autodiff, 8) > 3 * _temporary(context.ring, 8)


def test_a_ring_with_window_segments_and_slopes_compiles():
  found = sum(_order(_compiled(context.ring, 8, 1000, True)), [])
  assert 'conditional' in found and START in found and KERNEL in found


def test_all_to_all_compiles_in_about_the_same_memory_for_any_number_of_devices():
  found = sum(_order(_compiled(context.all_to_all, 4)), [])
  # Queries, keys, values, output, statistics; backward the same, transposed.
  assert (found.count('all-to-all'), found.count(KERNEL)) == (10, 3)
  assert _temporary(context.all_to_all, 4) == pytest.approx(
      _temporary(context.all_to_all, 2), rel=0.1)
