"""Reads what a run wrote down beside its monitors: config, manifest and the rows of its logs."""

import dataclasses
import json
import pathlib
from typing import Any

import numpy as np

from research.errors import UserError
from research.run_dir import RunDir


@dataclasses.dataclass(frozen=True)
class Series:
  """One recorded quantity: strictly increasing steps and a float64 value at each."""

  steps: np.ndarray
  values: np.ndarray


@dataclasses.dataclass(frozen=True)
class Records:
  """A run's own records; empty dicts where the run has not written a file yet."""

  config: dict[str, Any]
  manifest: dict[str, Any]
  metrics: dict[str, Series]
  evals: dict[str, Series]
  timings: dict[str, Series]

  @property
  def last_step(self) -> int:
    """The last step that was recorded, 0 before the first."""
    return max((int(series.steps[-1]) for series in self.metrics.values()), default=0)

  @property
  def n_steps(self) -> int | None:
    """The step at which the run, the replay or the series is meant to end."""
    if self.manifest.get('series'):
      return max(map(int, self.manifest['series']['monitored']))
    replayed = self.manifest.get('replay')
    return replayed['steps'][1] if replayed else self.config.get('n_steps')

  @property
  def is_finished(self) -> bool:
    """True where every planned step was recorded (rows may count from 0 or from 1)."""
    return self.n_steps is not None and self.last_step >= self.n_steps - 1

  def tokens_at(self, steps: np.ndarray) -> np.ndarray | None:
    """Returns the tokens seen at steps, interpolated; None where the run did not count them."""
    tokens = self.metrics.get('tokens')
    if tokens is None:
      return None
    known_steps = np.concatenate([[0], tokens.steps[tokens.steps > 0]])
    known = np.concatenate([[0.], tokens.values[tokens.steps > 0]])
    return np.interp(steps, known_steps, known)


def read_records(run_dir: RunDir) -> Records:
  """Returns the records of a run, finished or not.

  Raises:
    UserError: a file holds broken JSON, or a row lacks its step.
  """
  return Records(
      config=_read_json(run_dir.config_json), manifest=_read_json(run_dir.manifest_json),
      metrics=_read_rows(run_dir.metrics_jsonl), evals=_read_rows(run_dir.evals_jsonl),
      timings=_read_rows(run_dir.timings_jsonl))


def flatten(tree: dict[str, Any], prefix: str = '') -> dict[str, Any]:
  """Returns the leaves of nested dicts under dotted names, in their order."""
  leaves = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      leaves.update(flatten(value, f'{prefix}{key}.'))
    else:
      leaves[prefix + key] = value
  return leaves


def _read_json(path: pathlib.Path):
  if not path.is_file():
    return {}
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise UserError(f'{path} is not JSON: {error}') from error


def _read_rows(path):
  """Returns every numeric quantity of a .jsonl file; a half-written last line is left out."""
  if not path.is_file():
    return {}
  lines = path.read_text(encoding='utf-8').split('\n')
  columns = {}
  for number, line in enumerate(lines[:-1], start=1):
    try:
      row = flatten(json.loads(line))
    except (ValueError, AttributeError) as error:
      raise UserError(f'{path} line {number} is not a JSON object: {error}') from error
    if not isinstance(row.get('step'), int):
      raise UserError(f'{path} line {number}: every row needs a whole number "step"')
    for key, value in row.items():
      if key != 'step' and isinstance(value, (int, float)):
        columns.setdefault(key, {})[row['step']] = float(value)
  return {key: _series(by_step) for key, by_step in columns.items()}


def _series(by_step):
  steps = np.array(sorted(by_step), np.int64)
  return Series(steps, np.array([by_step[int(step)] for step in steps]))
