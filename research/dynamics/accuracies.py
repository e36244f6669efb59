"""Published accuracies along training, as they come: several models, some of them copied."""

import csv
import dataclasses
import gzip
import pathlib
from collections.abc import Mapping

import numpy as np

from research.errors import UserError
from research.evals.results import all_rows
from research.run_dir import RunDir

LEAST_COPIED = 3  # checkpoints in a row that agree in every task before they count as copied


@dataclasses.dataclass(frozen=True)
class Published:
  """One model's accuracies by task and step; the error is zero where none was published."""

  model: str
  tasks: tuple[str, ...]
  steps: np.ndarray
  accuracy_KT: np.ndarray
  error_KT: np.ndarray

  def at(self, kept: np.ndarray) -> 'Published':
    """Returns the checkpoints of a mask or of indices."""
    return dataclasses.replace(self, steps=self.steps[kept],
                               accuracy_KT=self.accuracy_KT[:, kept],
                               error_KT=self.error_KT[:, kept])


def read_rows(path: pathlib.Path, model: str, value: str = 'value', error: str | None = None,
              where: Mapping[str, str] | None = None) -> list[Published]:
  """Returns the models of a tidy table with columns step, task and those named, by model.

  Args:
    path: of a .csv or .csv.gz file.
    model, value, error: names of its columns.
    where: column -> value of the rows to read.

  Raises:
    UserError: a column is missing, no row is left, a number is none, or a model lacks a task at
      one of its steps.
  """
  opened = gzip.open(path, 'rt') if path.suffix == '.gz' else path.open()
  with opened as file:
    table = csv.DictReader(file)
    needed = {model, 'step', 'task', value, *([error] if error else []), *(where or {})}
    missing = sorted(needed - set(table.fieldnames or ()))
    if missing:
      raise UserError(f'{path}: column {missing[0]} is missing, it has {table.fieldnames}')
    rows = [row for row in table if all(row[k] == v for k, v in (where or {}).items())]
  if not rows:
    raise UserError(f'{path}: no row has {dict(where or {})}')
  by_model: dict[str, dict[tuple[str, int], tuple[float, float]]] = {}
  for row in rows:
    try:
      key = (row['task'], int(row['step']))
      cell = (float(row[value]), float(row[error]) if error else 0.0)
    except ValueError as wrong:
      raise UserError(f'{path}: {row[model]} {row["task"]} step {row["step"]}: {wrong}') from wrong
    by_model.setdefault(row[model], {})[key] = cell
  return [_published(path, name, cells) for name, cells in by_model.items()]


def evaluated(run_dir: RunDir, metric: str = 'acc', chosen_filter: str = 'none') -> Published:
  """Returns what launchers.evaluate measured of a run.

  A task that was asked in another way than by its plain name is called <folder>/<task>.

  Raises:
    UserError: nothing has this metric, or a task is missing at a step where others are there.
  """
  cells, model = {}, ''
  for row in all_rows(run_dir):
    if (row.metric, row.filter) == (metric, chosen_filter):
      task = row.task if row.task == row.variant else f'{row.variant}/{row.task}'
      cells[task, row.step], model = (row.value, row.stderr), row.model
  if not cells:
    raise UserError(f'{run_dir.evals} has no metric {metric}, filter {chosen_filter}')
  return _published(run_dir.evals_csv, model, cells)


def without_repeats(series: Published) -> tuple[Published, list[int]]:
  """Returns a series without checkpoints that repeat another one in every task, and their steps.

  Of equals the first stays, or the last where it is the final one: a revision that serves final
  weights is not what its name says.
  """
  kept: dict[bytes, int] = {}
  last = len(series.steps) - 1
  for t in range(last + 1):
    key = series.accuracy_KT[:, t].tobytes()
    if t == last or key not in kept:
      kept[key] = t
  index = np.array(sorted(kept.values()), np.int64)
  return series.at(index), [int(s) for s in np.delete(series.steps, index)]


def copied_steps(series: Published, original: Published) -> list[int]:
  """Returns the steps at which a series repeats another model's values in every common task.

  Only runs of `LEAST_COPIED` common steps in a row count, of models with two common tasks or more:
  models at the floor agree by chance in one task, not in all of them.
  """
  tasks = [task for task in series.tasks if task in original.tasks]
  steps, own, other = np.intersect1d(series.steps, original.steps, return_indices=True)
  mine = series.accuracy_KT[[series.tasks.index(task) for task in tasks]][:, own]
  theirs = original.accuracy_KT[[original.tasks.index(task) for task in tasks]][:, other]
  equal = np.all(mine == theirs, axis=0) if len(tasks) > 1 else np.zeros(len(steps), bool)
  edges = np.flatnonzero(np.diff(np.concatenate([[0], equal.astype(np.int8), [0]])))
  runs = zip(edges[::2], edges[1::2])
  return [int(s) for first, end in runs if end - first >= LEAST_COPIED for s in steps[first:end]]


def center_of(accuracy_KT: np.ndarray) -> np.ndarray:
  """Returns for each task (K, 1) the level that tells learned from not: a third of the way.

  Published benchmarks have no wrong answer that stands for a pattern, so the two states are the
  level of the first checkpoint and the median of the last half of them.
  """
  first = accuracy_KT[:, :1]
  late = np.median(accuracy_KT[:, accuracy_KT.shape[1] // 2:], axis=1, keepdims=True)
  return first + (late - first) / 3


def _published(path, name, cells):
  tasks = tuple(sorted({task for task, _ in cells}))
  steps = np.array(sorted({step for _, step in cells}))
  for task in tasks:
    for step in steps:
      if (task, int(step)) not in cells:
        raise UserError(f'{path}: {name} has no {task} at step {step}, where it has other tasks')
  both = np.array([[cells[task, int(step)] for step in steps] for task in tasks])
  return Published(name, tasks, steps, both[..., 0], both[..., 1])
