"""How long a compiled program takes on a TPU, at best: from its schedule and the chip's peaks."""

import collections
import dataclasses
from collections.abc import Mapping

from parallelism.hardware import Chip
from parallelism.hlo_program import (
    Block,
    Branch,
    BranchRuns,
    Copy,
    Done,
    Loop,
    Start,
    Work,
    check_runs,
    costliest,
)
from parallelism.network import Network

COMPUTE, MEMORY = 'compute', 'memory'


@dataclasses.dataclass(frozen=True)
class Estimate:
  """What a step takes.

  seconds follow the schedule; perfect_seconds are those of perfect overlap, the largest of busy,
  and bound is its name: 'compute', 'memory' or 'network axis X'. busy are the seconds for which
  each resource works, exposed the seconds for which the device waits for collectives, by the mesh
  axes that they span, joined with '+'.
  """

  seconds: float
  perfect_seconds: float
  bound: str
  busy: Mapping[str, float]
  exposed: Mapping[str, float]
  flops: float
  hbm_bytes: float


def estimate(program: Block, chip: Chip, network: Network,
             branch_runs: BranchRuns = costliest) -> Estimate:
  """Returns the roofline estimate of a program on one device.

  An operation takes the longer of its FLOPs at the chip's bf16 peak (whatever their type) and its
  bytes at the HBM's bandwidth. Collectives and copies between memories run beside what stands
  between their start and their end in the schedule: on each mesh axis one collective after the
  other, copies in what operations leave of the memory's bandwidth. Loops repeat their second trip.
  Of branches the slowest is taken, or as branch_runs says.

  Args:
    program: of `hlo_program.read_program`.
    chip: facts of the chip.
    network: that of the mesh with which the program was read.
    branch_runs: how often the blocks of a branch run.
  """
  timeline = _Timeline(chip, network, branch_runs)
  tally = timeline.run(program)
  tally.seconds += timeline.wait(None).total()
  resources = {COMPUTE: tally.flops * chip.devices / chip.bf16_flops,
               MEMORY: tally.hbm_bytes * chip.devices / chip.hbm_bytes_per_second}
  resources |= {f'network axis {axis}': seconds for axis, seconds in tally.network.items()}
  bound = max(resources, key=resources.get)
  return Estimate(tally.seconds, resources[bound], bound, resources, dict(tally.exposed),
                  tally.flops, tally.hbm_bytes)


@dataclasses.dataclass
class _Tally:
  """Sums over a part of the program; network and exposed are seconds by axis and by axes."""

  seconds: float = 0.0
  flops: float = 0.0
  hbm_bytes: float = 0.0
  network: collections.Counter = dataclasses.field(default_factory=collections.Counter)
  exposed: collections.Counter = dataclasses.field(default_factory=collections.Counter)

  def add(self, other: '_Tally', times: float = 1.0) -> None:
    """Adds another part that runs some number of times."""
    for name in ('seconds', 'flops', 'hbm_bytes'):
      setattr(self, name, getattr(self, name) + times * getattr(other, name))
    for name in ('network', 'exposed'):
      for key, seconds in getattr(other, name).items():
        getattr(self, name)[key] += times * seconds


@dataclasses.dataclass
class _Pending:
  """A transfer under way: the resources that it occupies and the seconds that it still needs."""

  name: str
  resources: frozenset[str]
  label: str
  left: float


class _Timeline:
  """Runs a program's tree; what is under way outlives loops and blocks."""

  def __init__(self, chip: Chip, network: Network, branch_runs: BranchRuns):
    """Starts with nothing under way."""
    self.chip, self.network, self.branch_runs = chip, network, branch_runs
    self.pending: list[_Pending] = []

  def run(self, block: Block) -> _Tally:
    """Returns the sums of a block that runs once, now."""
    tally = _Tally()
    for node in block.nodes:
      match node:
        case Work():
          self._work(node, tally)
        case Start():
          self._start(node, tally)
        case Done():
          self._done(node, tally)
        case Loop():
          self._loop(node, tally)
        case Branch():
          self._branch(node, tally)
        case Block():
          tally.add(self.run(node))
    return tally

  def wait(self, name: str | None) -> collections.Counter:
    """Lets time pass until a transfer has ended (None: all); returns the seconds by what took it.

    That is the transfer itself, or while earlier ones hold it back the first of them.
    """
    waited = collections.Counter()
    while any(name in (None, pending.name) for pending in self.pending):
      active = self._active()
      step = min(pending.left for pending in active)
      cause = next((pending for pending in active if pending.name == name), active[0])
      waited[cause.label] += step
      self._pass(step, step)
    return waited

  def _active(self) -> list[_Pending]:
    """Returns the transfers that run: no earlier one occupies any of their resources."""
    occupied: set[str] = set()
    active = []
    for pending in self.pending:
      if not pending.resources & occupied:
        active.append(pending)
      occupied |= pending.resources
    return active

  def _pass(self, seconds: float, memory_seconds: float) -> None:
    """Lets transfers proceed for some seconds, copies for those that the memory has for them."""
    left = {False: seconds, True: memory_seconds}
    for is_copy in left:
      while left[is_copy] > 0:
        active = [p for p in self._active() if (MEMORY in p.resources) == is_copy]
        if not active:
          break
        step = min(left[is_copy], *(pending.left for pending in active))
        for pending in active:
          pending.left -= step
        left[is_copy] -= step
        self.pending = [p for p in self.pending if p not in active or p.left > 1e-15]

  def _work(self, work: Work, tally: _Tally) -> None:
    """Runs an operation."""
    compute = work.flops * self.chip.devices / self.chip.bf16_flops
    memory = work.hbm_bytes * self.chip.devices / self.chip.hbm_bytes_per_second
    seconds = max(compute, memory)
    self._pass(seconds, seconds - memory)
    tally.seconds += seconds
    tally.flops += work.flops
    tally.hbm_bytes += work.hbm_bytes

  def _start(self, start: Start, tally: _Tally) -> None:
    """Begins a transfer."""
    transfer = start.transfer
    tally.hbm_bytes += start.hbm_bytes
    if isinstance(transfer, Copy):
      seconds = start.hbm_bytes * self.chip.devices / self.chip.hbm_bytes_per_second
      self._begin(transfer.name, frozenset([MEMORY]), MEMORY, seconds)
    else:
      seconds = self.network.seconds(transfer)
      tally.network.update({axis: seconds for axis in transfer.axes})
      self._begin(transfer.name, frozenset(transfer.axes), '+'.join(transfer.axes), seconds)

  def _begin(self, name: str, resources: frozenset[str], label: str, seconds: float) -> None:
    """Puts a transfer under way if it takes any time."""
    if seconds > 0:
      self.pending.append(_Pending(name, resources, label, seconds))

  def _done(self, done: Done, tally: _Tally) -> None:
    """Waits for a transfer."""
    waited = self.wait(done.name)
    tally.seconds += waited.total()
    del waited[MEMORY]
    tally.exposed.update(waited)

  def _loop(self, loop: Loop, tally: _Tally) -> None:
    """Runs two trips; the second stands for the others, as what is under way has settled."""
    if loop.trips:
      tally.add(self.run(loop.body))
    if loop.trips > 1:
      tally.add(self.run(loop.body), loop.trips - 1)

  def _branch(self, branch: Branch, tally: _Tally) -> None:
    """Runs the blocks as often as asked, from the same state; the slowest leaves its state."""
    before = [dataclasses.replace(pending) for pending in self.pending]
    outcomes = []
    for block in branch.blocks:
      self.pending = [dataclasses.replace(pending) for pending in before]
      outcomes.append((self.run(block), self.pending))
    slowest, self.pending = max(outcomes, key=lambda outcome: outcome[0].seconds)
    runs = self.branch_runs(branch)
    if runs is None:
      tally.add(slowest)
      return
    for (part, _), times in zip(outcomes, check_runs(branch, runs), strict=True):
      tally.add(part, times)
