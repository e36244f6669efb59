"""Fine-tunes of many checkpoints of a run on one family, each scored before and after: a table.

Every fine-tune is a run of its own: <run>/finetunes/<family>/step-<step>-seed<seed>.
"""

import dataclasses
import json
import os
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from research import config as config_lib
from research import overrides as overrides_lib
from research.config import ExperimentConfig
from research.data.published_finetuning import EvalTemplate
from research.errors import UserError
from research.monitors import table
from research.monitors.finetuning_items import (
    FAMILIES, check_published, family_items, family_pairs)
from research.monitors.items import ITEM_SUFFIXES, sound_items, write_items
from research.run_dir import RunDir, write_whole
from research.training.checkpoints import Checkpoints
from research.training.logs import duration
from research.training.loop import train
from research.training.snapshots import SnapshotReader
from research.training.start import continued


OWN_SETTINGS = {'name', 'start.step', 'data.seed', 'data.sft.paths'}  # of one fine-tune


class Row(NamedTuple):
  """One line of the table: a checkpoint, a seed, and a set of items in one wording."""

  step: int
  seed: int
  family: str
  dataset: str
  variant: str
  is_control: bool
  n_items: int
  accuracy_before: float
  accuracy_after: float
  margin_before: float
  margin_after: float


def chosen_steps(run_dir: RunDir, wanted: Sequence[int]) -> list[int]:
  """Returns the steps to fine-tune from; none wanted: every snapshot and full checkpoint.

  Raises:
    UserError: not the directory of a run, or a step that it does not have.
  """
  if not run_dir.manifest_json.exists():
    raise UserError(f'--run_dir={run_dir.whole} is not the directory of a run: it has no '
                    'manifest.json')
  steps = set(SnapshotReader(run_dir.snapshots).steps)
  if run_dir.checkpoints.exists():
    checkpoints = Checkpoints(run_dir.checkpoints)
    steps |= set(checkpoints.steps)
    checkpoints.close()
  for step in wanted:
    if step not in steps:
      near = sorted(steps, key=lambda other: abs(other - step))[:2]
      raise UserError(f'--steps={step}: {run_dir.whole} has no snapshot or checkpoint of that '
                      f'step; the nearest are of {near}')
  return sorted(set(wanted) or steps)


def finetune_each(base: ExperimentConfig, overrides: Sequence[tuple[str, str]], run_dir: RunDir,
                  family: str, steps: Sequence[int], seeds: Sequence[int],
                  published: Sequence[EvalTemplate] = ()) -> pathlib.Path:
  """Fine-tunes every step with every seed, scores it before and after; returns the table's file.

  What is there already is not made again; an interrupted fine-tune is resumed. The table keeps the
  rows of other steps and seeds.

  Args:
    base: the experiment of a fine-tune: its steps, rows and optimizer.
    overrides: of its settings, (path, text).
    run_dir: the parent.
    family: one of FAMILIES.
    steps: of the parent.
    seeds: of what is generated; all orders follow from it.
    published: templates of question files that are asked, too.

  Raises:
    UserError: the parent's tokenizer lacks words of the family, or a setting is wrong.
  """
  for line in check_published(published, family):
    print(f'left out, {line}', flush=True)
  run_dir = RunDir(run_dir.whole.resolve())
  folder, began = run_dir.finetunes / family, time.perf_counter()
  jobs = [(step, seed) for step in steps for seed in dict.fromkeys(seeds)]
  for n_done, (step, seed) in enumerate(jobs, 1):
    config = prepared(base, overrides, run_dir, family, step, seed, published)
    child = RunDir(folder / f'step-{step:08d}-seed{seed}')
    _check_settings(config, folder)
    train(config, child)  # A finished one is compared with its settings and left as it is.
    _check_items(config, child)
    new = compared(child, step, seed, config.n_steps)
    left = (time.perf_counter() - began) / n_done * (len(jobs) - n_done)
    print(f'[{n_done}/{len(jobs)}] step {step}, seed {seed}: {said(new)}; '
          f'{duration(left)} left', flush=True)
    # Read anew: another command may have added to it.
    write_table(folder, [row for row in read_table(folder) if (row.step, row.seed) != (step, seed)]
                + new)
  return folder / 'table.csv'


def prepared(base: ExperimentConfig, overrides: Sequence[tuple[str, str]], run_dir: RunDir,
             family: str, step: int, seed: int, published: Sequence[EvalTemplate]
             ) -> ExperimentConfig:
  """Returns the config of one fine-tune, whose data and items it writes to files."""
  folder = run_dir.finetunes / family
  data, suite = folder / f'data-seed{seed}.jsonl', folder / f'items-seed{seed}.jsonl'
  sft = dataclasses.replace(base.data.sft, paths=(str(data),), heldout_fraction=0.0,
                            overlong='refuse')
  if FAMILIES[family].bare:
    sft = dataclasses.replace(sft, user_text='', assistant_text='', turn_end='')
  config = dataclasses.replace(
      base, name=f'{family}-step{step}-seed{seed}',
      data=dataclasses.replace(base.data, seed=seed, sft=sft),
      monitors=dataclasses.replace(base.monitors, suite=str(suite)))
  try:
    config = overrides_lib.apply(continued(config, f'{run_dir.whole}@{step}'), list(overrides))
  except UserError:
    raise
  except ValueError as error:
    raise UserError(str(error)) from error
  if config.data.kind != 'sft':
    raise UserError(f'data.kind={config.data.kind!r}: what is fine-tuned on a family is sft; use '
                    '--experiment=sft')
  # Scored where it begins and where it ends.
  config = dataclasses.replace(config, checkpoints=dataclasses.replace(
      config.checkpoints, snapshot_every=config.n_steps))
  pairs = [{'prompt': prompt, 'response': text} for prompt, text in family_pairs(family, seed)]
  folder.mkdir(parents=True, exist_ok=True)
  write_whole(data, ''.join(json.dumps(pair, ensure_ascii=False) + '\n' for pair in pairs))
  write_items(family_items(family, seed, config.data.sft, published), suite)
  return config


def _check_settings(config: ExperimentConfig, folder: pathlib.Path) -> None:
  """Raises UserError where other fine-tunes of a family were made in another way."""
  for path in sorted(folder.glob('step-*/config.json')):
    saved = json.loads(path.read_text(encoding='utf-8'))
    for setting, value in config_lib.differences(saved, config):
      if setting.kind == 'identity' and setting.path not in OWN_SETTINGS:
        raise UserError(f'{path.parent} was made with {setting.path}={value!r}; a table compares '
                        'fine-tunes that differ in checkpoint and seed alone: give it here, or move '
                        f'{folder} away')


def _check_items(config: ExperimentConfig, child: RunDir) -> None:
  """Raises UserError where a finished fine-tune was scored on other items than are asked now."""
  if pathlib.Path(config.monitors.suite).suffix not in ITEM_SUFFIXES:
    return
  asked = {item.item_id: item for item in sound_items(config.monitors.suite)[0]}
  scored = {item.item_id: item for item in table.read_item_table(child.monitor_items)}
  out = set()
  if child.monitors_left_out.exists():
    lines = child.monitors_left_out.read_text(encoding='utf-8').split('\n')
    out = {json.loads(line)['item_id'] for line in lines if line}
  if scored != {name: item for name, item in asked.items() if name not in out}:
    raise UserError(f'{child.path} was scored on other items than {config.monitors.suite} has '
                    '(other --templates or monitors.suite); move it away to make it again')


def compared(child: RunDir, step: int, seed: int, n_steps: int) -> list[Row]:
  """Returns the rows of one finished fine-tune: the same items before its first step and after."""
  items = table.read_item_table(child.monitor_items)
  scores = [table.read_scores(child.monitor_scores / table.scores_name(at))[1]
            for at in (0, n_steps)]
  good_TB, short_TB = (np.stack([getattr(s, name) for s in scores]).astype(np.float64)
                       for name in ('logp_generalizing', 'logp_shortcut'))
  groups: dict[tuple[str, str, str, bool], list[int]] = {}
  for i, item in enumerate(items):
    groups.setdefault((item.family, item.dataset, item.variant, item.is_control), []).append(i)
  rows = []
  for key, members in groups.items():
    accuracy = (good_TB > short_TB)[:, members].mean(axis=1)
    margin = (np.exp(good_TB) - np.exp(short_TB))[:, members].mean(axis=1)
    rows.append(Row(step, seed, *key, len(members), *accuracy.tolist(), *margin.tolist()))
  return rows


def said(rows: Sequence[Row]) -> str:
  """Returns the accuracy of every dataset before and after, in words; wordings weigh by items."""
  parts = []
  for dataset in dict.fromkeys(row.dataset for row in rows):
    mine = [row for row in rows if row.dataset == dataset]
    n_items = sum(row.n_items for row in mine)
    before, after = (sum(getattr(row, f'accuracy_{when}') * row.n_items for row in mine) / n_items
                     for when in ('before', 'after'))
    parts.append(f'{dataset} {before:.2f} -> {after:.2f}')
  return ', '.join(parts)


def read_table(folder: pathlib.Path) -> list[Row]:
  """Returns the rows that earlier commands wrote, none where there is no table."""
  path = folder / 'table.parquet'
  return [Row(**row) for row in pq.read_table(path).to_pylist()] if path.exists() else []


def write_table(folder: pathlib.Path, rows: Sequence[Row]) -> None:
  """Writes table.parquet and table.csv by step and seed, each whole or not at all."""
  ordered = sorted(rows, key=lambda row: (row.step, row.seed))
  found = pa.Table.from_pylist([row._asdict() for row in ordered])
  for name, write in (('table.parquet', pq.write_table), ('table.csv', pyarrow.csv.write_csv)):
    write(found, folder / f'{name}.tmp')
    os.replace(folder / f'{name}.tmp', folder / name)
