"""How fast the links between TPU chips carry collectives over the axes of a mesh.

The model: chips that fill a box of the torus use all dimensions of the box at once, both ways
where a dimension closes to a ring, as the compiler's algorithms do. Other chips form a ring in the
order of the mesh, whose messages go along one dimension after the other and share links. Latency
is left out (about a microsecond per hop).
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from parallelism.collectives import Collective
from parallelism.hardware import Chip, find_chip


@dataclasses.dataclass(frozen=True)
class Route:
  """Bytes that a device sends per second over a set of mesh axes.

  ring is the rate of gathers, scatters and reductions, shift that of permutes to the next device,
  exchange that of all-to-all.
  """

  ring: float
  shift: float
  exchange: float


class Network:
  """The links under a mesh of TPUs."""

  def __init__(self, mesh: jax.sharding.Mesh,
               measured: Mapping[tuple[str, ...], Route] | None = None):
    """Takes the places of the devices, real or compile-only, from their coordinates.

    Args:
      mesh: of TPUs of one slice.
      measured: routes by mesh axes (in the mesh's order) that replace the model's.

    Raises:
      ValueError: the devices are of an unknown kind or of several slices.
    """
    devices = mesh.devices
    self.chip = find_chip(devices.flat[0].device_kind)
    slices = {getattr(device, 'slice_index', None) for device in devices.flat}
    if len(slices) > 1:
      raise ValueError(f'the mesh has devices of {len(slices)} slices, between which the bandwidth '
                       'is not known; one slice is supported')
    self.axis_names = mesh.axis_names
    coordinates = np.array([device.coords for device in devices.flat])
    self.sizes = tuple(int(n) + 1 for n in np.ptp(coordinates, axis=0))
    self._coordinates = (coordinates - coordinates.min(axis=0)).reshape(*devices.shape, -1)
    self._routes = dict(measured or {})

  def seconds(self, collective: Collective) -> float:
    """Returns how long a collective takes when nothing else is on its links."""
    if not collective.axes or not collective.sent:
      return 0.0
    route = self.route(collective.axes)
    rate = {'collective-permute': route.shift, 'all-to-all': route.exchange,
            'ragged-all-to-all': route.exchange}.get(collective.kind, route.ring)
    return collective.sent / rate

  def route(self, axes: tuple[str, ...]) -> Route:
    """Returns the route between the devices of groups that span some mesh axes."""
    if axes not in self._routes:
      where = [self.axis_names.index(name) for name in axes]
      inner = range(-len(where) - 1, -1)
      places = np.moveaxis(self._coordinates, where, inner)
      groups = places.reshape(-1, math.prod(places.shape[inner[0]:-1]), places.shape[-1])
      self._routes[axes] = _route(self.chip, self.sizes, groups)
    return self._routes[axes]


def _route(chip: Chip, sizes: tuple[int, ...], groups: np.ndarray) -> Route:
  """Returns the route between devices at some places.

  Devices of one chip share its links; what goes between them is taken to be as fast as all the
  links together, and what comes from other chips for both comes once.

  Args:
    chip: facts of the chip.
    sizes: sizes of the torus's dimensions.
    groups: places [groups, devices of a group, dimensions].
  """
  link, n_devices = chip.link_bytes_per_second, groups.shape[1]
  chips = [list(dict.fromkeys(map(tuple, group.tolist()))) for group in groups]
  n_chips = len(chips[0])
  if n_chips == 1:
    return Route(*[2 * chip.torus_dims * link] * 3)
  together = n_devices // n_chips  # devices of a chip that are in the same group
  ring = min(_box_rate(chip, sizes, places) for places in chips) or 2 / _busiest(
      chip, sizes, chips, (1, -1))
  leaving = (1 - 1 / n_devices) / (1 - 1 / n_chips)
  share = link * together / chip.devices
  middle = min(_middle_rate(chip, sizes, places) for places in chips)
  return Route(ring * share * leaving, link / chip.devices / _busiest(chip, sizes, chips, (1,)),
               middle * share * (1 - 1 / n_devices))


def _box_rate(chip: Chip, sizes: tuple[int, ...], places: list[tuple[int, ...]]) -> float:
  """Returns how many links' worth a chip sends in a box of chips, 0 where they fill none."""
  columns = [sorted(set(column)) for column in zip(*places, strict=True)]
  if math.prod(map(len, columns)) != len(places):
    return 0.0
  return sum(_directions(chip, column, size)
             for column, size in zip(columns, sizes, strict=True) if len(column) > 1)


def _middle_rate(chip: Chip, sizes: tuple[int, ...], places: list[tuple[int, ...]]) -> float:
  """Returns an exchange's bytes per second and chip, in units of a link, whole operands counted.

  Half of what n chips of a line exchange with each other crosses its middle: n / 4 of the bytes
  of one chip each way.
  """
  columns = [sorted(set(column)) for column in zip(*places, strict=True)]
  return min(4 * _directions(chip, column, size) / len(column)
             for column, size in zip(columns, sizes, strict=True) if len(column) > 1)


def _directions(chip: Chip, column: list[int], size: int) -> float:
  """Returns how many links of a dimension a chip has for its group: one on a line, two on a ring.

  Groups that step over chips share the links with those between.
  """
  stride = (column[-1] - column[0]) / (len(column) - 1)
  closed = len(column) * stride >= size and size % chip.ring_multiple == 0
  return (2 if closed else 1) / stride


def _busiest(chip: Chip, sizes: tuple[int, ...], groups: list[list[tuple[int, ...]]],
             shifts: tuple[int, ...]) -> int:
  """Returns how many messages share the busiest link when every chip sends to its neighbors.

  Args:
    chip: facts of the chip.
    sizes: sizes of the torus's dimensions.
    groups: places of the chips of each group in the order of the mesh.
    shifts: to which neighbors: 1 for the next in the group, -1 for the one before.
  """
  load = collections.Counter()
  for places in dict.fromkeys(map(tuple, groups)):
    for i, place in enumerate(places):
      for shift in shifts:
        load.update(_links(chip, sizes, place, places[(i + shift) % len(places)]))
  return max(load.values(), default=1)


def _links(chip: Chip, sizes: tuple[int, ...], start: tuple[int, ...], end: tuple[int, ...]
           ) -> Iterator[tuple[tuple[int, ...], int, int]]:
  """Yields the links (place, dimension, direction) of a message, dimension after dimension."""
  place = list(start)
  for i, size in enumerate(sizes):
    distance = end[i] - place[i]
    if size % chip.ring_multiple == 0 and abs(distance) > size / 2:
      distance -= math.copysign(size, distance)
    direction = 1 if distance > 0 else -1
    for _ in range(abs(int(distance))):
      yield tuple(place), i, direction
      place[i] = (place[i] + direction) % size
