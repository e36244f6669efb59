"""Parity of two ways of scoring: how far float32 and bfloat16 disagree about the same snapshots.

A hop smaller than what the arithmetic decides is none. The detector takes the disagreement as a
tolerance around the center.
"""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from parallelism.mesh import make_mesh
from research import build as build_lib
from research import config as config_lib
from research.data import tokenizers
from research.dynamics.detector import parity_share
from research.errors import UserError
from research.monitors import table, watch
from research.run_dir import RunDir, write_whole
from research.training import manifest as manifest_lib
from research.training.snapshots import SnapshotReader

WAYS = ('float32', 'bfloat16')


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


def default_steps(run_dir: RunDir) -> list[int]:
  """Returns four of the stored snapshots, evenly spaced up to the last; none without snapshots."""
  steps = SnapshotReader(run_dir.snapshots).steps
  return sorted({steps[(len(steps) * quarter - 1) // 4] for quarter in (1, 2, 3, 4)}
                ) if steps else []


def measure(run_dir: RunDir, steps: Sequence[int]) -> Parity:
  """Scores stored snapshots in both ways, stores what comes out and returns it.

  Raises:
    UserError: a step has no snapshot, or the mesh of the run cannot be made here.
  """
  reader = SnapshotReader(run_dir.snapshots)
  if missing := sorted(set(steps) - set(reader.steps)):
    raise UserError(f'step {missing[0]}: no such snapshot in {run_dir.snapshots}; it has '
                    f'{reader.steps}')
  config = config_lib.from_json(run_dir.config_json.read_text(encoding='utf-8'))
  manifest, items = manifest_lib.read(run_dir), table.read_item_table(run_dir.monitor_items)
  tokenizer = tokenizers.load(run_dir.tokenizer_json)
  try:
    mesh = make_mesh(config.mesh)
  except ValueError as error:
    raise UserError(str(error)) from error
  margins = []
  for way in WAYS:
    computed = dataclasses.replace(
        config, model=dataclasses.replace(config.model, compute_dtype=way))
    built = build_lib.build(computed, mesh, manifest['numerics'])
    scorer = watch.make_scorer(computed, tokenizer, manifest['start_id'], built, items)
    scores = [watch.score_snapshot(scorer, built,
                                   built.place_params(reader.params(step, built.params)))
              for step in steps]
    margins.append(np.stack([table.margins(one) for one in scores]))
  parity = compare(steps, [item.dataset for item in items], *margins)
  write_whole(run_dir.parity_json,
              json.dumps({'ways': WAYS, **dataclasses.asdict(parity)}, indent=1) + '\n')
  return parity
