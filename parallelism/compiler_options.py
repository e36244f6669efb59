"""What the TPU compiler is told for each chip, and how much memory it lets a program have."""

import jax

from parallelism.hardware import CHIPS, find_chip

_OFFLOADED = {f'xla_tpu_enable_sparse_core_collective_offload_{kind}': True
              for kind in ('all_gather', 'reduce_scatter', 'all_reduce')}
# By chip. Sparse cores carry collectives beside the computation.
OPTIONS: dict[str, dict[str, bool]] = {'v5p': _OFFLOADED, 'v6e': _OFFLOADED}
# Bytes of HBM in which a program has to fit, as the compiler of libtpu 0.0.52 says when one does
# not ("exceeds available HBM (15.75G)"). The rest is the system's.
USABLE = {name: int(gib * 2**30) for name, gib in
          {'v4': 30.75, 'v5e': 15.75, 'v5p': 95.73, 'v6e': 31.24}.items()}


def compiler_options(device: jax.Device) -> dict[str, bool]:
  """Returns the options for programs on a device, none unless it is a TPU with some."""
  return OPTIONS.get(find_chip(device.device_kind).name, {}) if device.platform == 'tpu' else {}


def usable_bytes(device_kind: str) -> int:
  """Returns the bytes of HBM that a program may take on one TPU device.

  Where the compiler's bound is not known it is the device's share of all.
  """
  chip = find_chip(device_kind)
  return USABLE.get(chip.name, CHIPS[chip.name].hbm_bytes // chip.devices)
