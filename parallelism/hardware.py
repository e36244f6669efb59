"""Matmul peaks: published ones for known accelerators, a measured one for CPUs."""

import time

import jax
import jax.numpy as jnp

# Dense bf16 peak per chip in FLOP/s, from the vendors' data sheets; device_kind as JAX names it.
BF16_PEAKS = {
    'TPU v4': 275e12,
    'TPU v5 lite': 197e12,
    'TPU v5': 459e12,
    'TPU v5p': 459e12,
    'TPU v6 lite': 918e12,
    'NVIDIA A100-SXM4-80GB': 312e12,
    'NVIDIA H100 80GB HBM3': 989e12,
    'NVIDIA H200': 989e12,
}


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
