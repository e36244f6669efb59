"""Scores stored snapshots of a run again and checks that the bits agree with training.

What was never scored, such as an average that launchers.trajectory made, is scored and stored
first, one snapshot at a time: repeating the command goes on where it stopped.

  python -m launchers.score --run_dir=runs/quickstart
  python -m launchers.score --run_dir=runs/quickstart --steps=0,1200,2400
"""

import json

from absl import flags

from launchers import flags as shared
from parallelism.mesh import make_mesh
from research import build as build_lib
from research import config as config_lib
from research.data import tokenizers
from research.errors import UserError
from research.monitors import table, watch
from research.run_dir import RunDir
from research.training.snapshots import SnapshotReader

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of a run')
STEPS = flags.DEFINE_list('steps', [], 'steps of snapshots; default all')


def main() -> None:
  run_dir = RunDir(RUN_DIR.value)
  if not RUN_DIR.value or not run_dir.monitor_items.exists():
    raise UserError(f'--run_dir={RUN_DIR.value!r} is not the directory of a monitored run')
  config = config_lib.from_json(run_dir.config_json.read_text(encoding='utf-8'))
  manifest = json.loads(run_dir.manifest_json.read_text(encoding='utf-8'))
  try:
    built = build_lib.build(config, make_mesh(config.mesh), manifest['numerics'])
    steps = [int(step) for step in STEPS.value]
  except ValueError as error:
    raise UserError(str(error)) from error
  stored = SnapshotReader(run_dir.snapshots).steps
  if not stored:
    raise UserError(f'{run_dir.whole} has no snapshots that could be scored')
  unscored_first = lambda step: (watch.scored_path(run_dir, step).exists(), step)
  steps = sorted(steps or stored, key=unscored_first)
  if missing := sorted(set(steps) - set(stored)):
    raise UserError(f'--steps={missing[0]}: no such snapshot in {run_dir.snapshots}; it has {stored}')
  tokenizer = tokenizers.load(run_dir.tokenizer_json)
  n_equal, items = 0, table.read_item_table(run_dir.monitor_items)
  for step, scores in watch.rescore(config, tokenizer, manifest['start_id'], built, run_dir, steps):
    if not watch.scored_path(run_dir, step).exists():
      table.write_scores(run_dir.monitor_scores, step, scores)
      accuracy = table.dataset_means(table.summary(items, step, scores), 'accuracy')
      print(f'step {step}: scored, accuracy', *(f'{k} {v:.3f}' for k, v in accuracy.items()))
      n_equal += 1
      continue
    _, trained = table.read_scores(watch.scored_path(run_dir, step))
    equal = all(a.tobytes() == b.tobytes() for a, b in zip(scores, trained, strict=True))
    n_equal += equal
    print(f'step {step}: {"same bits as in training" if equal else "DIFFERS from training"}')
  if n_equal < len(steps):
    raise UserError(f'{len(steps) - n_equal} of {len(steps)} snapshots score differently; the '
                    'machine, versions or flags differ from those in manifest.json, or a snapshot '
                    'is damaged')


if __name__ == '__main__':
  shared.run(main)
