"""A compiled program as a tree of what runs, in order: work, transfers, loops and branches."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from parallelism import hlo
from parallelism.collectives import Collective, find_collectives
from parallelism.hlo import Computation, Instruction, Module
from parallelism.hlo_costs import flops, traffic
from parallelism.hlo_loops import Loops


class Work(NamedTuple):
  """An operation that occupies the device: FLOPs and bytes from and to HBM."""

  name: str
  source: str
  flops: float
  hbm_bytes: float


class Copy(NamedTuple):
  """An asynchronous copy between memories of the device."""

  name: str


class Start(NamedTuple):
  """Where a transfer begins, and what it moves from and to HBM."""

  transfer: Collective | Copy
  hbm_bytes: float


class Done(NamedTuple):
  """Where the program waits for the transfer of a name."""

  name: str


class HostTransfer(NamedTuple):
  """Bytes between the device and its host."""

  name: str
  kind: str
  n_bytes: float
  source: str


@dataclasses.dataclass(frozen=True)
class Block:
  """What runs in order."""

  name: str
  nodes: 'tuple[Node, ...]'


@dataclasses.dataclass(frozen=True)
class Loop:
  """A loop of a known number of trips."""

  name: str
  source: str
  trips: int
  body: Block


@dataclasses.dataclass(frozen=True)
class Branch:
  """A conditional, of whose blocks one runs."""

  name: str
  source: str
  blocks: tuple[Block, ...]


Node = Work | Start | Done | HostTransfer | Loop | Branch | Block
# How often each block of a branch runs when the branch is reached (shares that sum to one, as a
# rule), None for: the costliest.
BranchRuns = Callable[[Branch], Sequence[float] | None]


def costliest(branch: Branch) -> None:
  """The default of BranchRuns."""
  del branch


def check_runs(branch: Branch, runs: Sequence[float]) -> Sequence[float]:
  """Returns what branch_runs has given; raises ValueError if it is not one number per block."""
  if len(runs) != len(branch.blocks):
    raise ValueError(f'branch_runs gives {len(runs)} numbers for the {len(branch.blocks)} blocks '
                     f'of the branch {branch.name} ({branch.source}); it takes one for each')
  return runs


def read_program(text: str, axis_sizes: Mapping[str, int], unknown_trips: int | None = None
                 ) -> Block:
  """Returns the tree of an optimized HLO text.

  A synchronous collective is a Start and at once its Done. Pieces of one collective that the
  compiler overlaps with several fusions are one Start, the fusions' work, and one Done.

  Args:
    text: of `hlo.compile_to_text`.
    axis_sizes: names and sizes of the mesh axes in order, `mesh.shape`.
    unknown_trips: trips of loops of which the text does not say how often they run.

  Raises:
    ValueError: the text cannot be read, or has such a loop and unknown_trips is None.
  """
  module = hlo.parse(text)
  return _Reader(module, axis_sizes, Loops(module), unknown_trips).block(module.entry)


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Turns computations into blocks."""

  module: Module
  axis_sizes: Mapping[str, int]
  loops: Loops
  unknown_trips: int | None

  def block(self, computation: Computation, under_way: Mapping[str, str] = {}) -> Block:
    """Returns the block of a computation.

    Args:
      computation: whose instructions run.
      under_way: handle or chain of what was started before it -> its transfer's name.
    """
    started = dict(under_way)
    nodes = [node for instruction in computation.instructions
             for node in self._nodes(computation, instruction, started)]
    return Block(computation.name, tuple(nodes))

  def _nodes(self, computation: Computation, instruction: Instruction, started: dict[str, str]
             ) -> Iterator[Node]:
    """Yields what an instruction does."""
    opcode = instruction.opcode
    if opcode == 'while':
      yield self._loop(computation, instruction, started)
    elif opcode == 'conditional':
      names = instruction.called('true_computation', 'false_computation', 'branch_computations')
      yield Branch(instruction.name, instruction.source, tuple(
          self.block(self.module.computations[name], started) for name in names))
    elif opcode == 'call':
      (name,) = instruction.called('to_apply', 'calls')
      yield self.block(self.module.computations[name], started)
    else:
      moved = traffic(self.module, computation, instruction)
      yield from _host_transfers(instruction, moved)
      if opcode.endswith(('-start', '-update', '-done')):
        yield from self._asynchronous(computation, instruction, started)
      else:
        yield from self._synchronous(computation, instruction, started, moved)

  def _loop(self, computation: Computation, instruction: Instruction,
            started: dict[str, str]) -> Loop:
    """Returns the loop of a while instruction."""
    trips = self.loops.trips(computation, instruction)
    if trips is None and self.unknown_trips is None:
      raise ValueError(f'how often the loop {instruction.name} ({instruction.source}) runs is not '
                       'in the HLO text; unknown_trips has to say it')
    (name,) = instruction.called('body')
    return Loop(instruction.name, instruction.source,
                self.unknown_trips if trips is None else trips,
                self.block(self.module.computations[name], started))

  def _asynchronous(self, computation: Computation, instruction: Instruction,
                    started: dict[str, str]) -> Iterator[Node]:
    """Yields the nodes of a start, an update or a done.

    A start without operands (of the sparse cores) only prepares: the update that brings the
    operands begins.
    """
    begins = instruction
    if not instruction.opcode.endswith('-start'):
      begins = computation.by_name[instruction.operands[0]]
      started[instruction.name] = started.get(begins.name, begins.name)
    if instruction.opcode.endswith('-done'):
      yield Done(started[instruction.name])
      return
    if bool(begins.operands) != (begins is instruction):
      return  # not yet, or already in its start
    found = find_collectives(self.module, computation, begins, self.axis_sizes)
    transfers = [collective for collective, _ in found] or [Copy(begins.name)]
    hbm_bytes = traffic(self.module, computation, begins)[hlo.HBM]
    for transfer in transfers:
      yield Start(transfer, hbm_bytes / len(transfers))

  def _synchronous(self, computation: Computation, instruction: Instruction,
                   started: dict[str, str], moved: collections.Counter) -> Iterator[Node]:
    """Yields the nodes of any other instruction.

    A fusion may hold a collective of its own, or one of the pieces of a chain: the first is the
    start, which runs beside the fusion's own work; the one with AsyncCollectiveDone is the end.
    """
    found = find_collectives(self.module, computation, instruction, self.axis_sizes)
    own = [collective for collective, chain in found if chain not in started]
    targets = {inner.target for _, inner in self.module.inside(instruction)} if found else set()
    for collective in own:
      yield Start(collective, moved[hlo.HBM] / len(own))
    work = Work(instruction.name, instruction.source,
                flops(self.module, computation, instruction), 0.0 if own else moved[hlo.HBM])
    if work.flops or work.hbm_bytes:
      yield work
    for collective, chain in found:
      if chain in started:
        if 'AsyncCollectiveDone' in targets:
          yield Done(started.pop(chain))
      elif chain and 'AsyncCollectiveStart' in targets:
        started[chain] = collective.name
      else:
        yield Done(collective.name)


def _host_transfers(instruction: Instruction, moved: collections.Counter
                    ) -> Iterator[HostTransfer]:
  """Yields what an instruction exchanges with the host."""
  kind = instruction.opcode.removesuffix('-start')
  if kind in ('send', 'recv', 'infeed', 'outfeed'):
    yield HostTransfer(instruction.name, kind, moved.total(), instruction.source)
  elif moved[hlo.HOST]:
    yield HostTransfer(instruction.name, kind, moved[hlo.HOST], instruction.source)


def runs_of(block: Block, kind: type | tuple[type, ...], weight: Callable[[Any], float],
            branch_runs: BranchRuns = costliest) -> list[tuple[Any, float]]:
  """Returns the nodes of a kind and how often each runs.

  Args:
    block: a program or a part of it.
    kind: class of nodes.
    weight: cost of a node; of a branch the block with the largest sum is taken.
    branch_runs: how often the blocks of a branch run.
  """
  found = []
  for node in block.nodes:
    match node:
      case Loop():
        found += [(inner, node.trips * times)
                  for inner, times in runs_of(node.body, kind, weight, branch_runs)]
      case Block():
        found += runs_of(node, kind, weight, branch_runs)
      case Branch():
        found += _branch_runs_of(node, kind, weight, branch_runs)
      case _ if isinstance(node, kind):
        found.append((node, 1.0))
  return found


def _branch_runs_of(branch: Branch, kind: type | tuple[type, ...], weight: Callable[[Any], float],
                    branch_runs: BranchRuns) -> list[tuple[Any, float]]:
  """Returns the nodes of a branch and how often each runs when the branch is reached."""
  blocks = [runs_of(block, kind, weight, branch_runs) for block in branch.blocks]
  runs = branch_runs(branch)
  if runs is None:
    return max(blocks, key=lambda found: sum(weight(node) * times for node, times in found))
  return [(node, times * share) for found, share in zip(blocks, check_runs(branch, runs),
                                                        strict=True) for node, times in found]


def collectives(block: Block, branch_runs: BranchRuns = costliest
                ) -> list[tuple[Collective, float]]:
  """Returns the collectives of a program and how often each runs, trips of loops multiplied."""
  starts = runs_of(block, Start, _sent, branch_runs)
  return [(start.transfer, times) for start, times in starts
          if isinstance(start.transfer, Collective)]


def _sent(start: Start) -> float:
  """Returns the bytes of a start on the wire."""
  return start.transfer.sent if isinstance(start.transfer, Collective) else 0.0


def sent_bytes(block: Block, branch_runs: BranchRuns = costliest
               ) -> dict[tuple[str, tuple[str, ...]], float]:
  """Returns the bytes that a device sends, by kind of collective and mesh axes."""
  sent = collections.Counter()
  for collective, times in collectives(block, branch_runs):
    sent[collective.kind, collective.axes] += collective.sent * times
  return dict(sent)


def total_flops(block: Block, branch_runs: BranchRuns = costliest) -> float:
  """Returns the FLOPs of a device; see `hlo_costs.flops` for what is counted."""
  works = runs_of(block, Work, lambda work: work.flops, branch_runs)
  return sum(work.flops * times for work, times in works)


def total_hbm_bytes(block: Block, branch_runs: BranchRuns = costliest) -> float:
  """Returns the bytes that a device moves from and to HBM."""
  nodes = runs_of(block, (Work, Start), lambda node: node.hbm_bytes, branch_runs)
  return sum(node.hbm_bytes * times for node, times in nodes)


def host_transfers(block: Block, branch_runs: BranchRuns = costliest
                   ) -> list[tuple[HostTransfer, float]]:
  """Returns the transfers between device and host and how often each runs."""
  return runs_of(block, HostTransfer, lambda transfer: transfer.n_bytes, branch_runs)
