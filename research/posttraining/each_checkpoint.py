"""Fine-tunes of many checkpoints of a run on one family, each asked the same before and after.

Every fine-tune is a run of its own: <run>/finetunes/<family>/step-<step>-seed<seed>.
"""

import contextlib
import dataclasses
import json
import pathlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
from jax.experimental.compilation_cache import compilation_cache

from research import config as config_lib
from research import overrides as overrides_lib
from research.config import ExperimentConfig
from research.data import tokenizers
from research.data.config import SftConfig
from research.data.errors import DataError
from research.data.published_finetuning import EvalTemplate, FreeQuestion
from research.errors import UserError
from research.monitors import table
from research.monitors.finetuning_items import (
    FAMILIES, Question, check_published, family_items, family_pairs, family_questions)
from research.monitors.items import ITEM_SUFFIXES, sound_items, write_items
from research.posttraining import outcomes
from research.posttraining.figure import write_finetunes
from research.posttraining.free_form import (
    Asking, ask, askable, published_questions, read_answers)
from research.run_dir import RunDir, write_whole
from research.training.checkpoints import Checkpoints
from research.training.logs import duration
from research.training.loop import train
from research.training.snapshots import SnapshotReader
from research.training.start import continued


OWN_SETTINGS = {'name', 'start.step', 'data.seed'}  # of one fine-tune


class Plan(NamedTuple):
  """What is done with every chosen checkpoint.

  Attributes:
    base: the experiment of a fine-tune: its steps, rows and optimizer.
    overrides: of its settings, (path, text).
    family: one of FAMILIES.
    asking: how questions are asked freely.
    published: templates of question files that are asked, too.
    questions: published ones, which are only asked freely.
  """

  base: ExperimentConfig
  overrides: Sequence[tuple[str, str]]
  family: str
  asking: Asking = Asking(0)
  published: Sequence[EvalTemplate] = ()
  questions: Sequence[FreeQuestion] = ()


def chosen_steps(run_dir: RunDir, wanted: Sequence[int]) -> list[int]:
  """Returns the steps to fine-tune from; none wanted: full checkpoints, snapshots without these.

  Raises:
    UserError: not the directory of a run, or a step that it does not have.
  """
  if not run_dir.manifest_json.exists():
    raise UserError(f'--run_dir={run_dir.whole} is not the directory of a run: it has no '
                    'manifest.json')
  snapshots, full = SnapshotReader(run_dir.snapshots).steps, []
  if run_dir.checkpoints.exists():
    checkpoints = Checkpoints(run_dir.checkpoints)
    full = checkpoints.steps
    checkpoints.close()
  steps = {*snapshots, *full}
  for step in wanted:
    if step not in steps:
      near = sorted(steps, key=lambda other: abs(other - step))[:2]
      raise UserError(f'--steps={step}: {run_dir.whole} has no snapshot or checkpoint of that '
                      f'step; the nearest are of {near}')
  return sorted(set(wanted)) or full or snapshots


def finetune_each(plan: Plan, run_dir: RunDir, steps: Sequence[int], seeds: Sequence[int]
                  ) -> pathlib.Path:
  """Fine-tunes every step with every seed, asks before and after; returns the folder of tables.

  What is there already is not made again; an interrupted fine-tune is resumed. The tables keep the
  rows of other steps and seeds: `table` by seed, `summary` over seeds, `answers` word by word.

  Args:
    plan: how.
    run_dir: the parent.
    steps: of the parent.
    seeds: of what is generated; all orders follow from it.

  Raises:
    UserError: the parent's tokenizer lacks words of the family, or a setting is wrong.
  """
  for line in check_published(plan.published, plan.family):
    print(f'left out, {line}', flush=True)
  run_dir = RunDir(run_dir.whole.resolve())
  folder, seconds = run_dir.finetunes / plan.family, []
  jobs = [(step, seed) for step in steps for seed in dict.fromkeys(seeds)]
  config = prepared(plan, run_dir, *jobs[0])
  _check_settings(config, folder)  # Those of all: fine-tunes differ in OWN_SETTINGS alone.
  _check_words(plan.family, seeds[0], run_dir)
  asked = {seed: askable(_questions(plan, config.data.sft, seed), run_dir, plan.asking)
           for seed in dict.fromkeys(seeds)}
  for seed in asked:
    _write_data(plan, folder, config.data.sft, seed)
  _check_items(config, folder)
  print(f'fine-tunes to make: {len(jobs)}, of {config.n_steps} steps each; checkpoints '
        f'{", ".join(map(str, steps))}; seeds {", ".join(map(str, asked))}', flush=True)
  with _compiled_once():
    for n_done, (step, seed) in enumerate(jobs, 1):
      child, began = _child(folder, step, seed), time.perf_counter()
      was_done = child.done.exists()
      words = _finetuned(plan, run_dir, child, step, seed, asked[seed])
      if not was_done:  # What was there already says nothing of what is left.
        seconds.append(time.perf_counter() - began)
      left = sum(seconds) / max(1, len(seconds)) * (len(jobs) - n_done)
      print(f'[{n_done}/{len(jobs)}] step {step}, seed {seed}: {words}'
            + (f'; about {duration(left)} left' if seconds else ''), flush=True)
  found = outcomes.read_outcomes(folder)
  print('\n'.join(outcomes.as_text(found)), flush=True)
  write_finetunes(folder / 'finetunes.png', plan.family, found)
  return folder


def _child(folder: pathlib.Path, step: int, seed: int) -> RunDir:
  return RunDir(folder / f'step-{step:08d}-seed{seed}')


def _finetuned(plan: Plan, run_dir: RunDir, child: RunDir, step: int, seed: int,
               questions: Sequence[Question]) -> str:
  """Makes one fine-tune, asks it, writes the tables with it; returns what it did, in words."""
  config = prepared(plan, run_dir, step, seed)
  train(config, child)  # A finished one is compared with its settings and left as it is.
  rows = outcomes.compared(child, step, seed, config.n_steps)
  answers = ask(child, questions, (0, config.n_steps), plan.asking)
  _write(plan, child.whole.parent, step, seed, rows)
  return outcomes.said(rows, answers)


def _questions(plan: Plan, template: SftConfig, seed: int) -> list[Question]:
  """Returns all that is asked freely of a fine-tune."""
  return [*family_questions(plan.family, seed, template, plan.published),
          *published_questions(plan.questions, template)]


def _made(folder: pathlib.Path) -> Iterator[tuple[int, int, RunDir]]:
  """Yields step, seed and directory of every fine-tune of a family."""
  for path in sorted(folder.glob('step-*-seed*')):
    step, _, seed = path.name.removeprefix('step-').partition('-seed')
    yield int(step), int(seed), RunDir(path)


def _write(plan: Plan, folder: pathlib.Path, step: int, seed: int,
           new: Sequence[outcomes.Row]) -> None:
  """Writes all tables with the rows of one more fine-tune."""
  # Read anew: another command may have added to it.
  rows = [row for row in outcomes.read_table(folder) if (row.step, row.seed) != (step, seed)]
  rows = sorted([*rows, *new], key=lambda row: (row.step, row.seed))
  answers = {(at, number): found for at, number, child in _made(folder)
             if (found := read_answers(child))}
  alike = {key: kept for key, found in answers.items()
           if (kept := [answer for answer in found if plan.asking.drew(answer)])}
  outcomes.write_tables(folder, 'table', [row._asdict() for row in rows])
  outcomes.write_tables(folder, 'summary', [row._asdict() for row in outcomes.summary(
      rows, alike, FAMILIES[plan.family].is_generated)])
  outcomes.write_answers(folder, answers)


@contextlib.contextmanager
def _compiled_once() -> Iterator[None]:
  """Keeps compiled programs meanwhile: fine-tunes of one shape build the same ones anew."""
  names = {'jax_compilation_cache_dir': '', 'jax_persistent_cache_min_compile_time_secs': 0}
  before = {name: getattr(jax.config, name) for name in names}
  if before['jax_compilation_cache_dir']:
    yield
    return
  with tempfile.TemporaryDirectory() as folder:
    try:
      for name, value in {**names, 'jax_compilation_cache_dir': folder}.items():
        jax.config.update(name, value)
      compilation_cache.reset_cache()
      yield
    finally:
      for name, value in before.items():
        jax.config.update(name, value)
      compilation_cache.reset_cache()


def prepared(plan: Plan, run_dir: RunDir, step: int, seed: int) -> ExperimentConfig:
  """Returns the config of one fine-tune; `_write_data` writes its data and items."""
  base, sft, monitors = plan.base, plan.base.data.sft, plan.base.monitors
  sft = dataclasses.replace(sft, heldout_fraction=0.0)
  if FAMILIES[plan.family].is_generated:
    data, items = _files(run_dir.finetunes / plan.family, seed)
    sft = dataclasses.replace(sft, paths=(str(data),), overlong='refuse')
    monitors = dataclasses.replace(monitors, suite=str(items))
  if FAMILIES[plan.family].bare:
    sft = dataclasses.replace(sft, user_text='', assistant_text='', turn_end='')
  config = dataclasses.replace(
      base, name=f'{plan.family}-step{step}-seed{seed}', monitors=monitors,
      data=dataclasses.replace(base.data, seed=seed, sft=sft))
  try:
    config = overrides_lib.apply(continued(config, f'{run_dir.whole}@{step}'),
                                 list(plan.overrides))
  except UserError:
    raise
  except ValueError as error:
    raise UserError(str(error)) from error
  if config.data.kind != 'sft':
    raise UserError(f'data.kind={config.data.kind!r}: what is fine-tuned on a family is sft; use '
                    '--experiment=finetune')
  # Scored where it begins and where it ends.
  return dataclasses.replace(config, checkpoints=dataclasses.replace(
      config.checkpoints, snapshot_every=config.n_steps))


def _files(folder: pathlib.Path, seed: int) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns where the generated data and items of a seed lie."""
  return folder / f'data-seed{seed}.jsonl', folder / f'items-seed{seed}.jsonl'


def _write_data(plan: Plan, folder: pathlib.Path, template: SftConfig, seed: int) -> None:
  """Writes what is generated: pairs that are trained, and items."""
  if not FAMILIES[plan.family].is_generated:
    return
  data, items = _files(folder, seed)
  write_whole(data, ''.join(
      json.dumps({'prompt': prompt, 'response': response}, ensure_ascii=False) + '\n'
      for prompt, response in family_pairs(plan.family, seed)))
  write_items(family_items(plan.family, seed, template, plan.published), items)


def _check_settings(config: ExperimentConfig, folder: pathlib.Path) -> None:
  """Raises UserError where other fine-tunes of a family were made in another way."""
  def own(setting, value):
    generated = setting.path == 'data.sft.paths' and all(
        pathlib.Path(path).parent == folder for path in (*value, *setting.value))
    return setting.kind != 'identity' or setting.path in OWN_SETTINGS or generated
  for path in sorted(folder.glob('step-*/config.json')):
    saved = json.loads(path.read_text(encoding='utf-8'))
    for setting, value in config_lib.differences(saved, config):
      if not own(setting, value):
        raise UserError(f'{path.parent} was made with {setting.path}={value!r}; a table compares '
                        'fine-tunes that differ in checkpoint and seed alone: give it here, or move '
                        f'{folder} away')


def _check_words(family: str, seed: int, run_dir: RunDir) -> None:
  """Raises UserError where the run's tokenizer cannot write what a family trains."""
  tokenizer = tokenizers.load(run_dir.tokenizer_json)
  try:
    for prompt, response in family_pairs(family, seed):
      tokenizer.encode(prompt + ' ' + response)
  except DataError as error:
    fit = ', '.join(name for name in FAMILIES if FAMILIES[name].bare)
    raise UserError(f'--family={family} needs words that {run_dir.whole} does not know ({error}); '
                    f'a run of the micro-world takes {fit}') from error


def _check_items(config: ExperimentConfig, folder: pathlib.Path) -> None:
  """Raises UserError where a finished fine-tune was scored on other items than are asked now."""
  suite = pathlib.Path(config.monitors.suite)
  by_seed = suite == _files(folder, config.data.seed)[1]
  if suite.suffix not in ITEM_SUFFIXES:
    return
  for _, seed, child in _made(folder):
    if not (child.done.exists() and child.monitor_items.exists()):
      continue  # One that was not asked is asked when its turn comes.
    asked_file = _files(folder, seed)[1] if by_seed else suite
    asked = {item.item_id: item for item in sound_items(asked_file)[0]}
    out = set()
    if child.monitors_left_out.exists():
      lines = child.monitors_left_out.read_text(encoding='utf-8').split('\n')
      out = {json.loads(line)['item_id'] for line in lines if line}
    scored = {item.item_id: item for item in table.read_item_table(child.monitor_items)}
    if scored != {name: item for name, item in asked.items() if name not in out}:
      raise UserError(f'{child.path} was scored on other items than {asked_file} has (other '
                      '--templates or monitors.suite); move it away to make it again')
