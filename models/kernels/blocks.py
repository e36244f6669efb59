"""Owns how many queries and keys a block of the TPU kernels has, per chip and shape."""

import jax

DEFAULT = (512, 512)
# (device kind, dtype, head width up to, keys that a query sees from) -> (queries, keys). Ranked by
# the compiler's schedule (experiments/benchmarks/tune_attention.py), not on chips. Wider heads and
# float32 take too much of the fast memory in such blocks, once masks and biases come with them.
TABLE: dict[tuple[str, str, int, int], tuple[int, int]] = {
  ('TPU v4', 'bfloat16', 128, 4096): (1024, 1024),
  ('TPU v5 lite', 'bfloat16', 128, 4096): (1024, 1024),
  ('TPU v5', 'bfloat16', 128, 4096): (1024, 1024),
  ('TPU v6 lite', 'bfloat16', 128, 4096): (1024, 1024),
}


def device_kind() -> str:
  """Returns the kind of device that is traced for: that of the mesh in force, or the first."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.devices()[0].device_kind if device is None else device.device_kind


def blocks_for(kind: str, dtype: str, width: int, reach: int) -> tuple[int, int]:
  """Returns queries and keys of a block for heads of `width` whose queries see `reach` keys.

  They are those of the narrowest entry that is wide enough, among these of the one for the
  farthest reach that is not too far; DEFAULT where there is none.
  """
  fitting = [
    (w, -tokens) for k, d, w, tokens in TABLE
    if (k, d) == (kind, dtype) and w >= width and tokens <= reach
  ]
  if not fitting:
    return DEFAULT
  w, tokens = min(fitting)
  return TABLE[kind, dtype, w, -tokens]
