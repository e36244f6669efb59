"""Parity of two ways of scoring: how far float32 and bfloat16 disagree about the same snapshots.

A hop smaller than what the arithmetic decides is none. The detector takes the disagreement as a
tolerance around the center.
"""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from research.dynamics.detector import parity_share
from research.run_dir import RunDir


@dataclasses.dataclass(frozen=True)
class Parity:
  """What two ways of scoring disagree about, by dataset; of the worst of the snapshots.

  Attributes:
    steps: snapshots that were scored in both ways.
    share: of the items whose margin changes sign: bounds a change of accuracy.
    shift: mean absolute difference of the items' margins: bounds a change of margin.
  """

  steps: tuple[int, ...]
  share: dict[str, float]
  shift: dict[str, float]

  def tolerance(self, metric: str) -> dict[str, float]:
    """Returns the bound by dataset in units of the metric, 'margin' or 'accuracy'."""
    return self.shift if metric == 'margin' else self.share


def compare(steps: Sequence[int], datasets: Sequence[str], one_TI: np.ndarray, other_TI: np.ndarray
            ) -> Parity:
  """Returns the parity of two scorings.

  Args:
    steps: of the snapshots.
    datasets: of the items.
    one_TI, other_TI: margins by snapshot and item, differences of two probabilities.
  """
  share, shift, names = {}, {}, np.asarray(datasets)
  for name in dict.fromkeys(datasets):
    own = [(one[names == name], other[names == name]) for one, other in zip(one_TI, other_TI)]
    share[name] = max(parity_share(one, other) for one, other in own)
    shift[name] = max(float(np.mean(np.abs(one - other))) for one, other in own)
  return Parity(tuple(int(step) for step in steps), share, shift)


def read_parity(run_dir: RunDir) -> Parity | None:
  """Returns what was measured before, None if nothing was."""
  if not run_dir.parity_json.exists():
    return None
  stored = json.loads(run_dir.parity_json.read_text(encoding='utf-8'))
  return Parity(tuple(stored['steps']), stored['share'], stored['shift'])
