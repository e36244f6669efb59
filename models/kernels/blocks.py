"""Owns how many queries and keys a block of the TPU kernels has, per chip and shape."""

import jax

DEFAULT = (512, 512)
# (device kind, dtype, head width up to) -> (queries, keys).
TABLE: dict[tuple[str, str, int], tuple[int, int]] = {}


def device_kind() -> str:
  """Returns the kind of device that is traced for: that of the mesh in force, or the first."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def blocks_for(kind: str, dtype: str, width: int) -> tuple[int, int]:
  """Returns queries and keys of a block for heads of `width`; shorter rows take fewer."""
  wide_enough = [w for k, d, w in TABLE if (k, d) == (kind, dtype) and w >= width]
  return TABLE[kind, dtype, min(wide_enough)] if wide_enough else DEFAULT
