"""Collective operations of a compiled program: bytes on the wire and the mesh axes they span.

Devices are numbered as the program numbers them: by their place in `mesh.devices.flat`.
"""

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
  runs (of a permute: the busiest device); axes are the mesh axes along which devices exchange
  data, empty for a group of one; source is the path of the JAX operation.
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

  Forms are `{{0,1},{2,3}}`, `{}` (all devices) and `[2,2]<=[2,2]T(1,0)`: the numbers in the order
  of an array of the right shape, transposed, in rows of the left shape.

  Raises:
    ValueError: it is none of them.
  """
  iota = re.fullmatch(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?', text)
  if iota:
    rows, dims, order = ([int(n) for n in part.split(',')] if part else None
                         for part in iota.groups())
    return np.arange(math.prod(dims)).reshape(dims).transpose(order).reshape(rows).tolist()
  if not re.fullmatch(r'\{[\d,{} ]*\}', text):
    raise ValueError(f'replica_groups={text} is neither a list of groups nor an iota')
  groups = [[int(n) for n in group.split(',')] for group in re.findall(r'[\d,]*\d', text.replace(
      ' ', '').replace('},{', '};{').replace(';', ' '))]
  return groups or [list(range(n_devices))]


def spanned_axes(groups: Sequence[Sequence[int]], axis_sizes: Mapping[str, int]) -> tuple[str, ...]:
  """Returns the mesh axes along which devices of one group differ, in the mesh's order."""
  places = np.stack(np.unravel_index(np.arange(math.prod(axis_sizes.values())),
                                     tuple(axis_sizes.values())), axis=1)
  spans = [np.ptp(places[list(group)], axis=0) > 0 for group in groups]
  return tuple(itertools.compress(axis_sizes, np.any(spans, axis=0)))


def find_collectives(module: Module, computation: Computation, instruction: Instruction,
                     axis_sizes: Mapping[str, int]) -> list[tuple[Collective, str | None]]:
  """Returns the collectives that an instruction is or holds inside, and their chains.

  Pieces of one asynchronous collective that the compiler spreads over several fusions have the
  same chain, a string; other collectives have None.
  """
  kind = instruction.opcode.removesuffix('-start')
  if kind in COLLECTIVES:
    return [(_collective(kind, computation, instruction, instruction.name, axis_sizes), None)]
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
    name = inner.name if chain else instruction.name
    found.append((_collective(kind, inside, inner, name, axis_sizes),
                  chain[1] if chain else None))
  return found


def _collective(kind: str, computation: Computation, instruction: Instruction, name: str,
                axis_sizes: Mapping[str, int]) -> Collective:
  """Returns the record of a collective instruction, under a name of its own."""
  operands = computation.operands(instruction)
  if kind == 'ragged-all-to-all':
    operands = operands[:1]  # the others are the result's initial value, offsets and sizes
  n_bytes = sum(shape.bytes for operand in operands for shape in operand.shapes)
  if kind == 'collective-permute':
    pairs = instruction.attribute('source_target_pairs') or '{}'
    groups = [[int(n) for n in pair] for pair in re.findall(r'\{(\d+),\s*(\d+)\}', pairs)]
    sources = [source for source, target in groups if source != target]
    n_bytes *= max(map(sources.count, sources), default=0)
  else:
    text = instruction.attribute('replica_groups') or '{}'
    groups = replica_groups(text, math.prod(axis_sizes.values()))
  size = max(map(len, groups))
  return Collective(name, kind, wire_bytes(kind, n_bytes, size), size,
                    spanned_axes(groups, axis_sizes), instruction.source)
