"""The work on one row spread over the devices of a mesh axis, inside a manual `shard_map`.

The loss is the sum of what all devices hold of it, so the transposes that JAX gives these
collectives (without varying-axis types) are exact: a parameter's gradient is the sum of the
devices' own.
"""

import jax

AXIS = 'tensor'


class OverTensor:
  """Heads, feed-forward features and vocabulary rows split over the mesh axis 'tensor'.

  Attributes:
    size: devices of the axis.
    sequence: whether the residual stream between branches is split by tokens, else every device
      has all of it.
  """

  def __init__(self, size: int, sequence: bool):
    self.size = size
    self.sequence = sequence

  def rank(self) -> jax.Array:
    """Returns which device of the axis this is, 0..size-1."""
    return jax.lax.axis_index(AXIS)

  def whole(self, x_BlD: jax.Array) -> jax.Array:
    """Returns all tokens of the rows, [B, L, D]."""
    if not self.sequence:
      return x_BlD
    return jax.lax.all_gather(x_BlD, AXIS, axis=1, tiled=True)

  def summed(self, x_BLD: jax.Array) -> jax.Array:
    """Returns the sum over the devices for the device's own tokens, [B, l, D]."""
    if not self.sequence:
      return jax.lax.psum(x_BLD, AXIS)
    return jax.lax.psum_scatter(x_BLD, AXIS, scatter_dimension=1, tiled=True)

  def own(self, x: jax.Array) -> jax.Array:
    """Returns the device's own tokens of an array [..., L]."""
    if not self.sequence:
      return x
    length = x.shape[-1] // self.size
    return jax.lax.dynamic_slice_in_dim(x, self.rank() * length, length, axis=-1)

  def total(self, x: jax.Array) -> jax.Array:
    """Returns the sum of x over the devices."""
    return jax.lax.psum(x, AXIS)

  def top(self, x: jax.Array) -> jax.Array:
    """Returns the greatest x of the devices; it has no gradient."""
    return jax.lax.pmax(x, AXIS)
