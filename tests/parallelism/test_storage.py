"""Gathers and scatters of parameters in several steps, against those in one and plain sums."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from parallelism.mesh import MeshConfig, make_mesh
from parallelism.storage import Storage, over_devices, specs

NAMES = ('embed', 'mlp')
SHAPE = (16, 6)


def loss(storage: Storage, x_DF: jax.Array, rows_BD: jax.Array) -> jax.Array:
  """Returns the sum over all devices of a number that each makes of its rows and all parameters."""
  whole_DF = storage.gathered(x_DF, NAMES)
  return storage.total((jnp.sin(rows_BD @ whole_DF) * jnp.arange(1.0, 7.0)).sum())


@pytest.mark.parametrize('axes', [{'fsdp': 8}, {'fsdp': 2, 'context': 4}])
@pytest.mark.parametrize('levels', [(8,), (2, 4), (4, 2), (2, 2, 2)])
def test_levels_gather_the_whole_in_order_and_scatter_the_sum_of_gradients(axes, levels):
  """Against one device; the parameter's values and the rows of every device differ."""
  mesh = make_mesh(MeshConfig(**{'data': 1, **axes}))
  storage = Storage(dict(mesh.shape), slice_levels=levels)
  x_DF, rows_BD = (jax.random.normal(jax.random.key(seed), shape)
                   for seed, shape in ((0, SHAPE), (1, (8, SHAPE[0]))))
  spec, rows = specs(NAMES), jax.sharding.PartitionSpec(tuple(axes))
  run = functools.partial(over_devices, mesh, in_specs=(spec, rows))

  def grads(x_DF, rows_BD):
    # The loss is replicated: each device's share of its own derivative is one eighth.
    return jax.grad(lambda x: loss(storage, x, rows_BD) / 8)(x_DF)

  whole_DF = jax.jit(over_devices(
      mesh, lambda x: storage.gathered(x, NAMES), (spec,), jax.sharding.PartitionSpec()))(x_DF)
  np.testing.assert_array_equal(whole_DF, x_DF)
  expected = jax.grad(
      lambda x: (jnp.sin(rows_BD @ x) * jnp.arange(1.0, 7.0)).sum())(x_DF)
  np.testing.assert_allclose(jax.jit(run(grads, out_specs=spec))(x_DF, rows_BD), expected,
                             rtol=2e-5, atol=2e-5)


def test_only_what_spans_a_slice_goes_in_levels():
  """Groups of four of eight devices are one collective though slices have levels."""
  mesh = make_mesh(MeshConfig(data=2, fsdp=4))
  storage = Storage(dict(mesh.shape), slice_levels=(2, 4))
  gather = over_devices(mesh, lambda x: storage.gathered(x, NAMES), (specs(NAMES),),
                        jax.sharding.PartitionSpec())
  program = jax.jit(gather).lower(jax.ShapeDtypeStruct(SHAPE, 'float32')).as_text()
  assert program.count('stablehlo.all_gather') == 1
