"""Collective operations of a compiled program: bytes on the wire and the mesh axes they span.

Devices are numbered as the program numbers them: by their place in `mesh.devices.flat`.
"""

import collections
import dataclasses
import itertools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from parallelism.hlo import COLLECTIVES, Computation, Instruction, Module


@dataclasses.dataclass(frozen=True)
class Collective:
  """One logical collective, however many instructions carry it.

  kind is one of hlo.COLLECTIVES; sent are the bytes that a device sends on the wire each time it
  runs (of a permute: the busiest device); group_size are the devices of a group, of a permute two;
  axes are the mesh axes along which devices exchange data, none for a group of one; source is the
  path of the JAX operation.
  """

  name: str
  kind: str
  sent: float
  group_size: int
  axes: tuple[str, ...]
  source: str


def wire_bytes(kind: str, n_bytes: float, n: int) -> float:
  """Returns the bytes that each of n devices sends, by algorithms that are bandwidth-optimal.

  A ring gathers or scatters n - 1 shards through every device (Patarasu and Yuan 2009, "Bandwidth
  optimal all-reduce algorithms"). A ragged exchange, whose sizes are not known, counts as even.

  Args:
    kind: one of hlo.COLLECTIVES.
    n_bytes: bytes of a device's operand.
    n: devices of a group.
  """
  share = {'all-gather': n - 1, 'all-reduce': 2 * (n - 1) / n, 'collective-permute': 1,
           'collective-broadcast': 1}.get(kind, (n - 1) / n)
  return n_bytes * share


def replica_groups(text: str, n_devices: int) -> list[list[int]]:
  """Returns the groups of a `replica_groups` attribute.

  Forms are `{{0,1},{2,3}}`, `{}` (all devices), `[2,2]<=[2,2]T(1,0)` (the numbers in the order of
  an array of the right shape, transposed, in rows of the left shape) and
  `mesh['a'=2,'b'=4] {'b'}` (groups along axes of the compiler's own mesh).

  Raises:
    ValueError: it is none of them.
  """
  iota = re.fullmatch(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    rows, dims, order = (_numbers(part) for part in iota.groups())
    return np.arange(math.prod(dims)).reshape(dims).transpose(order or None).reshape(rows).tolist()
  mesh = re.fullmatch(r'mesh\[(.*?)\](?:, device_ids=\((.*)\))? \{(.*)\}', text)
  if mesh:
    return _mesh_groups(*mesh.groups())
  if not re.fullmatch(r'\{[\d,{} ]*\}', text):
    raise ValueError(f'replica_groups={text} is neither a list of groups nor an iota nor a mesh')
  groups = [_numbers(group) for group in re.findall(r'\{([\d, ]+)\}', text)]
  return groups or [list(range(n_devices))]


def _numbers(text: str | None) -> list[int]:
  """Returns the numbers in a text."""
  return [int(n) for n in re.findall(r'\d+', text or '')]


def _mesh_groups(axes: str, devices: str | None, grouped: str) -> list[list[int]]:
  """Returns the groups along axes of a mesh.

  Args:
    axes: names and sizes, `'a'=2,'b'=4`.
    devices: their numbers in the mesh's order, `0,2,1,3` or `[4,16]T(1,0)`; None for 0, 1, 2, ...
    grouped: `'a','b':(2)2` for all of a and the second of the parts 2, 2, ... of b.
  """
  sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
  numbers = np.arange(math.prod(sizes.values()))
  if devices and devices.startswith('['):
    dims, _, order = devices.partition(']')
    numbers = numbers.reshape(_numbers(dims)).transpose(_numbers(order)).ravel()
  elif devices:
    numbers = np.array(_numbers(devices))
  rest = np.stack(np.unravel_index(np.arange(len(numbers)), tuple(sizes.values())), axis=1)
  for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", grouped):
    i = list(sizes).index(name)
    size = int(size or sizes[name])
    after = sizes[name] // (int(before or 1) * size)
    rest[:, i] -= rest[:, i] // after % size * after
  _, group = np.unique(rest, axis=0, return_inverse=True)
  return [numbers[group.ravel() == i].tolist() for i in range(group.max() + 1)]


def spanned_axes(groups: Sequence[Sequence[int]], axis_sizes: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which devices of one group differ, in the mesh's order."""
  places = np.stack(np.unravel_index(np.arange(math.prod(axis_sizes.values())),
                                     tuple(axis_sizes.values())), axis=1)
  spans = [np.ptp(places[list(group)], axis=0) > 0 for group in groups]
  return tuple(itertools.compress(axis_sizes, np.any(spans, axis=0)))


def find_collectives(module: Module, computation: Computation, instruction: Instruction,
                     axis_sizes: Mapping[str, int]) -> list[tuple[Collective, str | None]]:
  """Returns the collectives that an instruction is or holds inside, and their chains.

  They have the name of the instruction, also those inside. Pieces of one asynchronous collective
  that the compiler spreads over several fusions have the same chain, a string; other collectives
  have None.
  """
  kind = instruction.opcode.removesuffix('-start')
  if kind in COLLECTIVES:
    return [(_collective(kind, computation, instruction, axis_sizes), None)]
  if instruction.opcode not in ('fusion', 'async-start', 'custom-call'):
    return []
  found = []
  for inside, inner in module.inside(instruction):
    kind = inner.opcode.removesuffix('-start')
    if kind not in COLLECTIVES:
      continue
    if inside.name.startswith('all-reduce-scatter'):  # only a slice of the sum leaves the fusion
      kind = 'reduce-scatter'
    chain = re.search(r'chain_id="?(\w+)', inner.attributes)
    collective = _collective(kind, inside, inner, axis_sizes)
    found.append((dataclasses.replace(collective, name=instruction.name),
                  chain[1] if chain else None))
  return found


def _collective(kind: str, computation: Computation, instruction: Instruction,
                axis_sizes: Mapping[str, int]) -> Collective:
  """Returns the record of a collective instruction."""
  operands = computation.operands(instruction)
  if kind == 'ragged-all-to-all':
    operands = operands[:1]  # the others are the result's initial value, offsets and sizes
  n_bytes = sum(shape.bytes for operand in operands for shape in operand.shapes)
  if kind == 'collective-permute':
    pairs = instruction.attribute('source_target_pairs') or '{}'
    groups = [[int(n) for n in pair] for pair in re.findall(r'\{(\d+),\s*(\d+)\}', pairs)]
    sources = collections.Counter(source for source, target in groups if source != target)
    n_bytes *= max(sources.values(), default=0)
  else:
    text = _groups_text(instruction)
    groups = replica_groups(text, math.prod(axis_sizes.values()))
  size = max(map(len, groups))
  return Collective(instruction.name, kind, wire_bytes(kind, n_bytes, size), size,
                    spanned_axes(groups, axis_sizes), instruction.source)


def _groups_text(instruction: Instruction) -> str:
  """Returns the replica_groups attribute, which may have spaces and commas inside."""
  mesh = re.search(r'replica_groups=(mesh\[[^\]]*\](?:, device_ids=\(.*?\))? \{[^}]*\})',
                   instruction.attributes)
  return mesh[1] if mesh else instruction.attribute('replica_groups') or '{}'
