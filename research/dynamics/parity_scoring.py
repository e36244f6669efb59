"""Measures parity: scores stored snapshots of a run in float32 and in bfloat16."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from parallelism.mesh import make_mesh
from research import build as build_lib
from research import config as config_lib
from research.data import tokenizers
from research.dynamics.parity import Parity, compare, read_parity
from research.errors import UserError
from research.monitors import table, watch
from research.run_dir import RunDir, write_whole
from research.training import manifest as manifest_lib
from research.training.snapshots import SnapshotReader

WAYS = ('float32', 'bfloat16')


def parity_of(run_dir: RunDir, steps: Sequence[int] = ()) -> Parity | None:
  """Returns what was measured before or is measured now; None where no weights are stored.

  Args:
    run_dir: of a monitored run.
    steps: snapshots to measure anew; none: what was measured before, else `default_steps`.
  """
  stored = read_parity(run_dir)
  chosen = list(steps) or default_steps(run_dir)
  return stored if not chosen or (stored and not steps) else measure(run_dir, chosen)


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
    scores = []
    for step in steps:
      print(f'parity: {len(items):,} items of snapshot {step} in {way}, '
            f'[{len(margins) * len(steps) + len(scores) + 1}/{len(WAYS) * len(steps)}]', flush=True)
      scores.append(watch.score_snapshot(
          scorer, built, built.place_params(reader.params(step, built.params))))
    margins.append(np.stack([table.margins(one) for one in scores]))
  parity = compare(steps, [item.dataset for item in items], *margins)
  write_whole(run_dir.parity_json,
              json.dumps({'ways': WAYS, **dataclasses.asdict(parity)}, indent=1) + '\n')
  return parity
