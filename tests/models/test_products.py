"""The product of transposed operands against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.products import transposed_product

SHAPES = {'narrow left': ((6, 3), (6, 5)), 'narrow right': ((6, 5), (6, 3)),
          'square': ((4, 4), (4, 4)), 'batched': ((2, 3, 7, 2), (2, 3, 7, 9)),
          'batched, narrow right': ((2, 3, 7, 9), (2, 3, 7, 2))}


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shapes', SHAPES.values(), ids=SHAPES)
def test_equals_numpy_in_float64(shapes, dtype):
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
  got = jax.jit(transposed_product)(x, y)
  expected = np.swapaxes(np.asarray(x, np.float64), -1, -2) @ np.asarray(y, np.float64)
  assert got.dtype == dtype
  tolerance = 1e-6 if dtype == 'float32' else 1e-2
  np.testing.assert_allclose(np.asarray(got, np.float64), expected, rtol=tolerance, atol=tolerance)


def test_wider_output():
  x = jnp.full((1000, 1), 1 + 2**-7, jnp.bfloat16)
  assert transposed_product(x, x, jnp.float32)[0, 0] == pytest.approx(1000 * (1 + 2**-7) ** 2)


def test_other_platforms_get_one_plain_dot():
  x, y = jnp.ones((6, 5)), jnp.ones((6, 3))
  traced = jax.jit(transposed_product).trace(x, y)
  text = traced.lower(lowering_platforms=('tpu',)).as_text()
  assert text.count('dot_general') == 1 and 'optimization_barrier' not in text
  assert 'optimization_barrier' in traced.lower(lowering_platforms=('cpu',)).as_text()
