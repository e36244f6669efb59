"""The sharding tables: which mesh axes split each logical axis, and what follows from them."""

from collections.abc import Mapping
import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Names = tuple[str | None, ...]

# Logical axis of a parameter -> mesh axes that split it where it is stored, outermost first.
STORAGE: dict[str | None, tuple[str, ...]] = {
    None: (),
    'layers': (),
    'embed': ('fsdp', 'expert', 'context', 'stage'),
    'mlp': ('tensor',),
    'heads': ('tensor',),
    'kv_heads': ('tensor',),
    'head': (),
    'vocab': ('tensor',),
    'positions': (),
    'experts': ('expert', 'tensor'),
    'expert_embed': ('fsdp', 'context', 'stage'),
    'expert_mlp': (),
}
# Logical axes of which all parts are gathered for use; the others stay split.
GATHERED = ('embed', 'expert_embed')
# Logical axis of an activation -> mesh axes that split it.
ACTIVATIONS: dict[str | None, tuple[str, ...]] = {
    None: (),
    'batch': ('data', 'fsdp', 'expert'),
    'row': ('context',),  # tokens of a row of training data
    'length': (),
    'embed_act': (),
    'heads_act': ('tensor',),
    'kv_heads_act': ('tensor',),
    'mlp_act': ('tensor',),
    'vocab_act': ('tensor',),
}
TABLE = STORAGE | ACTIVATIONS
# Devices along these hold distinct tokens, along tensor where it splits the residual stream.
TOKEN_AXES = ('data', 'fsdp', 'expert', 'context', 'tensor')


def partition_spec(names: Names) -> PartitionSpec:
  """Returns the PartitionSpec of an array whose axes carry these logical names."""
  axes = []
  for name in names:
    if name not in TABLE:
      raise KeyError(f'logical axis {name!r} is not in the sharding tables')
    axes.append(TABLE[name] or None)
  return PartitionSpec(*axes)


def named_sharding(mesh: Mesh, names: tuple[str | None, ...]) -> NamedSharding:
  """Returns the sharding on `mesh` of an array whose axes carry these logical names."""
  return NamedSharding(mesh, partition_spec(names))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that keeps a whole copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def constrain(mesh: Mesh):
  """Returns `f(x, names)`, which pins an activation to the table's sharding inside a jit."""
  def constrain_to_table(x, names):
    return jax.lax.with_sharding_constraint(x, named_sharding(mesh, names))
  return constrain_to_table


def parameter_shardings(mesh: Mesh, logical_axes: Any) -> Any:
  """Returns a tree of NamedSharding for a tree whose leaves are tuples of logical names."""
  return jax.tree.map(lambda names: named_sharding(mesh, names), logical_axes,
                      is_leaf=lambda leaf: isinstance(leaf, tuple))


def indivisible(sizes: Mapping[str, int], shapes: Any, logical_axes: Any) -> str:
  """Returns a sentence on the first parameter axis that its mesh axes do not divide, '' if none.

  The sentence gives the nearest number of devices that does.

  Args:
    sizes: devices of each mesh axis.
    shapes: tree of arrays or ShapeDtypeStruct.
    logical_axes: same tree, leaves tuples of logical names.
  """
  flat_names = jax.tree.leaves(logical_axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
  for (path, leaf), names in zip(jax.tree.leaves_with_path(shapes), flat_names, strict=True):
    for size, name in zip(leaf.shape, names, strict=True):
      parts = math.prod(sizes[axis] for axis in STORAGE[name])
      if size % parts:
        axes = ' x '.join(f'mesh.{axis}={sizes[axis]}' for axis in STORAGE[name]
                          if sizes[axis] > 1)
        return (f'parameter {path_name(path)}: its {name!r} axis of {size} is not divided by '
                f'{axes}; the nearest number of devices that divides it is '
                f'{nearest_divisor(size, parts)}')
  return ''


def nearest_divisor(size: int, parts: int) -> int:
  """Returns the divisor of `size` closest to `parts`, the smaller of two."""
  divisors = [n for n in range(1, size + 1) if size % n == 0]
  return min(divisors, key=lambda n: (abs(n - parts), n))


def path_name(path: tuple) -> str:
  """Returns a key path as dotted text, for instance `blocks.attention.q`."""
  return jax.tree_util.keystr(path, simple=True, separator='.')


def like_parameters(mesh: Mesh, tree: Any, parameters: Any, shardings: Any) -> Any:
  """Returns shardings for a tree (optimizer state) whose leaves mirror parameters.

  Those that mirror none (counters, factored moments) are replicated; see `mirrored`.
  """
  return mirrored(tree, parameters, shardings, replicated(mesh))


def mirrored(tree: Any, parameters: Any, values: Any, otherwise: Any) -> Any:
  """Returns for each leaf of a tree the value of the parameter that it mirrors, or `otherwise`.

  A leaf mirrors a parameter whose path its key path ends with and whose shape it has.

  Args:
    tree: such as an optimizer's state.
    parameters: the parameters' tree.
    values: one per parameter, in order: a tree of them or a list.
    otherwise: the value of all other leaves.
  """
  known = [(path_name(path).split('.'), leaf.shape) for path, leaf in
           jax.tree.leaves_with_path(parameters)]
  targets = values if isinstance(values, list) else jax.tree.leaves(values)

  def pick(path, leaf):
    keys = path_name(path).split('.')
    for (parameter_keys, shape), value in zip(known, targets, strict=True):
      if keys[-len(parameter_keys):] == parameter_keys and leaf.shape == shape:
        return value
    return otherwise

  return jax.tree.map_with_path(pick, tree)
