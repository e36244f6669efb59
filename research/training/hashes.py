"""Content hashes of tensors: the same for any mesh, sharding, number of processes and machine.

Every element gives a 32-bit term, a mixture of its bits and its place; a lane of the hash is the
sum of all terms modulo 2^32. Sums don't depend on order, so devices add up what they hold and no
tensor is gathered. The mixture is the finalizer of MurmurHash3 (A. Appleby), a bijection, so one
changed element always changes the hash; other damage goes unnoticed once in 2^64 times. It guards
against accidents, not against an adversary.
"""

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parallelism.sharding import path_name

LANES = 2
_GOLDEN = 0x9E3779B97F4A7C15


def _multiplier(lane: int, axis: int) -> np.uint32:
  """Returns the odd number by which the index along an axis enters the key of a place."""
  return np.uint32((_GOLDEN * (2 * (16 * lane + axis) + 1) >> 16) & 0xFFFFFFFF | 1)


def _mix(x):
  x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def _bits(x):
  """Returns the bits of each element as uint32."""
  if x.dtype == bool:
    return x.astype(jnp.uint32)
  unsigned = jnp.dtype(f'uint{8 * x.dtype.itemsize}')
  return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)


def _sums(x):
  """Returns the lanes of one tensor, uint32 [LANES]."""
  bits, lanes = _bits(x), []
  for lane in range(LANES):
    key = jnp.full(x.shape, np.uint32(lane + 1))
    for axis in range(x.ndim):
      index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
      key = key + index * _multiplier(lane, axis)
    lanes.append(jnp.sum(_mix(bits ^ _mix(key)), dtype=jnp.uint32))
  return jnp.stack(lanes)


@functools.lru_cache(maxsize=8)
def _summing(mesh: jax.sharding.Mesh | None):
  """Returns the jitted f(leaves) -> lanes, uint32 [leaves, LANES], whole on every device."""
  whole = mesh and jax.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return jax.jit(lambda leaves: jnp.stack([_sums(x) for x in leaves]), out_shardings=whole)


_sums_of_one = jax.jit(_sums)
_sums_of_rows = jax.jit(jax.vmap(_sums))


def _hex(dtype: Any, shape: tuple[int, ...], lanes: np.ndarray) -> str:
  label = f'{np.dtype(dtype).name}{list(shape)}'.encode()
  return hashlib.blake2b(label + lanes.astype('<u4').tobytes(), digest_size=8).hexdigest()


def digests(tree: Any) -> dict[str, str]:
  """Returns the hash of every tensor of a tree by dotted path, 16 hex digits.

  Args:
    tree: of arrays on the devices of one mesh; every process of it must call.
  """
  named = [(path_name(path), leaf) for path, leaf in jax.tree.leaves_with_path(tree)]
  leaves = [leaf for _, leaf in named]
  if not leaves:
    return {}
  lanes_LN = np.asarray(_summing(getattr(leaves[0].sharding, 'mesh', None))(leaves))
  return {name: _hex(leaf.dtype, leaf.shape, lanes)
          for (name, leaf), lanes in zip(named, lanes_LN, strict=True)}


def _unsigned(x: np.ndarray) -> np.ndarray:
  """Returns the bits of an array as unsigned numbers that every backend has.

  Elements of 8 bytes become pairs along a last axis of their own.
  """
  if x.dtype == bool:
    return x.astype(np.uint8)
  x = np.ascontiguousarray(x).reshape(x.shape)
  if x.dtype.itemsize < 8:
    return x.view(f'u{x.dtype.itemsize}')
  return x[..., None].view('u4')


def digest(x: np.ndarray) -> str:
  """Returns the hash of one array on the host; the same as `digests` gives it on devices."""
  return _hex(x.dtype, x.shape, np.asarray(_sums_of_one(_unsigned(x))))


def row_digests(x: np.ndarray) -> list[str]:
  """Returns `digest` of x[0], x[1], ..."""
  if not len(x):
    return []
  return [_hex(x.dtype, x.shape[1:], lanes) for lanes in np.asarray(_sums_of_rows(_unsigned(x)))]


def record_hash(record: dict[str, Any]) -> str:
  """Returns the hash of what JSON can hold, but for a key `hash` on top; 32 hex digits."""
  text = json.dumps({key: value for key, value in record.items() if key != 'hash'}, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
