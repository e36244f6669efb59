"""The device mesh: its named axes, their sizes and how they are laid over the devices."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Annotated as A
from typing import ClassVar

import jax
import numpy as np
from jax.experimental import mesh_utils
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


def axis_sizes(config: MeshConfig, n_devices: int, n_slices: int = 1) -> dict[str, int]:
  """Returns the size of every axis.

  Args:
    config: the axes as asked for.
    n_devices: devices at hand.
    n_slices: groups of devices with a fast network of their own (see `make_mesh`).

  Raises:
    ValueError: the axes do not fit the devices, or an axis other than data and stage would leave
      a slice; the message names the nearest that fit.
  """
  sizes = {name: getattr(config, name) for name in AXES}
  inner = {name: size for name, size in sizes.items() if name != 'data'}
  if sizes['data'] == -1:
    if n_devices % math.prod(inner.values()):
      raise ValueError(f'{_product(inner)} does not divide the {n_devices} devices at hand; '
                       f'{_nearest(config, n_devices, n_slices)}')
    sizes['data'] = n_devices // math.prod(inner.values())
  needed = math.prod(sizes.values())
  if needed > n_devices:
    raise ValueError(f'mesh {_product(sizes)} needs {needed} devices, {n_devices} are at hand; '
                     f'{_nearest(config, n_devices, n_slices)}')
  if sizes['data'] * sizes['stage'] % n_slices:
    raise ValueError(f'mesh.data={sizes["data"]} x mesh.stage={sizes["stage"]} is not a multiple '
                     f'of the {n_slices} slices, between which no other axis may lie; '
                     f'{_nearest(config, n_devices, n_slices)}')
  return sizes


def _product(sizes: dict[str, int]) -> str:
  """Returns the axes of more than one device as text."""
  return ' x '.join(f'mesh.{name}={size}' for name, size in sizes.items() if size > 1)


def _nearest(config: MeshConfig, n_devices: int, n_slices: int) -> str:
  """Returns, for the end of an error, the mesh of all devices that is closest to the one asked for.

  Closest turns on the fewest axes that were off (data aside), then has the least sum of absolute
  log ratios over the axes, then the fewest of them changed, then the most data.
  """
  wanted = {name: getattr(config, name) for name in AXES if getattr(config, name) != -1}

  def distance(sizes: dict[str, int]) -> tuple[int, float, int, int]:
    changed = [name for name in wanted if sizes[name] != wanted[name]]
    turned_on = sum(wanted[name] == 1 for name in changed if name != 'data')
    ratios = sum(abs(math.log(sizes[name] / wanted[name])) for name in changed)
    return turned_on, round(ratios, 9), len(changed), -sizes['data']

  fitting = [sizes for sizes in factorizations(n_devices, AXES)
             if sizes['data'] * sizes['stage'] % n_slices == 0]
  best = min(fitting, key=distance)
  named = {name: size for name, size in best.items() if name in wanted}
  return f'the nearest that fits is {_product(named) or _product(best) or "mesh.data=1"}'


def factorizations(n: int, names: Sequence[str]) -> Iterator[dict[str, int]]:
  """Yields every way to write n as a product of one size per name."""
  if len(names) == 1:
    yield {names[0]: n}
    return
  for size in range(1, n + 1):
    if n % size == 0:
      for rest in factorizations(n // size, names[1:]):
        yield {names[0]: size, **rest}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Returns the mesh over `devices` (default: all), fastest axis (tensor) innermost.

  TPU slices talk to each other over the slow data-center network: the slices lie along data, and
  along stage where data is not a multiple of them, and every other axis stays inside a slice.
  Inside a slice the axes follow its torus. Other devices keep the order in which JAX gives them,
  process by process, so that there too data is what crosses hosts first.

  Raises:
    ValueError: the axes do not fit the devices.
  """
  devices = jax.devices() if devices is None else list(devices)
  n_slices = len(_slices(devices))
  sizes = axis_sizes(config, len(devices), n_slices)
  used = math.prod(sizes.values())
  if used < len(devices) and (jax.process_count() > 1 or n_slices > 1):
    raise ValueError(f'the mesh uses {used} of {len(devices)} devices; with several hosts it must '
                     f'use all of them; {_nearest(config, len(devices), n_slices)}')
  return Mesh(_arranged(sizes, devices[:used], n_slices), AXES,
              axis_types=(AxisType.Auto,) * len(AXES))


def _slices(devices: Sequence[jax.Device]) -> set[int]:
  """Returns the indices of the TPU slices that the devices belong to; {0} where there are none.

  GPUs have indices too, of their NVLink domains, but any axis may cross those.
  """
  if devices[0].platform != 'tpu':
    return {0}
  return {getattr(device, 'slice_index', None) or 0 for device in devices}


def _arranged(sizes: dict[str, int], devices: list[jax.Device], n_slices: int) -> np.ndarray:
  """Returns the devices as an array of the mesh's shape."""
  shape = tuple(sizes.values())
  if n_slices > 1:
    over = {'data': math.gcd(sizes['data'], n_slices)}
    over['stage'] = n_slices // over['data']
    slow = tuple(over.get(name, 1) for name in AXES)
    fast = tuple(size // parts for size, parts in zip(shape, slow, strict=True))
    return mesh_utils.create_hybrid_device_mesh(fast, slow, devices,
                                                allow_split_physical_axes=True)
  try:
    if devices[0].platform == 'tpu' and max(shape) == len(devices) == 16:
      # One axis of a 4x4 would become a ring, over which the compiler (libtpu 0.0.52) sums the whole
      # where it should scatter; over rows it scatters (see `slice_levels`).
      return mesh_utils.create_device_mesh((4, 4), devices).reshape(shape)
    # An axis gets whole dimensions of the torus where its size allows, else a part of one.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  except (AssertionError, NotImplementedError):
    # A few chips of a slice that are no cuboid have no torus; they keep their order.
    return np.array(devices).reshape(shape)


def slice_levels(mesh: Mesh) -> tuple[int, ...]:
  """Returns the sizes, outermost first, of the steps in which whole slices gather and scatter.

  Over all devices of a torus of several dimensions the TPU compiler (libtpu 0.0.52) sends
  all-reduces in place of scatters, in three dimensions of gathers too: up to twice the bytes. Along
  the outermost dimension and then over the rest of them it has both. One size says that one
  collective serves.
  """
  devices = list(mesh.devices.flat)
  devices = devices[:len(devices) // len(_slices(devices))]
  if devices[0].platform != 'tpu':
    return (len(devices),)
  for places in np.array([device.coords for device in devices]).T:
    if len(devices) % len(set(places)):
      continue  # A few chips that are no cuboid.
    blocks = places.reshape(len(set(places)), -1)
    if 1 < len(blocks) < len(devices) and (blocks == blocks[:, :1]).all():
      return blocks.shape
  return (len(devices),)
