"""A public series as a trajectory: its revisions under one count of steps, read tensor by tensor."""

import collections
import copy
import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from models.config import ModelConfig
from models.interop.checkpoint import HfCheckpoint, leaf_shapes
from models.interop.files import CONFIG
from research import config as config_lib
from research.config import ExperimentConfig
from research.dynamics.public import TOKENIZER, OtherModelError, PublicSeries, UnusableError
from research.dynamics.revisions import Folder, Revision, parse, place_of
from research.errors import UserError
from research.monitors.table import score_table
from research.run_dir import RunDir
from research.training.streaming import place_streamed

PATTERN = '*step*'
_LONGEST_ROW = 2048  # tokens per row in the config of a model of another's making


def counted_through(revisions: Sequence[Revision]) -> list[tuple[int, int | None]]:
  """Returns step and tokens of each revision, counted through all stages.

  A stage goes on from the last revision of the stage before it: that one's counts are added to its
  own, so a series of one stage keeps its steps. A stage that has a step 0 of its own begins one
  step later, as no two revisions may have the same step.
  """
  rows: list[tuple[int, int | None]] = []
  for _, stage in itertools.groupby(revisions, lambda revision: revision.stage):
    members = list(stage)
    step, tokens = rows[-1] if rows else (0, 0)
    step += bool(rows) and members[0].step == 0
    rows += [(step + revision.step, None if None in (tokens, revision.tokens)
              else tokens + revision.tokens) for revision in members]
  return rows


def config_of(model: ModelConfig, name: str, step: int) -> ExperimentConfig:
  """Returns the config of a run of which nothing but the model is known."""
  base = ExperimentConfig()
  return dataclasses.replace(
      base, name=name, n_steps=max(step, 1), model=model, data=dataclasses.replace(
          base.data, sequence_length=min(_LONGEST_ROW, model.context_length)))


def same_dtype(model: ModelConfig, dtype: str) -> ModelConfig:
  """Returns the model computing in a dtype."""
  return dataclasses.replace(model, compute_dtype=dtype)


def first_difference(a: Any, b: Any) -> tuple[str, Any, Any]:
  """Returns name and both values of the first setting in which two unequal configs differ."""
  name = next(field.name for field in dataclasses.fields(a)
              if getattr(a, field.name) != getattr(b, field.name))
  ours, theirs = getattr(a, name), getattr(b, name)
  if not (dataclasses.is_dataclass(ours) and dataclasses.is_dataclass(theirs)):
    return name, ours, theirs
  inner, ours, theirs = first_difference(ours, theirs)
  return f'{name}.{inner}', ours, theirs


class PublicTrajectory:
  """The revisions of one public model; see `research.dynamics.trajectory.Trajectory`.

  Attributes:
    location, pattern: what was opened.
    run_dir: the run directory that has its scores, None where none is known.
    steps: of the revisions, counted through all stages (`counted_through`), ascending.
  """

  def __init__(self, location: str, pattern: str = PATTERN, run_dir: RunDir | None = None):
    """Lists the revisions; fetches no weights.

    Raises:
      UserError: the location is neither a folder nor a repository, or nothing matches.
    """
    self.location, self.pattern, self.run_dir = location, pattern, run_dir
    self._series = PublicSeries(location, pattern)
    counted = counted_through(self._series.revisions)
    self.steps = [step for step, _ in counted]
    self._tokens = dict(counted)
    self._names = dict(zip(self.steps, self._series.names, strict=True))

  def only(self, steps: Sequence[int]) -> 'PublicTrajectory':
    """Returns the same trajectory with some of its steps."""
    fewer = copy.copy(self)
    fewer.steps = [step for step in self.steps if step in set(steps)]
    return fewer

  def name_of(self, step: int) -> str:
    """Returns the name of the revision of a step; raises UserError where there is none."""
    if step not in self._names:
      near = min(self.steps, key=lambda other: abs(other - step))
      raise UserError(f'{self.location} has no revision of step {step}; the nearest is {near}')
    return self._names[step]

  def folder(self, step: int, *files: Sequence[str]) -> pathlib.Path:
    """Returns the folder of a revision with the files of these patterns, fetched if need be."""
    return self._series.folder(self.name_of(step), *files)

  def file_sizes(self, step: int) -> dict[str, int]:
    """Returns the bytes of each file of a revision in a folder; {} for one in a repository."""
    if not pathlib.Path(self.location).expanduser().is_dir():
      return {}
    return {path.name: path.stat().st_size for path in sorted(self.folder(step).iterdir())
            if path.is_file()}

  def commits(self) -> dict[str, str]:
    """Returns the commit of each revision of a repository by name; {} of a folder."""
    known = self._series.commits()
    return {name: known[name] for name in map(self.name_of, self.steps) if name in known}

  @functools.cached_property
  def model(self) -> ModelConfig:
    """The model of most revisions; raises UserError where none has a config.json that is known."""
    models, last = collections.defaultdict(collections.Counter), None
    for step in self.steps:
      try:
        model = self._series.config(self.name_of(step))
        models[same_dtype(model, 'float32')][model] += 1
      except UnusableError as error:
        last = error
    if not models:
      raise UserError(f'no revision of {self.location} can be used: {last}')
    return max(models.values(), key=collections.Counter.total).most_common(1)[0][0]

  @functools.cached_property
  def config(self) -> ExperimentConfig:
    """The model under `config.model`, and the settings it was monitored with; no other is known."""
    if self.run_dir and self.run_dir.config_json.exists():
      return config_lib.from_json(self.run_dir.config_json.read_text(encoding='utf-8'))
    return config_of(self.model, self.location, self.steps[-1])

  @functools.cached_property
  def names(self) -> list[str]:
    """Dotted names of the parameters, sorted."""
    return sorted(leaf_shapes(self.model))

  def tokenizer_folder(self) -> pathlib.Path:
    """Returns the folder of the first revision with a tokenizer, else of the first; no weights."""
    folders = (self.folder(step, (CONFIG, *TOKENIZER)) for step in self.steps)
    first = self.folder(self.steps[0], (CONFIG, *TOKENIZER))
    return next((folder for folder in folders if (folder / TOKENIZER[0]).is_file()), first)

  def tokens(self, step: int) -> int | None:
    """Returns the tokens seen up to a step, rounded as in the names; None where none says it."""
    return 0 if step == 0 else self._tokens.get(step)

  def checkpoint(self, step: int) -> HfCheckpoint:
    """Returns the files of a step, fetched if need be.

    Raises:
      UnusableError: one is missing or truncated, or tensors are not those of the model. `path` is
        the file. OtherModelError where most revisions have another model; the dtype in which it
        computes is no part of that, as one tool or another writes it.
    """
    checkpoint = self._series.checkpoint(self.name_of(step))
    theirs = same_dtype(checkpoint.config, self.model.compute_dtype)
    if theirs != self.model:
      path = checkpoint.folder / CONFIG
      field, value, usual = first_difference(theirs, self.model)
      raise OtherModelError(
          f'{path}: is of another model, with {field}={value!r}; most revisions have {usual!r}; '
          "open each stage alone, with a pattern such as 'stage2-*'", path)
    return checkpoint

  def close(self, step: int) -> None:
    """Lets go of the open files of a step."""
    self._series.close(self.name_of(step))

  def leaf(self, step: int, name: str) -> np.ndarray:
    """Returns one tensor in the dtype of the files; raises UnusableError as `checkpoint`."""
    if name not in self.names:
      raise UserError(f'{self.location} has no tensor {name!r}; it has {", ".join(self.names)}')
    return self.checkpoint(step).read(name)

  def leaf_through_time(self, name: str, steps: Sequence[int] | None = None) -> np.ndarray:
    """Returns one tensor at several steps, [T, ...]; raises UnusableError as `checkpoint`."""
    return np.stack([self.leaf(step, name) for step in (self.steps if steps is None else steps)])

  def params(self, step: int, placement: Any = None) -> Any:
    """Returns all tensors: by name, or streamed onto the devices of `placement`, a tree of
    jax.ShapeDtypeStruct with shardings; raises UnusableError as `checkpoint`."""
    if placement is None:
      return {name: self.leaf(step, name) for name in self.names}
    return place_streamed(self.checkpoint(step).read, placement)

  def scores(self) -> pa.Table:
    """Returns what was monitored into the run directory; without columns where there is none."""
    if self.run_dir is None:
      return pa.table({})
    return score_table(self.run_dir.monitor_items, self.run_dir.monitor_scores, self.steps,
                       self.tokens)

  def file_of(self, step: int, name: str) -> pathlib.Path:
    """Returns the file that holds a tensor, the first of several; of a damaged step what is amiss."""
    try:
      return self.checkpoint(step).file_of(name)
    except UnusableError as error:
      return error.path

  def recorded(self, step: int, name: str) -> str:
    """Returns '': public revisions record no hashes."""
    return ''


def find_series(location: str) -> PublicTrajectory | None:
  """Returns the public series of a location, None for what is none.

  Args:
    location: a folder of revisions or owner/repository; @ and a pattern may follow.

  Raises:
    UserError: a repository cannot be reached or there is none of that name; a pattern matches
      nothing.
  """
  whole = pathlib.Path(location).expanduser().is_dir()
  place, at, pattern = (location, '', '') if whole else location.partition('@')
  path = pathlib.Path(place).expanduser()
  if path.is_dir():
    if not at and not any(map(parse, Folder(path).names())):
      return None
    return PublicTrajectory(place, pattern or PATTERN)
  try:
    place_of(place)
  except UserError:
    return None
  try:
    return PublicTrajectory(place, pattern or PATTERN)
  except UserError as error:
    raise UserError(f'{place} is no directory here; as a repository: {error}') from error
