"""Pipeline schedules: which stage does what at which tick, as tables.

A tick is at most one forward and one backward of one layer chunk on every stage; what a stage puts
out at a tick, its neighbor has at the next. Chunk c of stage s is place c * S + s of the model, so
that a microbatch visits all stages once per chunk. Idle halves of a tick cost nothing, so a tick
lasts as long as the busiest of two neighbors.

Sources: GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019, PipeDream-Flush in 2021), its
interleaved form (Narayanan et al. 2021, section 2.2); forward and backward of a steady tick are
paired, which keeps the 1F1B bubble of (S - 1) / (M + S - 1).
"""

import dataclasses
from typing import NamedTuple

import numpy as np

NAMES = ('gpipe', '1f1b', 'interleaved')
IDLE = -1


class Work(NamedTuple):
  """One half of a tick on one stage: the microbatch and the chunk of layers."""

  microbatch: int
  chunk: int


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What every stage does at every tick.

  forward and backward are int32 [ticks, stages, 2]: microbatch and chunk, IDLE where there is
  nothing to do. A stage's forward comes before its backward in the same tick.
  """

  name: str
  n_stages: int
  n_microbatches: int
  n_chunks: int
  forward: np.ndarray
  backward: np.ndarray

  @property
  def n_ticks(self) -> int:
    """How many ticks a step takes."""
    return len(self.forward)

  def table(self) -> list[list[tuple[Work | None, Work | None]]]:
    """Returns [tick][stage] -> (forward, backward), None where idle."""
    def work(entry):
      return None if entry[0] == IDLE else Work(*map(int, entry))
    return [[(work(f), work(b)) for f, b in zip(*rows, strict=True)]
            for rows in zip(self.forward, self.backward, strict=True)]


def _groups(n_stages: int, n_microbatches: int, n_chunks: int) -> list[Work]:
  """Returns a stage's work in order: S microbatches through all chunks, then the next S."""
  return [Work(m, chunk) for start in range(0, n_microbatches, n_stages)
          for chunk in range(n_chunks)
          for m in range(start, min(start + n_stages, n_microbatches))]


def schedule(name: str, n_stages: int, n_microbatches: int, n_chunks: int = 1) -> Schedule:
  """Returns the schedule of a name.

  Args:
    name: one of NAMES.
    n_stages: stages S.
    n_microbatches: microbatches M of a step.
    n_chunks: layer chunks per stage, one except for 'interleaved'.

  Raises:
    ValueError: no such schedule, or the numbers do not fit it.
  """
  _check(name, n_stages, n_microbatches, n_chunks)
  S, M, C = n_stages, n_microbatches, n_chunks
  order = _groups(S, M, C)
  n_work = len(order)
  # The last place is S * C - 1 ticks behind the first; its backward follows in the same tick.
  first_backward = M + S - 1 if name == 'gpipe' else S * C - 1
  shape = (first_backward + n_work + S - 1, S, 2)
  forward, backward = np.full(shape, IDLE, np.int32), np.full(shape, IDLE, np.int32)
  for i, (microbatch, chunk) in enumerate(order):
    for s in range(S):
      forward[s + i, s] = microbatch, chunk
      backward[first_backward + (S - 1 - s) + i, s] = microbatch, C - 1 - chunk
  return Schedule(name, S, M, C, forward, backward)


def _check(name: str, n_stages: int, n_microbatches: int, n_chunks: int) -> None:
  """Raises ValueError when a schedule does not exist for the numbers."""
  if name not in NAMES:
    raise ValueError(f'pipeline schedule {name!r} is not one of {", ".join(NAMES)}')
  for what, number in (('stages', n_stages), ('microbatches', n_microbatches),
                       ('chunks per stage', n_chunks)):
    if number < 1:
      raise ValueError(f'a pipeline of {number} {what} does not exist; at least 1')
  if name != 'interleaved' and n_chunks != 1:
    raise ValueError(f'{name} has one chunk of layers per stage, not {n_chunks}; '
                     "the schedule 'interleaved' has several")
  if name == 'interleaved' and n_microbatches % n_stages:
    near = -(-n_microbatches // n_stages) * n_stages
    raise ValueError(f'interleaved 1F1B takes microbatches in groups of its {n_stages} stages; '
                     f'{n_microbatches} is not a multiple, {near} is')


class Slots(NamedTuple):
  """Where a stage keeps the inputs of chunks between forward and backward.

  forward and backward are int32 [ticks, stages]: the slot that a forward writes and the one that
  a backward reads, IDLE where there is none.
  """

  n_slots: int
  forward: np.ndarray
  backward: np.ndarray


def slots(schedule: Schedule) -> Slots:
  """Returns slots in which no stored input is overwritten before its backward has read it."""
  written = np.full(schedule.forward.shape[:2], IDLE, np.int32)
  read = np.full(schedule.forward.shape[:2], IDLE, np.int32)
  n_slots = 0
  for s in range(schedule.n_stages):
    held: dict[Work, int] = {}
    for t in range(schedule.n_ticks):
      if schedule.forward[t, s, 0] != IDLE:
        free = next(i for i in range(len(held) + 1) if i not in held.values())
        held[Work(*schedule.forward[t, s])] = written[t, s] = free
        n_slots = max(n_slots, len(held))
      if schedule.backward[t, s, 0] != IDLE:
        read[t, s] = held.pop(Work(*schedule.backward[t, s]))
  return Slots(n_slots, written, read)


def duration(schedule: Schedule, forward: float, backward: float) -> float:
  """Returns how long a step takes when stages wait for their neighbors only.

  Args:
    schedule: the schedule.
    forward: seconds of a stage's whole forward of one microbatch.
    backward: those of its backward.
  """
  busy = (schedule.forward[..., 0] != IDLE) * forward + (
      schedule.backward[..., 0] != IDLE) * backward
  ends = np.zeros(schedule.n_stages)
  for seconds in busy / schedule.n_chunks:
    around = np.maximum(np.maximum(ends, np.roll(ends, 1)), np.roll(ends, -1))
    ends = around + seconds
  return float(ends.max())


def bubble(schedule: Schedule, forward: float, backward: float) -> float:
  """Returns the share of a step in which a stage idles, by `duration`."""
  work = schedule.n_microbatches * (forward + backward)
  return 1 - work / duration(schedule, forward, backward)
