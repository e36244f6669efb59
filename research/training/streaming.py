"""Parameters from files onto the mesh, a piece at a time.

Beyond the parameters themselves the host never holds more than a few pieces of `PIECE_BYTES`.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.interop.layout import Box
from parallelism.sharding import path_name

PIECE_BYTES = 4 << 20
Read = Callable[[str, Box], np.ndarray]


@functools.partial(jax.jit, donate_argnums=0)
def _filled(part: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
  """Returns a device's part with a piece written at `start`, in place."""
  return jax.lax.dynamic_update_slice(part, piece.astype(part.dtype), start)


def pieces(box: Box, n_bytes: int, limit: int) -> Iterator[Box]:
  """Yields boxes of at most about `limit` bytes that make up a box, outer axes cut first.

  Args:
    box: start and stop along each axis.
    n_bytes: of one element.
    limit: of a piece.
  """
  size = n_bytes * math.prod(stop - start for start, stop in box)
  axis = next((i for i, (start, stop) in enumerate(box) if stop - start > 1), None)
  if size <= limit or axis is None:
    yield box
    return
  start, stop = box[axis]
  step = max(1, (stop - start) * limit // size)
  for first in range(start, stop, step):
    cut = first, min(first + step, stop)
    yield from pieces((*box[:axis], cut, *box[axis + 1:]), n_bytes, limit)


def _part(read: Read, name: str, box: Box, dtype: Any, device: jax.Device) -> jax.Array:
  """Returns a box of a parameter on a device."""
  shape = tuple(stop - start for start, stop in box)
  part = jnp.zeros(shape, dtype, device=device)
  for piece in pieces(box, np.dtype(dtype).itemsize, PIECE_BYTES):
    start = np.array([p[0] - b[0] for p, b in zip(piece, box)], np.int32)
    values = jax.device_put(read(name, piece), device)
    # Waiting keeps the queue, and with it host memory, at one piece.
    part = jax.block_until_ready(_filled(part, values, start))
  return part


def _placed(read: Read, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """Returns one parameter; this process reads what its devices hold, equal parts once."""
  held: dict[Box, jax.Array] = {}
  parts = []
  for device, index in leaf.sharding.addressable_devices_indices_map(leaf.shape).items():
    box = tuple(s.indices(size)[:2] for s, size in zip(index, leaf.shape, strict=True))
    if box not in held:
      held[box] = _part(read, name, box, leaf.dtype, device)
      parts.append(held[box])
    else:
      parts.append(jax.device_put(held[box], device))
  return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, parts)


def place_streamed(read: Read, abstract: Any, progress: Callable[[str], None] = lambda name: None
                   ) -> Any:
  """Returns parameters laid out like `abstract`, filled piece by piece.

  Args:
    read: (dotted name, box) -> values in any float dtype; NumPy, of which only boxes are asked.
    abstract: tree of ShapeDtypeStruct with shardings.
    progress: called with each parameter's name once it is placed.
  """
  def place(path, leaf):
    array = _placed(read, path_name(path), leaf)
    progress(path_name(path))
    return array
  return jax.tree.map_with_path(place, abstract)
