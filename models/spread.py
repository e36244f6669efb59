"""Owns what a model does where the work on one row is spread over a group of devices.

Each device of such a group holds some heads, some features of the feed-forward and some rows of
the vocabulary, and between the branches of a block some of the tokens (Korthikanti et al. 2022,
section 4.2). The functions here do nothing: one device holds all.
"""

import jax


class Spread:
  """A group of one. Others have the same methods and more devices."""

  size = 1

  def rank(self) -> int | jax.Array:
    """Returns which device of the group this is, 0..size-1."""
    return 0

  def whole(self, x_BlD: jax.Array) -> jax.Array:
    """Returns all tokens of the rows, [B, L, D], of which each device has some."""
    return x_BlD

  def summed(self, x_BLD: jax.Array) -> jax.Array:
    """Returns the sum over the group for the device's own tokens, [B, l, D]."""
    return x_BLD

  def own(self, x: jax.Array) -> jax.Array:
    """Returns the device's own tokens of an array [..., L]."""
    return x

  def total(self, x: jax.Array) -> jax.Array:
    """Returns the sum of x over the group."""
    return x

  def top(self, x: jax.Array) -> jax.Array:
    """Returns the greatest x of the group; it has no gradient."""
    return x
