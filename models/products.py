"""Owns the matrix product that gradients of weights, keys and values are made of."""

import functools
from typing import Optional

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


def _swapped(x: jax.Array) -> jax.Array:
  """Returns x with its last two dimensions exchanged."""
  return jnp.swapaxes(x, -1, -2)


def _plain(x: jax.Array, y: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Returns the product as one dot whose contracted dimension comes first."""
  return jnp.einsum('...tm,...tn->...mn', x, y, preferred_element_type=dtype)


def _narrower_transposed(x: jax.Array, y: jax.Array, dtype: DTypeLike) -> jax.Array:
  """Returns the product after transposing the narrower operand.

  XLA's CPU backend is at half speed for a dot that contracts the rows of its left side. The
  barriers keep it from folding the transposes back into such a dot.
  """
  hold = jax.lax.optimization_barrier
  matmul = functools.partial(jnp.matmul, preferred_element_type=dtype)
  if x.shape[-1] <= y.shape[-1]:
    return matmul(hold(_swapped(x)), y)
  return _swapped(hold(matmul(hold(_swapped(y)), x)))


def transposed_product(
  x: jax.Array, y: jax.Array, dtype: Optional[DTypeLike] = None
) -> jax.Array:
  """Returns x^T y, the sum over rows t of outer products x[..., t, :] y[..., t, :].

  Takes [..., T, M] and [..., T, N] of one dtype; returns [..., M, N] in `dtype`, by default
  that of x.
  """
  options = {'dtype': x.dtype if dtype is None else dtype}
  return jax.lax.platform_dependent(
    x, y, cpu=functools.partial(_narrower_transposed, **options),
    default=functools.partial(_plain, **options),
  )
