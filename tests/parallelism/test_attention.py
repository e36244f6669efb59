"""Attention under shard_map on eight fake devices against the same kernel on one device."""

import functools

import jax
import numpy as np
import pytest

from models.kernels import decode_tpu, decode_xla, flash_tpu
from models.kernels.decoding import ContiguousCache
from models.kernels.interface import Mask
from models.positions import alibi_slopes
from parallelism.attention import decode_over_mesh, over_mesh
from parallelism.mesh import MeshConfig, make_mesh

B, L, H, K, E = 4, 24, 8, 4, 32
ATTEND = functools.partial(flash_tpu.attention, interpret=True)
OPTIONS = {
    'plain': {},
    'segments, alibi': dict(segment_ids_BL=np.repeat([[1] * 9 + [2] * 12 + [0] * 3], B, axis=0),
                            alibi_slopes_H=alibi_slopes(H))}


@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS)
def test_every_device_attends_for_its_rows_and_heads(options):
  rng = np.random.default_rng(0)
  q, k, v, g = (rng.normal(size=(B, L, heads, E)).astype(np.float32) for heads in (H, K, K, H))
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())
  options = dict(scale=0.2, mask=Mask(window=10), **options)

  def both(attend):
    @jax.jit
    def run(q, k, v):
      (out, lse), vjp = jax.vjp(lambda *x: tuple(attend(*x, **options)), q, k, v)
      return out, lse, *vjp((g, jax.numpy.ones_like(lse)))
    return run(q, k, v)

  with jax.set_mesh(mesh):
    split = both(over_mesh(mesh, ATTEND))
  assert split[0].sharding.shard_shape(split[0].shape) == (B // 4, L, H // 2, E)
  for got, want in zip(split, both(ATTEND), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('kernel', [
    decode_xla.attention, functools.partial(decode_tpu.attention, block=16, interpret=True)],
    ids=['xla', 'tpu'])
@pytest.mark.parametrize('slopes', [None, alibi_slopes(H)], ids=['plain', 'alibi'])
def test_every_device_decodes_for_its_rows_and_heads(kernel, slopes):
  rng = np.random.default_rng(0)
  q_BHE = rng.normal(size=(B, H, E)).astype(np.float32)
  k_NBKME, v_NBKME = rng.normal(size=(2, 3, B, K, L, E)).astype(np.float32)
  cache = ContiguousCache(k_NBKME, v_NBKME, np.array([24, 1, 0, 17], np.int32))
  mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), jax.devices())

  def run(attend):
    options = dict(scale=0.2, window=10, alibi_slopes_H=slopes, ahead=1)
    return jax.jit(lambda q, cache: tuple(attend(q, cache, 2, **options)))(q_BHE, cache)

  with jax.set_mesh(mesh):
    split = run(decode_over_mesh(mesh, kernel))
  assert split[0].sharding.shard_shape(split[0].shape) == (B // 4, H // 2, E)
  for got, want in zip(split, run(decode_xla.attention), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
