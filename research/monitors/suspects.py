"""Suspected hops while a run goes on: a margin that changes sides. No error rates, no confirmation.

What is a hop the detector says afterwards, from both flanks (research/dynamics/detector.py); this
is for the line of progress, for captures, and for the full checkpoints that these need.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

BESIDE = 0.1  # of the center: mean margins nearer to it than this are on neither side
DWELL = 6  # snapshots for which a sign is held on either flank of what the detector calls a hop


class Suspect(NamedTuple):
  """A change of side.

  Attributes:
    dataset: whose mean margin it is.
    before, after: steps of the two neighboring snapshots between which the margin changed its sign,
      the last time on its way from one side to the other.
    change: between the margins of the last snapshot on the old side and the first on the new one.
  """

  dataset: str
  before: int
  after: int
  change: float


@dataclasses.dataclass
class _Course:
  """One dataset so far.

  Attributes:
    n_seen: snapshots.
    last: step and margin of the newest.
    held: margin of the newest that was the second in a row on its side, or a later one.
    crossings: of each change of sign, the step before it, the step after it, snapshots until then.
    found: changes of side, each with the index of its crossing.
  """

  n_seen: int = 0
  last: tuple[int, float] | None = None
  held: float | None = None
  crossings: list[tuple[int, int, int]] = dataclasses.field(default_factory=list)
  found: list[tuple[Suspect, int]] = dataclasses.field(default_factory=list)

  def add(self, dataset: str, step: int, margin: float) -> Suspect | None:
    """Returns the change of side that a snapshot completes."""
    last, self.last, suspect = self.last, (step, margin), None
    if last and (last[1] > 0) != (margin > 0):
      self.crossings.append((last[0], step, self.n_seen))
    self.n_seen += 1
    if last and _side(margin) and _side(margin) == _side(last[1]):
      if self.held is not None and _side(self.held) != _side(margin):
        suspect = Suspect(dataset, *self.crossings[-1][:2], last[1] - self.held)
        self.found.append((suspect, len(self.crossings) - 1))
      self.held = margin
    return suspect

  def may_be_hop(self, crossing: int) -> bool:
    """Returns whether both signs beside a crossing were held, the newer one perhaps still is."""
    n_before = self.crossings[crossing][2]
    before = n_before - (self.crossings[crossing - 1][2] if crossing else 0)
    is_newest = crossing == len(self.crossings) - 1
    return before >= DWELL and (is_newest or self.crossings[crossing + 1][2] - n_before >= DWELL)

  @property
  def open_since(self) -> int | None:
    """The step before the crossing from which a change of side would be counted, were it held."""
    if self.held is None or (self.held > 0) == (self.last[1] > 0):
      return None
    return self.crossings[-1][0]


class Suspects:
  """Finds changes of side, dataset by dataset; snapshots come in order.

  A dataset is on a side when its mean margin lies beyond `BESIDE` at two snapshots in a row.

  Attributes:
    n_suspected: changes of side so far.
  """

  def __init__(self):
    self.n_suspected = 0
    self._courses: dict[str, _Course] = {}

  def add(self, step: int, margins: Mapping[str, float]) -> list[Suspect]:
    """Returns the datasets that have just held the other side."""
    found = [self._courses.setdefault(dataset, _Course()).add(dataset, step, margin)
             for dataset, margin in margins.items()]
    found = [suspect for suspect in found if suspect]
    self.n_suspected += len(found)
    return found

  def ranked(self) -> list[Suspect]:
    """Returns all changes of side, those first that may be hops, of either kind the greatest."""
    found = [(course.may_be_hop(crossing), abs(suspect.change), suspect)
             for course in self._courses.values() for suspect, crossing in course.found]
    return [suspect for *_, suspect in sorted(found, key=_first)]

  def needed(self, budget: int) -> frozenset[int]:
    """Returns the steps of the snapshots from which replays may have to begin, budget + 1 at most.

    They are the newest one, from which on a dataset may change its side, and those before the first
    `budget` changes in the order of `ranked`. What is still between the sides counts with the least
    change that it would be.
    """
    ranked = []
    for course in self._courses.values():
      ranked += [(course.may_be_hop(crossing), abs(suspect.change), suspect.before)
                 for suspect, crossing in course.found]
      if course.open_since is not None:
        ranked.append((course.may_be_hop(len(course.crossings) - 1), abs(course.held) + BESIDE,
                       course.open_since))
    newest = [course.last[0] for course in self._courses.values()]
    return frozenset([*newest, *(step for *_, step in sorted(ranked, key=_first)[:budget])])


def _first(row: tuple[bool, float, object]) -> tuple[bool, float]:
  """Returns the key that sorts what may be a hop before the rest, and the greatest change first."""
  return not row[0], -row[1]


def _side(margin: float) -> int:
  return (margin > BESIDE) - (margin < -BESIDE)
