"""Facts of accelerators: peaks, memory and links as published; a measured peak for CPUs."""

import dataclasses
import time

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Chip:
  """What Google publishes of a TPU chip.

  name is that of topologies ('v5e:2x4'), device_kinds are those of JAX; link_bytes_per_second is
  what one link carries one way, of which a chip has two (to either side) in each of torus_dims
  dimensions. A dimension closes to a ring where its size is a multiple of ring_multiple. JAX shows
  a chip as `devices` devices, which share all of it.
  """

  name: str
  device_kinds: tuple[str, ...]
  bf16_flops: float
  hbm_bytes: int
  hbm_bytes_per_second: float
  link_bytes_per_second: float
  torus_dims: int
  ring_multiple: int
  devices: int = 1


# https://docs.cloud.google.com/tpu/docs/ v4, v5e, v5p, v6e and tpu7x, read in November 2026. Their
# inter-chip bandwidths are those of all links of a chip in both directions: v5e 400 GB/s, v6e 800
# (four links), v5p and tpu7x 1200 (six). The page of v4 has none: 50 GB/s for each of six links is
# from Jouppi et al. 2023 (arXiv:2304.01433). Pages of v5e and v6e differ in the memory bandwidth
# (800 and 819 GB/s; 1600, 1638 and 1640). Rings: "All 4x4x4 and larger slices have full 3D torus"
# (v5p; v4: each dimension a multiple of 4); the 16x16 of v5e and v6e is a torus.
CHIPS = {chip.name: chip for chip in (
    Chip('v4', ('TPU v4',), 275e12, 32 * 2**30, 1200e9, 50e9, 3, 4),
    Chip('v5e', ('TPU v5 lite', 'TPU v5e'), 197e12, 16 * 2**30, 819e9, 50e9, 2, 16),
    Chip('v5p', ('TPU v5', 'TPU v5p'), 459e12, 95 * 2**30, 2765e9, 100e9, 3, 4),
    Chip('v6e', ('TPU v6 lite', 'TPU v6e'), 918e12, 32 * 2**30, 1638e9, 100e9, 2, 16),
    Chip('tpu7x', ('TPU7x',), 2307e12, 192 * 2**30, 7380e9, 100e9, 3, 4, devices=2),
)}
# Dense bf16 peak per device in FLOP/s, from the vendors' data sheets; device_kind as JAX names it.
BF16_PEAKS = {
    **{kind: chip.bf16_flops / chip.devices
       for chip in CHIPS.values() for kind in chip.device_kinds},
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA H200': 989e12,
}


def find_chip(name: str) -> Chip:
  """Returns the chip of a name such as 'v5e', a topology such as 'v5e:2x4' or a device kind.

  Raises:
    ValueError: it is none of them.
  """
  for chip in CHIPS.values():
    if name.partition(':')[0] == chip.name or name in chip.device_kinds:
      return chip
  raise ValueError(f'{name!r} is no TPU whose facts are known; such are {", ".join(CHIPS)}')


def measured_peak(dtype=jnp.float32, size: int = 1024, rounds: int = 5) -> float:
  """Returns the best rate in FLOP/s of a [size, size] matmul over `rounds` timings."""
  matmul = jax.jit(lambda x_DD, y_DD: x_DD @ y_DD)
  x_DD = jnp.ones((size, size), dtype)
  matmul(x_DD, x_DD).block_until_ready()
  seconds = []
  for _ in range(rounds):
    start = time.perf_counter()
    matmul(x_DD, x_DD).block_until_ready()
    seconds.append(time.perf_counter() - start)
  return 2 * size**3 / min(seconds)


def peak_flops(n_devices: int) -> tuple[float, str]:
  """Returns the run's matmul peak in FLOP/s over all its devices, and where the figure is from.

  CPU devices of one host share its cores, so there the measured peak counts once.
  """
  kind = jax.devices()[0].device_kind
  if kind in BF16_PEAKS:
    return BF16_PEAKS[kind] * n_devices, f'{n_devices} x published bf16 peak of {kind}'
  if jax.default_backend() == 'cpu':
    return measured_peak() * jax.process_count(), 'measured f32 1024x1024 matmul on this CPU'
  return measured_peak(jnp.bfloat16, 4096) * n_devices, f'measured bf16 matmul, {kind}'
