"""Grouped products against a loop over experts in NumPy float64; TPU programs' FLOPs."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from models.config import MoEConfig
from models.dispatch import check_product, choose_product
from models.kernels import grouped
from parallelism import hlo
from parallelism.hlo_program import read_program, total_flops
from parallelism.mesh import MeshConfig
from parallelism.topologies import compile_only_mesh

CONTENDERS = {
  'ragged_dot': grouped.ragged_dot, 'blocks': grouped.by_blocks,
  'megablox': functools.partial(grouped.megablox, interpret=True),
}
N, K, F = 300, 136, 24  # no multiple of a tile; the width takes two of them
SIZES = {
  'some are empty': [0, 130, 7, 0, 101, 0], 'no row is left': [300, 0], 'none at all': [0] * 3,
  'one row each': [1] * 5, 'whole tiles': [128, 0, 128],
}


def problem(sizes, n_rows=N, dtype=np.float32):
  """Returns rows, matrices and a cotangent; beyond the blocks rows are not numbers."""
  rng = np.random.default_rng(0)
  x_NK, g_NF = (rng.normal(size=(n_rows, width)).astype(dtype) for width in (K, F))
  x_NK[sum(sizes) :] = g_NF[sum(sizes) :] = np.nan
  return x_NK, rng.normal(size=(len(sizes), K, F)).astype(dtype), g_NF


def loop(x_NK, weight_XKF, g_NF, sizes):
  """Returns product and gradients of rows and matrices, float64."""
  x_NK, weight_XKF, g_NF = (np.asarray(a, np.float64) for a in (x_NK, weight_XKF, g_NF))
  out_NF, d_x_NK = np.zeros_like(g_NF), np.zeros_like(x_NK)
  d_weight_XKF = np.zeros_like(weight_XKF)
  ends = np.cumsum(sizes)
  for e, (start, end) in enumerate(zip(ends - sizes, ends, strict=True)):
    rows = slice(start, end)
    out_NF[rows] = x_NK[rows] @ weight_XKF[e]
    d_x_NK[rows] = g_NF[rows] @ weight_XKF[e].T
    d_weight_XKF[e] = x_NK[rows].T @ g_NF[rows]
  return out_NF, d_x_NK, d_weight_XKF


@functools.partial(jax.jit, static_argnums=0)
def product_and_gradients(product, x_NK, weight_XKF, g_NF, sizes_X):
  """Returns what `loop` returns; rows beyond the blocks, which are left open, become zero."""
  out_NF, vjp = jax.vjp(lambda x, weight: product(x, weight, sizes_X), x_NK, weight_XKF)
  d_x_NK, d_weight_XKF = vjp(g_NF)
  inside_N1 = (jnp.arange(x_NK.shape[0]) < jnp.sum(sizes_X))[:, None]
  return jnp.where(inside_N1, out_NF, 0), jnp.where(inside_N1, d_x_NK, 0), d_weight_XKF


@pytest.mark.parametrize('sizes', SIZES)
@pytest.mark.parametrize('name', CONTENDERS)
def test_products_and_gradients_equal_a_loop_over_experts(name, sizes):
  sizes_X = np.array(SIZES[sizes])
  operands = problem(sizes_X)
  got = product_and_gradients(CONTENDERS[name], *operands, jnp.asarray(sizes_X))
  for a, b in zip(got, loop(*operands, sizes_X), strict=True):
    # float32 sums of up to 136 products; exact where nothing is summed.
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())
    assert np.abs(b).max() > 0 or sizes == 'none at all'


@pytest.mark.parametrize('name', CONTENDERS)
def test_bfloat16_rounds_results_and_not_sums(name):
  sizes_X = np.array([0, 130, 7, 0, 101])
  operands = problem(sizes_X, dtype=jnp.bfloat16)
  got = product_and_gradients(CONTENDERS[name], *operands, jnp.asarray(sizes_X))
  for a, b in zip(got, loop(*operands, sizes_X), strict=True):
    assert a.dtype == jnp.bfloat16
    # Half a unit in the eighth bit of each result, once; the sums are of float32.
    atol = 1e-5 * np.abs(b).max()
    np.testing.assert_allclose(np.asarray(a, np.float64), b, rtol=2**-8, atol=atol)


@pytest.mark.parametrize('n_rows', [8, 16, 100])
def test_fewer_rows_than_a_tile(n_rows):
  sizes_X = np.array([3, 0, 4])
  operands = problem(sizes_X, n_rows)
  for name in ('blocks', 'megablox'):
    got = product_and_gradients(CONTENDERS[name], *operands, jnp.asarray(sizes_X))
    for a, b in zip(got, loop(*operands, sizes_X), strict=True):
      np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize('to_weights', [False, True])
@pytest.mark.parametrize('k, f', [(2048, 768), (768, 2048), (4096, 14336), (64, 96)])
def test_tilings_fit_and_cut_no_row_where_they_can(k, f, to_weights):
  for n_rows in (8, 1000, 4096, 655_360):
    for itemsize in (2, 4):
      tile = grouped.tiling(n_rows, k, f, 16, itemsize, to_weights)
      blocks = tile.rows * tile.k + tile.k * tile.f + tile.rows * tile.f
      assert 2 * itemsize * blocks < 14 * 2**20
      assert tile.rows % 16 == 0 and n_rows % tile.rows == 0 or n_rows < 128 or n_rows == 1000
      for size, width in ((tile.k, k), (tile.f, f)):
        assert size == width or size % 128 == 0


def test_the_hardware_chooses_and_a_name_decides():
  expected = {'tpu': 'megablox', 'cpu': 'blocks', 'gpu': 'ragged_dot', 'hopper': 'ragged_dot'}
  assert {kind: choose_product(MoEConfig(), kind)[0] for kind in expected} == expected
  named = MoEConfig(product='megablox')
  assert choose_product(named, 'cpu') == ('megablox', 'model.moe.product names it')
  check_product(named, 'tpu')
  with pytest.raises(ValueError, match='product=megablox is for tpu devices, these are cpu'):
    check_product(named, 'cpu')
  with pytest.raises(ValueError, match="model.moe.product='dense' is not one of auto, "):
    MoEConfig(product='dense')


def compiled_flops(topology, product, n_rows, k, f, n_experts, dtype=jnp.bfloat16):
  """Returns FLOPs of a device by our analysis, of a product and its gradients."""
  mesh = compile_only_mesh(topology, MeshConfig(data=8))

  def local(x_NK, weight_1XKF, sizes_1X, g_NF):
    out_NF, d_x_NK, d_weight_XKF = product_and_gradients(
      product, x_NK, weight_1XKF[0], g_NF, sizes_1X[0])
    return out_NF, d_x_NK, d_weight_XKF[None]

  def of(*shape, dtype=dtype):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P('data')))

  mapped = jax.shard_map(local, mesh=mesh, in_specs=P('data'), out_specs=P('data'),
                         check_vma=False)
  lowered = jax.jit(mapped).lower(of(8 * n_rows, k), of(8, n_experts, k, f),
                                  of(8, n_experts, dtype=jnp.int32), of(8 * n_rows, f))
  _, text = hlo.compile_to_text(lowered)
  return total_flops(read_program(text, dict(mesh.shape), unknown_trips=1))


@pytest.mark.parametrize('topology', ['v5e:2x4', 'v5p:2x2x2', 'v6e:2x4'])
def test_tpu_kernels_fit_and_count_each_row_for_one_expert(topology):
  pytest.importorskip('libtpu')
  n_rows, k, f = 2048, 1024, 768
  got = compiled_flops(topology, grouped.megablox, n_rows, k, f, 16)
  assert got == pytest.approx(3 * 2 * n_rows * k * f, rel=0.01)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize('precision', ['high', 'highest'])
def test_tpu_kernels_compile_at_every_precision(precision, dtype):
  pytest.importorskip('libtpu')
  with jax.default_matmul_precision(precision):
    got = compiled_flops('v5e:2x4', grouped.megablox, 512, 256, 256, 4, dtype)
  assert got == pytest.approx(3 * 2 * 512 * 256 * 256, rel=0.01)


def test_xlas_own_product_is_dense_on_v5e():
  """Why there is another; once this fails, the choice for TPUs should be made anew."""
  pytest.importorskip('libtpu')
  n_rows, k, f = 2048, 256, 128
  got = compiled_flops('v5e:2x4', grouped.ragged_dot, n_rows, k, f, 16)
  assert got == pytest.approx(16 * 3 * 2 * n_rows * k * f, rel=0.05)
