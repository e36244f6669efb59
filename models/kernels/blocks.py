"""Owns how many queries and keys a block of the TPU kernels has, per chip and shape."""

import jax

DEFAULT = (512, 512)
# (device kind, dtype, head width up to, tokens from) -> (queries, keys), by
# experiments/benchmarks/tune_attention.py.
TABLE: dict[tuple[str, str, int, int], tuple[int, int]] = {}


def device_kind() -> str:
  """Returns the kind of device that is traced for: that of the mesh in force, or the first."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def blocks_for(kind: str, dtype: str, width: int, length: int) -> tuple[int, int]:
  """Returns queries and keys of a block for heads of `width` in rows of `length` tokens.

  They are those of the narrowest entry that is wide enough, the longest of these that is not
  too long; DEFAULT where there is none.
  """
  fitting = [
    (w, -tokens) for k, d, w, tokens in TABLE
    if (k, d) == (kind, dtype) and w >= width and tokens <= length
  ]
  if not fitting:
    return DEFAULT
  w, tokens = min(fitting)
  return TABLE[kind, dtype, w, -tokens]
