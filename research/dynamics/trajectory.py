"""A trajectory: the checkpoints of one training run in order, whatever wrote them.

    from research.dynamics.trajectory import open_trajectory

    trajectory = open_trajectory('runs/quickstart')
    trajectory.steps                                   # [0, 20, 40, ...]
    trajectory.tokens(40)                              # loss-bearing tokens seen by then
    trajectory.leaf(40, 'blocks.attention.q')          # one tensor of one step, a NumPy array
    trajectory.leaf_through_time('final_norm.scale')   # the same tensor at all steps [T, ...]
    trajectory.scores().to_pandas()                    # what the monitors measured
    list(trajectory.documents(40, 60))                 # what the model read between two steps

Nothing is read before it is asked for, and what is read is compared with its recorded hash.
"""

import bisect
from collections.abc import Callable, Iterator, Sequence
import functools
import json
import pathlib
from typing import Any, Protocol

import jax
import numpy as np
import pyarrow as pa

from research import config as config_lib
from research.config import ExperimentConfig
from research.data.batches import Source
from research.data.windows import document_rows
from research.dynamics.original import Original, check_range, trained_on
from research.dynamics.public_trajectory import PublicTrajectory, find_series
from research.dynamics.series import CheckpointSeries, SnapshotSeries
from research.errors import UserError
from research.monitors.table import score_table
from research.run_dir import RunDir
from research.training.logs import read_rows
from research.training.snapshots import leaf_names


class Trajectory(Protocol):
  """What all analysis takes; also a `research.dynamics.series.Series`."""

  location: str
  config: ExperimentConfig
  steps: list[int]
  names: list[str]

  def tokens(self, step: int) -> int | None:
    """Returns the tokens seen up to a step, None where that is not known."""

  def leaf(self, step: int, name: str) -> np.ndarray:
    """Returns one tensor; raises DamagedError if it is missing or not sound."""

  def leaf_through_time(self, name: str, steps: Sequence[int] | None = None) -> np.ndarray:
    """Returns one tensor at several steps, all by default, [T, ...]."""

  def params(self, step: int, placement: Any = None) -> Any:
    """Returns all tensors: by name as NumPy arrays, or as a tree laid out like `placement`."""

  def scores(self) -> pa.Table:
    """Returns a row per step and monitor item."""

  def file_of(self, step: int, name: str) -> pathlib.Path:
    """Returns the file or folder that holds a tensor."""

  def recorded(self, step: int, name: str) -> str:
    """Returns the recorded hash of a tensor, '' if there is none."""


class RunTrajectory:
  """The trajectory of a run directory: its snapshots, and full checkpoints where there is none.

  Attributes:
    run_dir, location: where it lies.
    config: what was run.
    manifest: what it was made from.
    steps: steps of snapshots and full checkpoints, ascending.
    names: dotted names of the parameters.
  """

  def __init__(self, run_dir: RunDir):
    self.run_dir, self.location = run_dir, str(run_dir.path)
    self.config: ExperimentConfig = config_lib.from_json(
        run_dir.config_json.read_text(encoding='utf-8'))
    self.manifest = json.loads(run_dir.manifest_json.read_text(encoding='utf-8'))
    self._snapshots = SnapshotSeries(run_dir.snapshots)
    self._checkpoints = CheckpointSeries(run_dir.checkpoints)
    self.steps = sorted({*self._snapshots.steps, *self._checkpoints.steps})
    self.names = self._snapshots.names or self._checkpoints.names
    self._dense = set(self._snapshots.steps)

  def _series(self, step: int) -> SnapshotSeries | CheckpointSeries:
    if step not in self.steps:
      at = bisect.bisect(self.steps, step)
      near = ' and '.join(str(s) for s in self.steps[max(0, at - 1):at + 1])
      raise UserError(f'{self.run_dir.path} has no snapshot or checkpoint of step {step}; the '
                      f'nearest are {near or "none"}')
    return self._snapshots if step in self._dense else self._checkpoints

  def tokens(self, step: int) -> int | None:
    """Returns the loss-bearing tokens consumed up to a step; None where no row says it."""
    return 0 if step == 0 else self._tokens.get(step)

  @functools.cached_property
  def _tokens(self) -> dict[int, int]:
    return {row['step']: row['tokens'] for row in read_rows(self.run_dir.metrics_jsonl)}

  def leaf(self, step: int, name: str) -> np.ndarray:
    """Returns one tensor in its stored dtype, compared with its hash.

    Raises:
      UserError: there is no such step or tensor.
      DamagedError: it is missing on the disk, or not what was written.
    """
    self._check(name)
    return self._series(step).leaf(step, name)

  def leaf_through_time(self, name: str, steps: Sequence[int] | None = None) -> np.ndarray:
    """Returns one tensor at several steps, [T, ...]; snapshots come in one TensorStore call.

    Raises as `leaf`.
    """
    self._check(name)
    wanted = self.steps if steps is None else list(steps)
    dense = [step for step in wanted if self._series(step) is self._snapshots]
    if len(dense) == len(wanted):
      return self._snapshots.leaves(dense, name)
    read = dict(zip(dense, self._snapshots.leaves(dense, name), strict=True)) if dense else {}
    return np.stack([read[step] if step in read else self._checkpoints.leaf(step, name)
                     for step in wanted])

  def _check(self, name: str) -> None:
    if name not in self.names:
      raise UserError(f'{self.run_dir.path} has no tensor {name!r}; it has {", ".join(self.names)}')

  def params(self, step: int, placement: Any = None) -> Any:
    """Returns the parameters of a step.

    Args:
      step: which.
      placement: None for a dict by name of NumPy arrays; or a tree of jax.ShapeDtypeStruct with
        shardings, such as `Build.params`, for a tree of arrays on those devices in its dtypes.
    """
    if placement is None:
      return {name: self.leaf(step, name) for name in self.names}
    def place(name, like):
      x = self.leaf(step, name).astype(like.dtype)
      return jax.make_array_from_callback(like.shape, like.sharding, lambda index: x[index])
    placed = [place(name, like) for name, like in zip(
        leaf_names(placement), jax.tree.leaves(placement), strict=True)]
    return jax.tree.unflatten(jax.tree.structure(placement), placed)

  def scores(self) -> pa.Table:
    """Returns step, tokens, item, both log-probabilities, family, dataset, seed and more.

    An empty table without columns if the run was not monitored.
    """
    return score_table(self.run_dir.monitor_items, self.run_dir.monitor_scores, self.steps,
                       self.tokens)

  @functools.cached_property
  def source(self) -> Source:
    """The data that the run was trained on, edits of a counterfactual included.

    Raises UserError where they are gone or have changed since.
    """
    return trained_on(self._original)

  @functools.cached_property
  def _original(self) -> Original:
    return Original(self.run_dir, self.config, self.manifest)

  def documents(self, first: int, last: int) -> Iterator[dict[str, Any]]:
    """Returns what took the state of `first` to that of `last`, see `windows.document_rows`.

    Raises:
      UserError: no such steps, or the data are not those that the run was trained on.
    """
    check_range(self._original, first, last, 'documents')
    return document_rows(self.source, self.config.data.batch_size, first, last)

  def file_of(self, step: int, name: str) -> pathlib.Path:
    """Returns the file or folder that holds a tensor."""
    return self._series(step).file_of(step, name)

  def recorded(self, step: int, name: str) -> str:
    """Returns the hash that was recorded when the tensor was written."""
    return self._series(step).recorded(step, name)


def _open_run(location: str) -> RunTrajectory | None:
  """Returns the checkpoints of a run of ours."""
  run_dir = RunDir(location)
  return RunTrajectory(run_dir) if run_dir.manifest_json.exists() else None


def _open_monitored(location: str) -> PublicTrajectory | None:
  """Returns the series of which a run directory has the scores."""
  run_dir = RunDir(location)
  if not run_dir.manifest_json.exists():
    return None
  series = json.loads(run_dir.manifest_json.read_text(encoding='utf-8')).get('series')
  return PublicTrajectory(series['source'], series['pattern'], run_dir) if series else None


# Each returns a trajectory, or None for what is not of its kind; the first that knows it has it.
OPENERS: list[Callable[[str], Trajectory | None]] = [_open_monitored, _open_run, find_series]


def open_trajectory(location: str | pathlib.Path) -> Trajectory:
  """Returns the trajectory at a location.

  Args:
    location: the directory of a run; or a public series: a folder of revisions or
      owner/repository, either with @ and a pattern that the revisions' names match; or the run
      directory into which a series was monitored, for its scores too.

  Raises:
    UserError: there is none, or it has no checkpoint.
  """
  for opener in OPENERS:
    trajectory = opener(str(location))
    if trajectory is not None:
      if not trajectory.steps:
        raise UserError(f'{location} has neither snapshots nor checkpoints yet')
      return trajectory
  raise UserError(f'{location} is no trajectory: a run directory has a manifest.json, a '
                  'public series a folder with a config.json for every step, such as step1000')
