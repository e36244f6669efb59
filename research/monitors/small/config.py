"""How large the small-scale suite is."""

import dataclasses
from typing import Annotated as A
from typing import ClassVar

FAMILIES = ('successive', 'repetitive', 'flipped', 'truthy', 'intuitive', 'persona')
LEVELS = ('easy', 'medium', 'hard')
N_WORDINGS = 3
MOST_ITEMS = 8


@dataclasses.dataclass(frozen=True)
class SmallSuiteConfig:
  """Which part of the small-scale suite is scored. A part has the same items in a larger suite."""

  KIND: ClassVar[str] = 'placement'

  families: A[tuple[str, ...], 'of the small suite: ' + ', '.join(FAMILIES)] = FAMILIES
  levels: A[tuple[str, ...], 'difficulty levels: ' + ', '.join(LEVELS)] = LEVELS
  contexts: A[int, 'demonstration contexts (seeds) of every dataset'] = 12
  wordings: A[int, f'wordings, of {N_WORDINGS}, in which every context is asked'] = 1
  items: A[int, f'items per context and wording, even, at most {MOST_ITEMS}'] = 2
  shots: A[int, 'most demonstrations that are shown, a multiple of 8 up to 32; fewer for short '
           'contexts'] = 16

  def __post_init__(self):
    for name, known in (('families', FAMILIES), ('levels', LEVELS)):
      chosen = getattr(self, name)
      wrong = [one for one in chosen if one not in known]
      if wrong or not chosen or len(set(chosen)) < len(chosen):
        raise ValueError(f'monitors.small.{name}={",".join(chosen)} must be different ones of '
                         f'{", ".join(known)}')
    if self.contexts < 1:
      raise ValueError(f'monitors.small.contexts={self.contexts} must be at least 1')
    if not 1 <= self.wordings <= N_WORDINGS:
      raise ValueError(f'monitors.small.wordings={self.wordings} must be 1 to {N_WORDINGS}')
    if self.items not in range(2, MOST_ITEMS + 1, 2):
      raise ValueError(f'monitors.small.items={self.items} must be even (answers are balanced) '
                       f'and 2 to {MOST_ITEMS}')
    if self.shots not in range(8, 33, 8):
      raise ValueError(f'monitors.small.shots={self.shots} must be 8, 16, 24 or 32')
