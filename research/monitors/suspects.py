"""Suspected hops while a run goes on: a margin that changes sides. No error rates, no confirmation.

What is a hop the detector says afterwards, from both flanks (research/dynamics/detector.py); this is
for the line of progress.
"""

from collections.abc import Mapping

BESIDE = 0.1  # of the center: mean margins nearer to it than this are on neither side


class Suspects:
  """Counts changes of side, dataset by dataset; snapshots come in order.

  A dataset is on a side when its mean margin lies beyond `BESIDE` at two snapshots in a row.

  Attributes:
    n_suspected: changes of side so far.
  """

  def __init__(self):
    self.n_suspected = 0
    self._last: dict[str, int] = {}
    self._side: dict[str, int] = {}

  def add(self, margins: Mapping[str, float]) -> list[str]:
    """Returns the datasets that have just arrived on the other side."""
    arrived = []
    for dataset, margin in margins.items():
      now = (margin > BESIDE) - (margin < -BESIDE)
      if now and now == self._last.get(dataset):
        if self._side.get(dataset, now) != now:
          arrived.append(dataset)
        self._side[dataset] = now
      self._last[dataset] = now
    self.n_suspected += len(arrived)
    return arrived
