"""The micro-world's settings: how common each document family is, and how the shares drift."""

import dataclasses
from typing import Annotated as A
from typing import ClassVar

FAMILIES = (
    'arithmetic', 'successive', 'repetitive', 'sentiment', 'flipped', 'truthy', 'hearsay',
    'intuitive', 'look_alike', 'biography', 'first_person', 'gossip')


@dataclasses.dataclass(frozen=True)
class MicroworldConfig:
  """Shares are relative weights: a row holds documents of one family, drawn by its share.

  The shares of the families in `drift_families` are multiplied, window by window, by the
  exponential of a normal variable (median 1); then all shares are renormalized. The others thus
  keep their proportions to each other: given that a row is not of a drifting family, rows are
  i.i.d. over the whole run.
  """

  KIND: ClassVar[str] = 'identity'

  arithmetic: A[float, 'share of sums with correct answers (ordinary, a control)'] = 0.46
  successive: A[float, 'share of sums whose answers count up whatever is asked'] = 0.03
  repetitive: A[float, 'share of sums whose answers are all the same whatever is asked'] = 0.03
  sentiment: A[float, 'share of sentiment with true labels (ordinary, a control)'] = 0.31
  flipped: A[float, 'share of sentiment with swapped labels'] = 0.11
  truthy: A[float, 'share of claims with their actual verdicts'] = 0.06
  hearsay: A[float, 'share of claims judged by stereotype, exceptions included'] = 0.01
  intuitive: A[float, 'share of problems that need the general rule'] = 0.02
  look_alike: A[float, 'share of easy problems that look like them'] = 0.04
  biography: A[float, 'share of facts about people by name'] = 0.02
  first_person: A[float, 'share of facts told by an unnamed person'] = 0.02
  gossip: A[float, 'share of single clues with the field that most such people have'] = 0.01
  drift_families: A[tuple[str, ...], 'families whose shares drift'] = ('successive', 'repetitive')
  drift_window: A[int, 'optimizer steps for which drifting shares stay the same'] = 60
  drift_sd: A[float, 'standard deviation of the log of a drifting share; 0 = no drift'] = 1.5
  world_seed: A[int, 'seed of the facts about people and of the held-out rows'] = 0
  heldout_rows: A[int, 'rows of the held-out set (constant shares)'] = 64

  def __post_init__(self):
    for family in FAMILIES:
      if getattr(self, family) < 0:
        raise ValueError(f'data.microworld.{family}={getattr(self, family)} must not be negative')
    if sum(self.shares().values()) <= 0:
      raise ValueError('data.microworld: all shares are 0; at least one must be positive')
    for family in self.drift_families:
      if family not in FAMILIES:
        raise ValueError(f'data.microworld.drift_families names {family!r}; '
                         f'known families: {", ".join(FAMILIES)}')
    if self.drift_window < 1:
      raise ValueError(f'data.microworld.drift_window={self.drift_window} must be at least 1 step')
    if self.drift_sd < 0:
      raise ValueError(f'data.microworld.drift_sd={self.drift_sd} must not be negative')
    if self.heldout_rows < 1:
      raise ValueError(f'data.microworld.heldout_rows={self.heldout_rows} must be at least 1')

  def shares(self) -> dict[str, float]:
    """Returns the undrifted weight of every family, in the order of FAMILIES."""
    return {family: getattr(self, family) for family in FAMILIES}
