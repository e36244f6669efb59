"""Run directories that no training made: a point between checkpoints, to be scored and sampled.

Such a directory has config, manifest, tokenizer and monitor items of the run it comes from, one
snapshot and one checkpoint of parameters alone, and DONE. `launchers.score` and `launchers.sample`
read it, and `start.run_dir` trains on from it.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import itertools
import json
import os
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from research import config as config_lib
from research.dynamics.trajectory import RunTrajectory, Trajectory
from research.errors import UserError
from research.run_dir import RunDir, write_whole
from research.training import hashes
from research.training.checkpoints import Checkpoints
from research.training.provenance import Chain, Window
from research.training.snapshots import SnapshotWriter, leaf_names


def write_derived(target: RunDir, trajectory: RunTrajectory, tensors: Iterator[tuple[str, np.ndarray]],
                  made_by: dict[str, Any]) -> None:
  """Writes parameters as a run directory, whole or not at all; only the result is in memory whole.

  Args:
    target: the new directory.
    trajectory: of the run that the checkpoints are from.
    tensors: (name, float32 array) of each parameter.
    made_by: what was done: `steps` of that run (the last is the new one's), and how.

  Raises:
    UserError: the target exists and is not empty, or parameters are missing.
  """
  check_target(target)
  unfinished = RunDir(target.path.with_name(target.path.name + '.unfinished'))
  if unfinished.path.exists():  # Of a process that was interrupted.
    shutil.rmtree(unfinished.path)
  _write(unfinished, trajectory, tensors, made_by)
  os.replace(unfinished.path, target.path)


def _write(target: RunDir, trajectory: RunTrajectory, tensors: Iterator[tuple[str, np.ndarray]],
           made_by: dict[str, Any]) -> None:
  """Writes what `write_derived` says into a directory that is renamed when it is whole."""
  config = trajectory.config
  config = dataclasses.replace(config, checkpoints=dataclasses.replace(
      config.checkpoints, snapshot_dtype='float32'))
  step = made_by['steps'][-1]
  abstract = transformer.abstract_params(config.model)
  read = {name: jnp.asarray(x) for name, x in tensors}
  missing = [name for name in leaf_names(abstract) if name not in read]
  if missing:
    raise UserError(f'{trajectory.run_dir.path} has no parameter {missing[0]}')
  params = jax.tree.unflatten(jax.tree.structure(abstract),
                              [read[name] for name in leaf_names(abstract)])
  _write_records(target, trajectory, config, made_by)
  snapshots = SnapshotWriter(target.snapshots, abstract, 'float32', -1)
  snapshots.write(step, params, hashes.digests(params))
  snapshots.close()
  position = {'step': step, 'tokens': trajectory.tokens(step) or 0}
  origin = {'run_dir': str(trajectory.run_dir.path.resolve()), 'step': step, 'hash': ''}
  chain = Chain(config, trajectory.manifest['hashes'], origin, Window(step, (), ()))
  checkpoints = Checkpoints(target.checkpoints)
  checkpoints.save_params(step, params, position,
                          chain.record(step, hashes.digests({'params': params}), position))
  checkpoints.close()
  write_whole(target.done, json.dumps({'step': step}) + '\n')


def check_target(target: RunDir) -> None:
  """Raises UserError where something is in the way of a new run directory."""
  if target.path.exists() and (not target.path.is_dir() or any(target.path.iterdir())):
    raise UserError(f'--to={target.path} is there already; choose a new directory')


def _write_records(target: RunDir, trajectory: RunTrajectory, config: Any, made_by: dict[str, Any]
                   ) -> None:
  source = trajectory.run_dir
  manifest = {**trajectory.manifest, 'starts': [], 'derived': {
      'run_dir': str(source.path.resolve()), **made_by}}
  write_whole(target.manifest_json, json.dumps(manifest, indent=2) + '\n')
  write_whole(target.config_json, config_lib.as_json(config))
  write_whole(target.config_txt, config_lib.as_text(config))
  for path in source.tokenizer_json.parent.glob('tokenizer*.json'):
    shutil.copy(path, target.tokenizer_json.with_name(path.name))
  if source.monitor_items.exists():
    target.monitors.mkdir()
    shutil.copy(source.monitor_items, target.monitor_items)


def chosen_steps(trajectory: Trajectory, steps: Sequence[str], last: int) -> list[int]:
  """Returns the steps that a command names, ascending, or the last so many of the trajectory.

  Raises:
    UserError: one is no number, not there or named twice, or there are fewer than two.
  """
  if steps:
    try:
      wanted = sorted(map(int, steps))
    except ValueError as error:
      raise UserError(f'--steps={",".join(steps)} must be whole numbers') from error
  else:
    wanted = trajectory.steps[-last:]
  missing = sorted(set(wanted) - set(trajectory.steps))
  if missing:
    near = min(trajectory.steps, key=lambda step: abs(step - missing[0]))
    raise UserError(f'--steps={missing[0]}: no such checkpoint in {trajectory.location}; the '
                    f'nearest is {near}')
  if len(set(wanted)) < len(wanted):
    twice = next(a for a, b in itertools.pairwise(wanted) if a == b)
    raise UserError(f'--steps names {twice} more than once; name every checkpoint once')
  if len(wanted) < 2:
    raise UserError(f'{len(wanted)} checkpoint is not enough; give two or more with --steps')
  return wanted
