"""The device mesh: its named axes, their sizes and how they are laid over the devices."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Annotated as A
from typing import ClassVar

import jax
from jax.sharding import AxisType, Mesh

# Outermost first: what communicates least, once a step, lies on the slowest links.
AXES = ('data', 'stage', 'fsdp', 'expert', 'context', 'tensor')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """Sizes of the mesh axes; their product is the number of devices used by the run."""

  KIND: ClassVar[str] = 'placement'

  data: A[int, 'replicas that split the batch only; -1 takes all devices that are left'] = -1
  stage: A[int, 'pipeline stages, which split the layers'] = 1
  fsdp: A[int, 'devices that split the batch and the parameters, gradients and moments'] = 1
  expert: A[int, 'devices that split the batch and the experts'] = 1
  context: A[int, 'devices that split the tokens of a row'] = 1
  tensor: A[int, 'devices that split heads, feed-forward width and vocabulary'] = 1

  def __post_init__(self):
    for name in AXES:
      size = getattr(self, name)
      if size < 1 and not (name == 'data' and size == -1):
        raise ValueError(f'mesh.{name}={size} must be at least 1 (mesh.data may be -1)')


def axis_sizes(config: MeshConfig, n_devices: int) -> dict[str, int]:
  """Returns the size of every axis for n_devices; raises ValueError if they do not fit."""
  sizes = {name: getattr(config, name) for name in AXES}
  if sizes['data'] == -1:
    others = {name: size for name, size in sizes.items() if name != 'data' and size > 1}
    rest = math.prod(others.values())
    if n_devices % rest:
      product = ' x '.join(f'mesh.{name}={size}' for name, size in others.items())
      raise ValueError(f'{product} does not divide the {n_devices} devices at hand')
    sizes['data'] = n_devices // rest
  if math.prod(sizes.values()) > n_devices:
    product = ' x '.join(f'{name} {size}' for name, size in sizes.items() if size > 1)
    raise ValueError(f'mesh {product} needs {math.prod(sizes.values())} devices, '
                     f'{n_devices} are at hand')
  return sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the mesh over `devices` (default: all), fastest axis (tensor) innermost.

  Raises:
    ValueError: the axes do not fit the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  sizes = axis_sizes(config, len(devices))
  used = math.prod(sizes.values())
  if used < len(devices) and jax.process_count() > 1:
    raise ValueError(f'the mesh uses {used} of {len(devices)} devices; with several hosts it must '
                     'use all of them')
  return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES),
                       devices=devices[:used])
