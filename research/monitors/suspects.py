"""Suspected hops while a run goes on: a margin that changes sides. No error rates, no confirmation.

What is a hop the detector says afterwards, from both flanks (research/dynamics/detector.py); this
is for the line of progress and for captures.
"""

from collections.abc import Mapping
from typing import NamedTuple

BESIDE = 0.1  # of the center: mean margins nearer to it than this are on neither side


class Suspect(NamedTuple):
  """A change of side.

  Attributes:
    dataset: whose mean margin it is.
    before, after: steps of the last snapshot on the old side and the first on the new one.
    change: between the margins of the two.
  """

  dataset: str
  before: int
  after: int
  change: float


class Suspects:
  """Finds changes of side, dataset by dataset; snapshots come in order.

  A dataset is on a side when its mean margin lies beyond `BESIDE` at two snapshots in a row.

  Attributes:
    n_suspected: changes of side so far.
  """

  def __init__(self):
    self.n_suspected = 0
    self._last: dict[str, tuple[int, float]] = {}
    self._held: dict[str, tuple[int, float]] = {}

  def add(self, step: int, margins: Mapping[str, float]) -> list[Suspect]:
    """Returns the datasets that have just held the other side."""
    found = []
    for dataset, margin in margins.items():
      side, last = _side(margin), self._last.get(dataset)
      if side and last and side == _side(last[1]):
        held = self._held.get(dataset)
        if held and _side(held[1]) != side:
          found.append(Suspect(dataset, held[0], last[0], last[1] - held[1]))
        self._held[dataset] = step, margin
      self._last[dataset] = step, margin
    self.n_suspected += len(found)
    return found


def _side(margin: float) -> int:
  return (margin > BESIDE) - (margin < -BESIDE)
