"""The GPU's decoding kernel in interpret mode against the oracle, and its lowering for an H100."""

import functools

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
import jax.numpy as jnp
import pytest

from models.kernels import decode_gpu
from models.kernels.decoding import ContiguousCache, PagedCache
from tests.models.decoding_harness import CASES, LONG, Case, errors, in_pages, rejected

EVERY = {name: case for name, case in {**CASES, **LONG}.items() if case.E in decode_gpu.WIDTHS}
attend = functools.partial(decode_gpu.attention, block=16, n_splits=3, interpret=True)
pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('page', [None, 16])
def test_the_kernel_equals_the_oracle(name, page):
  case = in_pages(EVERY[name], page)
  measured = errors(attend, case)
  assert not rejected(measured, case), measured


@pytest.mark.parametrize('n_splits, page', [(1, None), (2, 5), (40, 16)])
def test_any_number_of_splits_and_size_of_pages(n_splits, page):
  case = in_pages(EVERY['long, window'], page)
  measured = errors(functools.partial(attend, n_splits=n_splits), case)
  assert not rejected(measured, case), measured


def test_a_split_that_is_left_out_is_rejected(monkeypatch):
  real = decode_gpu.merged
  monkeypatch.setattr(decode_gpu, 'merged', lambda outs, lses: real(outs[:-1], lses[:-1]))
  case = EVERY['plain']
  assert rejected(errors(attend, case), case) == ['out', 'lse']


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('width', decode_gpu.WIDTHS)
@pytest.mark.parametrize('page', [None, 16])
def test_the_kernel_lowers_for_an_h100(page, width, dtype):
  case = Case(E=width, dtype=dtype, H=6, window=9, alibi=True, softcap=1.0, page=page)
  device = AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=132, platform='gpu')
  mesh = AbstractMesh((1,), ('x',), axis_types=(AxisType.Auto,), abstract_device=device)

  def run(q_BHE, cache, layer):
    return decode_gpu.attention(q_BHE, cache, layer, **case.options())

  with jax.sharding.use_abstract_mesh(mesh):
    traced = jax.jit(run).trace(jnp.asarray(case.operands()[0]), case.cache(), 1)
    assert 'xla.gpu.triton' in traced.lower(lowering_platforms=('cuda',)).as_text()


def test_splits_fill_the_device_but_never_have_less_than_a_block():
  def splits(B, K, M, window=0):
    keys = jax.ShapeDtypeStruct((1, B, K, M, 64), jnp.bfloat16)
    return decode_gpu._splits(ContiguousCache(keys, keys, None), B * K, window, 64)

  assert splits(1, 8, 32_768) == 33  # 264 programs
  assert splits(1, 8, 256) == 4
  assert splits(1, 8, 32_768, window=128) == 2
  assert splits(64, 8, 32_768) == 1
  pages = jax.ShapeDtypeStruct((1, 99, 8, 16, 64), jnp.bfloat16)
  table = jax.ShapeDtypeStruct((1, 16), jnp.int32)
  assert decode_gpu._splits(PagedCache(pages, pages, table, None), 8, 0, 64) == 4


Q, KEYS, LENGTHS = jnp.zeros((2, 4, 32)), jnp.zeros((1, 2, 2, 8, 32)), jnp.ones(2, jnp.int32)


@pytest.mark.parametrize('q, keys, options, says', [
  (Q.astype(jnp.float16), KEYS.astype(jnp.float16), {}, 'not float16; decode_xla takes it'),
  (Q[..., :24], KEYS[..., :24], {}, '32, 64, 128, 256, not 24; decode_xla takes it'),
  (Q, KEYS, dict(block=24), 'block=24 of decode_gpu is not a power of two'),
  (Q, KEYS[:, :1], {}, 'do not fit'),
])
def test_what_the_kernel_lacks_is_said_with_the_alternative(q, keys, options, says):
  with pytest.raises(ValueError, match=says):
    decode_gpu.attention(q, ContiguousCache(keys, keys, LENGTHS), 0, scale=1.0, **options)
