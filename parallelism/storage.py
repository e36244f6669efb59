"""Parameters inside a manual `shard_map`: stored in parts, gathered for use, gradients summed.

Every device computes the gradients of what it holds of the loss. The gradient of a parameter is
their sum over all devices: it is scattered over the axes that the parameter was gathered from
and summed over those along which it is replicated.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
import numpy as np

from parallelism.sharding import GATHERED, STORAGE, TOKEN_AXES, Names

STAGE = 'stage'
# Axes of matrices that models cast to their compute dtype where they use them.
CAST = frozenset(('mlp', 'heads', 'kv_heads', 'vocab', 'experts'))
# Dimension, mesh axes that split it, and how many devices of them each step of a collective takes.
Parts = tuple[tuple[int, tuple[str, ...], tuple[int, ...]], ...]


def _is_names(leaf: Any) -> bool:
  return isinstance(leaf, tuple)


def _groups(levels: tuple[int, ...]) -> list[list[list[int]] | None]:
  """Returns the groups of devices of each level, outermost first; None are all in one.

  Args:
    levels: devices of a group of each; the last one's devices are neighbors.
  """
  if len(levels) == 1:
    return [None]
  places = np.arange(math.prod(levels)).reshape(levels)
  return [np.moveaxis(places, i, -1).reshape(-1, n).tolist() for i, n in enumerate(levels)]


def _all_gathered(x: jax.Array, parts: Parts) -> jax.Array:
  """Returns x with all parts of its dimensions."""
  for dimension, axes, levels in parts:
    for groups in reversed(_groups(levels)):
      x = jax.lax.all_gather(x, axes, axis=dimension, tiled=True, axis_index_groups=groups)
  return x


def _scattered(x: jax.Array, parts: Parts) -> jax.Array:
  """Returns the device's part of the sum of x over the devices."""
  shape = x.shape
  for dimension, axes, levels in parts:
    # Of more dimensions behind the scattered one the TPU compiler makes a sum of the whole.
    x = x.reshape(*shape[:dimension + 1], -1) if len(shape) > dimension + 2 else x
    for groups in _groups(levels):
      x = jax.lax.psum_scatter(x, axes, scatter_dimension=dimension, tiled=True,
                               axis_index_groups=groups)
    shape = *shape[:dimension], x.shape[dimension], *shape[dimension + 1:]
    x = x.reshape(shape)
  return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(x: jax.Array, parts: Parts, wire: str, reduced_in: str) -> jax.Array:
  """Returns all parts of x in the dtype `wire`; gradients are summed in `reduced_in`."""
  del reduced_in
  return _all_gathered(x.astype(wire), parts)


def _gathered_forward(x, parts, wire, reduced_in):
  """Returns all parts of x, by bare gathers that remat policies see, and what has its dtype."""
  del reduced_in
  return _all_gathered(x.astype(wire), parts), jnp.zeros((0,), x.dtype)


def _gathered_backward(parts, wire, reduced_in, like, g):
  """Returns the device's part of the summed gradient."""
  del wire
  return (_scattered(g.astype(reduced_in), parts).astype(like.dtype),)


_gathered.defvjp(_gathered_forward, _gathered_backward)


def keeps_all_but_parameters(primitive, *_: Any, **options: Any) -> bool:
  """Returns, as a remat policy does, whether to keep a result: not of a gather, nor a view of one.

  Gathers over 'tensor' are those of activations.
  """
  if primitive.name == 'all_gather':
    return 'tensor' in options['axis_name']
  return primitive.name not in ('reshape', 'convert_element_type')


@dataclasses.dataclass(frozen=True)
class Storage:
  """How parameters go to and fro on a mesh.

  Trees of logical names have a tuple of names per parameter.

  Attributes:
    sizes: devices of each mesh axis.
    wire: dtype in which matrices are gathered.
    reduced_in: dtype in which gradients are summed over devices.
    slice_levels: see `mesh.slice_levels`; what spans fewer or more devices goes in one step.
  """

  sizes: dict[str, int]
  wire: str = 'float32'
  reduced_in: str = 'float32'
  slice_levels: tuple[int, ...] = ()

  def _present(self, axes: tuple[str, ...]) -> tuple[str, ...]:
    """Returns those of the axes that have several devices."""
    return tuple(axis for axis in axes if self.sizes[axis] > 1)

  def _parts(self, names: Names, without: tuple[str, ...] = ()) -> Parts:
    """Returns the dimensions that are gathered for use, and the axes that hold their parts."""
    parts = ((i, self._present(tuple(axis for axis in STORAGE[name] if axis not in without)))
             for i, name in enumerate(names) if name in GATHERED)
    return tuple((i, axes, self._levels(axes)) for i, axes in parts if axes)

  def _levels(self, axes: tuple[str, ...]) -> tuple[int, ...]:
    """Returns the steps in which a collective over some axes goes."""
    n_devices = math.prod(self.sizes[axis] for axis in axes)
    return self.slice_levels if n_devices == math.prod(self.slice_levels) else (n_devices,)

  def splits(self, names: Any) -> bool:
    """Returns whether any of the parameters has to be gathered for use."""
    return any(self._parts(leaf) for leaf in jax.tree.leaves(names, is_leaf=_is_names))

  def gathered(self, params: Any, names: Any, without: tuple[str, ...] = ()) -> Any:
    """Returns whole parameters, those over the axes `without` left in parts.

    Matrices arrive in the dtype `wire`, all else as stored. Backward scatters the sum.
    """
    def gather(leaf_names, x):
      parts = self._parts(leaf_names, without)
      if not parts:
        return x
      wire = self.wire if CAST & set(leaf_names) else x.dtype.name
      return _gathered(x, parts, wire, self.reduced_in)
    return self._over(gather, names, params)

  def scattered(self, gradients: Any, names: Any, without: tuple[str, ...] = ()) -> Any:
    """Returns the device's parts of summed gradients of what `gathered` returned, float32."""
    def scatter(leaf_names, g):
      parts = self._parts(leaf_names, without)
      return _scattered(g.astype(self.reduced_in), parts).astype(jnp.float32) if parts else g
    return self._over(scatter, names, gradients)

  def summed(self, gradients: Any, names: Any) -> Any:
    """Returns gradients summed over the axes along which their parameters are replicated."""
    def total(leaf_names, g):
      split = {axis for name in leaf_names for axis in STORAGE[name]}
      axes = self._present(tuple(axis for axis in self.sizes if axis not in split))
      return jax.lax.psum(g.astype(self.reduced_in), axes).astype(g.dtype) if axes else g
    return self._over(total, names, gradients)

  def total(self, x: Any) -> Any:
    """Returns a tree of numbers summed over all devices."""
    axes = self._present(tuple(self.sizes))
    return jax.lax.psum(x, axes) if axes else x

  def token_total(self, x: Any) -> Any:
    """Returns a tree of numbers summed over the devices that hold distinct tokens."""
    axes = self._present(TOKEN_AXES)
    return jax.lax.psum(x, axes) if axes else x

  def to_stages(self, params: Any, names: Any, order_SN: np.ndarray) -> Any:
    """Returns the stage's layers, [n, ...] of stacked [N, ...], by one all-to-all per leaf.

    Args:
      params: parameters stacked over layers, in parts.
      names: their logical names.
      order_SN: layers of each stage in order, -1 where there is none (what comes is arbitrary).
    """
    order_SN = np.maximum(order_SN, 0)

    def send(leaf_names, x):
      dimension = self._stage_dimension(leaf_names)
      if dimension is None:
        return x[jnp.asarray(order_SN)[jax.lax.axis_index(STAGE)]]
      return jax.lax.all_to_all(x[order_SN.reshape(-1)], STAGE, 0, dimension, tiled=True)
    return self._over(send, names, params)

  def from_stages(self, gradients: Any, names: Any, order_SN: np.ndarray) -> Any:
    """Returns gradients [N, ...] of all layers from those of the stage's; see `to_stages`."""
    n_layers = order_SN.max() + 1
    place_N = np.argsort(np.where(order_SN < 0, n_layers, order_SN).reshape(-1), kind='stable')

    def send(leaf_names, g):
      dimension = self._stage_dimension(leaf_names)
      if dimension is None:
        own_N = jnp.asarray(np.where(order_SN < 0, n_layers, order_SN))[jax.lax.axis_index(STAGE)]
        return jnp.zeros((n_layers, *g.shape[1:]), g.dtype).at[own_N].set(g, mode='drop')
      g = jax.lax.all_to_all(g.astype(self.reduced_in), STAGE, dimension, 0, tiled=True)
      return g[place_N[:n_layers]].astype(jnp.float32)
    return self._over(send, names, gradients)

  def to_ends(self, params: Any, names: Any) -> Any:
    """Returns parameters that any stage may use, whole with respect to the stages."""
    def gather(leaf_names, x):
      dimension = self._stage_dimension(leaf_names)
      return x if dimension is None else _all_gathered(x, self._stage_parts(dimension))
    return self._over(gather, names, params)

  def from_ends(self, gradients: Any, names: Any) -> Any:
    """Returns the device's parts of gradients of what `to_ends` returned."""
    def scatter(leaf_names, g):
      dimension = self._stage_dimension(leaf_names)
      if dimension is None:
        return g
      return _scattered(g.astype(self.reduced_in), self._stage_parts(dimension)).astype(jnp.float32)
    return self._over(scatter, names, gradients)

  def _stage_parts(self, dimension: int) -> Parts:
    """Returns the parts of a dimension that the stages split."""
    return ((dimension, (STAGE,), self._levels((STAGE,))),)

  def _stage_dimension(self, names: Names) -> int | None:
    """Returns which dimension the stages split, if one."""
    split = [i for i, name in enumerate(names) if STAGE in STORAGE[name]]
    return split[0] if split else None

  def _over(self, function: Callable, names: Any, tree: Any) -> Any:
    """Returns function(names, leaf) over the leaves of a tree, whatever its containers are."""
    flat_names = jax.tree.leaves(names, is_leaf=_is_names)
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten([function(*pair) for pair in zip(flat_names, leaves, strict=True)])


def over_devices(mesh: Mesh, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
  """Returns the function run by every device on its parts; itself on a mesh of one device."""
  if mesh.size == 1:
    return function
  return jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs,
                       check_vma=False)


def specs(names: Any) -> Any:
  """Returns the tree of PartitionSpec for a tree of logical names of parameters."""
  return jax.tree.map(lambda leaf: PartitionSpec(*(STORAGE[name] or None for name in leaf)),
                      names, is_leaf=_is_names)
