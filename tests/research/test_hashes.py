"""Content hashes: a loop in plain integers is the witness; sharding and placement don't matter."""

import hashlib

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from parallelism.mesh import MeshConfig, make_mesh
from research.training import hashes

WORD = 2**32


def mix(x: int) -> int:
  x = (x ^ x >> 16) * 0x85EBCA6B % WORD
  x = (x ^ x >> 13) * 0xC2B2AE35 % WORD
  return x ^ x >> 16


def witness(x: np.ndarray) -> str:
  """The definition element by element, elements of 8 bytes as two of 4 (low first)."""
  bits = x.astype(np.uint8) if x.dtype == bool else (
      x.view(f'u{x.dtype.itemsize}') if x.dtype.itemsize < 8 else x[..., None].view('<u4'))
  lanes = []
  for lane in range(2):
    total = 0
    for place, value in np.ndenumerate(bits):
      key = lane + 1
      for axis, index in enumerate(place):
        factor = (0x9E3779B97F4A7C15 * (2 * (16 * lane + axis) + 1) >> 16) % WORD | 1
        key = (key + index * factor) % WORD
      total += mix(int(value) ^ mix(key))
    lanes.append(total % WORD)
  label = f'{x.dtype.name}{list(x.shape)}'.encode()
  return hashlib.blake2b(label + np.array(lanes, '<u4').tobytes(), digest_size=8).hexdigest()


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint8,
                                   np.float64, np.int64, bool])
@pytest.mark.parametrize('shape', [(), (5,), (3, 4, 5), (0, 3)])
def test_hash_is_the_sum_over_elements(dtype, shape):
  x = np.asarray(np.random.default_rng(0).normal(size=shape) * 9).astype(dtype)
  assert hashes.digest(x) == witness(x)
  assert hashes.row_digests(np.stack([x, x + x])) == [witness(x), witness(x + x)]


def test_hash_does_not_depend_on_mesh_or_place():
  x_DF = np.random.default_rng(1).normal(size=(8, 16)).astype(np.float32)
  want = {'deep.x': witness(x_DF), 'n': witness(np.int32(7))}
  for axes in ({'data': 8}, {'fsdp': 4, 'tensor': 2, 'data': 1}, {'data': 1}):
    mesh = make_mesh(MeshConfig(**axes))
    for spec in (('fsdp', 'tensor'), (None, ('fsdp', 'tensor')), (None, None)):
      placed = jax.device_put(x_DF, jax.NamedSharding(mesh, jax.P(*spec)))
      whole = jax.device_put(np.int32(7), jax.NamedSharding(mesh, jax.P()))
      assert hashes.digests({'deep': {'x': placed}, 'n': whole}) == want
  assert hashes.digests({'deep': {'x': jnp.asarray(x_DF)}, 'n': jnp.int32(7)}) == want


def test_every_bit_every_swap_and_the_shape_count():
  x_DF = np.random.default_rng(2).normal(size=(4, 6)).astype(np.float32)
  seen = {hashes.digest(x_DF)}
  flipped = []
  for element in range(x_DF.size):
    for bit in range(32):
      y_DF = x_DF.copy()
      y_DF.reshape(-1).view(np.uint32)[element] ^= np.uint32(1 << bit)
      flipped.append(y_DF)
  seen |= set(hashes.row_digests(np.stack(flipped)))
  assert len(seen) == 1 + x_DF.size * 32
  swapped = [x_DF[::-1].copy(), x_DF[:, ::-1].copy(), np.roll(x_DF, 1, 0), np.roll(x_DF, 1, 1)]
  seen |= {hashes.digest(y) for y in [*swapped, x_DF.reshape(6, 4), x_DF.view(np.int32)]}
  assert len(seen) == 7 + x_DF.size * 32


def test_a_record_hash_covers_everything_but_itself():
  record = {'step': 3, 'tensors': {'b': '1', 'a': '2'}}
  want = hashlib.blake2b(b'{"step": 3, "tensors": {"a": "2", "b": "1"}}', digest_size=16)
  assert hashes.record_hash({**record, 'hash': 'old'}) == want.hexdigest()
