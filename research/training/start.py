"""Where a run's parameters come from: initialization, or a checkpoint of another run.

Where a step has no full checkpoint its snapshot serves; it has parameters alone, in its dtype.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp

from models import transformer
from parallelism.sharding import path_name
from research import config as config_lib
from research.build import Build
from research.config import ExperimentConfig
from research.data import tokenizers
from research.data.tokenizers import Tokenizer
from research.errors import UserError
from research.run_dir import RunDir
from research.training.checkpoints import Checkpoints
from research.training.snapshots import SnapshotReader, cast
from research.training.step import State


def find_parent(config: ExperimentConfig, tokenizer: Tokenizer) -> dict[str, Any] | None:
  """Returns the parent's run directory and step, or None for a run that initializes.

  For a start from a snapshot it also has `snapshot`, the dtype in which that is stored.

  Raises:
    UserError: the directory is no run, has no such checkpoint or snapshot, another tokenizer, or
      parameters of other shapes.
  """
  if not config.start.run_dir:
    return None
  run_dir = RunDir(config.start.run_dir)
  if not run_dir.manifest_json.exists():
    raise UserError(f'start.run_dir={config.start.run_dir} is not a run directory: it has no '
                    'manifest.json')
  manifest = json.loads(run_dir.manifest_json.read_text(encoding='utf-8'))
  if manifest['hashes']['tokenizer'] != tokenizer.hash:
    raise UserError(f'start.run_dir={config.start.run_dir} was trained with another tokenizer '
                    f'({manifest["hashes"]["tokenizer"][:12]}, here {tokenizer.hash[:12]})')
  if config.start.optimizer and 'imported' in manifest:
    raise UserError(f'start.optimizer: {config.start.run_dir} was imported from '
                    f'{manifest["imported"]["source"]}, which has no optimizer state')
  _check_shapes(config, config_lib.from_json(run_dir.config_json.read_text(encoding='utf-8')))
  steps = _steps(run_dir)
  step = steps[-1] if steps and config.start.step == -1 else config.start.step
  parent = {'run_dir': str(run_dir.whole.resolve()), 'step': step}
  if step not in steps:
    parent['snapshot'] = _snapshot_dtype(config, run_dir, step, steps)
  if config.start.optimizer and 'derived' in manifest:
    raise UserError(f'start.optimizer: {config.start.run_dir} was made from other checkpoints and has '
                    'no optimizer state; set --config.start.optimizer=false')
  return parent


def check_begun(run_dir: RunDir) -> None:
  """Raises UserError for a run that has to begin again from a step that its parent has lost.

  It has no checkpoint yet; once it has one it needs its parent no more.
  """
  manifest = json.loads(run_dir.manifest_json.read_text(encoding='utf-8'))
  parent = manifest.get('parent')
  if not parent or manifest.get('replay') or run_dir.done.exists() or _steps(run_dir):
    return
  theirs = RunDir(parent['run_dir'])
  left = sorted({*_steps(theirs), *SnapshotReader(theirs.snapshots).steps})
  there = SnapshotReader(theirs.snapshots).steps if 'snapshot' in parent else _steps(theirs)
  if parent['step'] not in there:
    near = sorted(left, key=lambda step: abs(step - parent['step']))[:2]
    raise UserError(
        f'{run_dir.whole} was stopped before its first checkpoint, and the checkpoint of step '
        f'{parent["step"]} from which it began is no longer in {parent["run_dir"]}; move '
        f'{run_dir.whole} away and begin anew (nearest checkpoints and snapshots: {near}); a parent '
        'keeps all its checkpoints with --config.checkpoints.keep=0')


def _snapshot_dtype(config: ExperimentConfig, run_dir: RunDir, step: int, steps: list[int]) -> str:
  """Returns the dtype of the snapshot of a step; raises UserError where it cannot serve."""
  snapshots = SnapshotReader(run_dir.snapshots).commits
  if step not in snapshots:
    near = sorted({*snapshots, *steps}, key=lambda other: abs(other - step))[:2]
    raise UserError(f'start.step={config.start.step}: {config.start.run_dir} has checkpoints of '
                    f'steps {steps} and {len(snapshots)} snapshots; the nearest are of {near}')
  if config.start.optimizer:
    raise UserError(f'start.optimizer: of step {step} {config.start.run_dir} has a snapshot, which '
                    f'has no optimizer state; it has checkpoints of steps {steps}')
  return snapshots[step]['dtype']


def _steps(run_dir: RunDir) -> list[int]:
  if not run_dir.checkpoints.exists():
    return []
  checkpoints = Checkpoints(run_dir.checkpoints)
  steps = checkpoints.steps
  checkpoints.close()
  return steps


def _check_shapes(config: ExperimentConfig, parent: ExperimentConfig) -> None:
  def shapes(model):
    leaves = jax.tree.leaves_with_path(transformer.abstract_params(model))
    return {path_name(path): leaf.shape for path, leaf in leaves}
  ours, theirs = shapes(config.model), shapes(parent.model)
  for name in sorted(ours.keys() | theirs.keys()):
    if ours.get(name) != theirs.get(name):
      raise UserError(f'start.run_dir={config.start.run_dir}: parameter {name} is '
                      f'{theirs.get(name)} there and {ours.get(name)} here; give both runs the same '
                      'model')


def parent_facts(checkpoints: Checkpoints, restored: int | None, parent: dict[str, Any] | None
                 ) -> dict[str, Any] | None:
  """Returns run directory ('': this run), step and hash of the checkpoint that a start goes on from.

  The hash is '' for one that has none, the whole None for a run that initializes.

  Args:
    checkpoints: of the run itself.
    restored: the step that it resumes from, or None.
    parent: the run that its first start began from, or None.
  """
  if restored is not None:
    return {'run_dir': '', 'step': restored, 'hash': checkpoints.record(restored).get('hash', '')}
  if parent is None:
    return None
  if 'snapshot' in parent:
    line = SnapshotReader(RunDir(parent['run_dir']).snapshots).commits[parent['step']]
    return {**parent, 'hash': line.get('hash', '')}
  theirs = Checkpoints(RunDir(parent['run_dir']).checkpoints)
  known = parent['step'] in theirs.steps  # A replay may begin from a run's initialization.
  hashed = theirs.record(parent['step']).get('hash', '') if known else ''
  theirs.close()
  return {**parent, 'hash': hashed}


def first_state(built: Build, config: ExperimentConfig, parent: dict[str, Any] | None) -> State:
  """Returns the state at step 0, with the parent's parameters where there is one.

  Raises:
    UserError: start.optimizer is set and the parent's optimizer state is of another kind.
  """
  state = built.init_state()
  if parent is None:
    return state
  if 'snapshot' in parent:
    stored = SnapshotReader(RunDir(parent['run_dir']).snapshots).params(
        parent['step'], built.params)
    return _with_params(state, cast(built.place_params(stored), 'float32'))
  checkpoints = Checkpoints(RunDir(parent['run_dir']).checkpoints)
  params = checkpoints.restore_params(parent['step'], built.params)
  optimizer = state.optimizer
  if config.start.optimizer:
    saved = config_lib.from_json(
        RunDir(parent['run_dir']).config_json.read_text(encoding='utf-8')).optimizer
    if (saved.name, saved.moment_dtype) != (config.optimizer.name, config.optimizer.moment_dtype):
      raise UserError(f'start.optimizer: the parent used {saved.name} with {saved.moment_dtype} '
                      f'moments, this run uses {config.optimizer.name} with '
                      f'{config.optimizer.moment_dtype}')
    optimizer = checkpoints.restore_optimizer(parent['step'], built.abstract_state.optimizer)
  checkpoints.close()
  return _with_params(state, params)._replace(optimizer=optimizer)


def _with_params(state: State, params: Any) -> State:
  return state._replace(params=params, ema=jax.tree.map(jnp.copy, params) if state.ema else {})


def continued(config: ExperimentConfig, init_from: str) -> ExperimentConfig:
  """Returns the experiment with model, tokenizer and first parameters of another run.

  Rows are cut to the parent's context. Of an SFT experiment, conversations begin with the token
  that began the parent's documents.

  Args:
    config: the experiment.
    init_from: 'RUN_DIR@STEP', or 'RUN_DIR' for its last checkpoint; '' changes nothing.

  Raises:
    UserError: the directory is no run, or STEP is no number.
  """
  if not init_from:
    return config
  path, at, text = init_from.rpartition('@')
  path, text = (path, text) if at else (init_from, '-1')
  run_dir = RunDir(path)
  if not text.removeprefix('-').isdecimal():
    raise UserError(f'--init_from={init_from}: {text!r} is no step; write RUN_DIR@STEP')
  if not run_dir.manifest_json.exists():
    raise UserError(f'--init_from={init_from}: {path} is not a run directory, it has no '
                    'manifest.json')
  parent = config_lib.from_json(run_dir.config_json.read_text(encoding='utf-8'))
  manifest = json.loads(run_dir.manifest_json.read_text(encoding='utf-8'))
  data = dataclasses.replace(config.data, sequence_length=min(
      config.data.sequence_length, parent.model.context_length))
  if data.kind != 'microworld':  # which has its own words
    tokenizer = tokenizers.load(run_dir.tokenizer_json)
    more = {'tokenizer': str(run_dir.tokenizer_json)}
    if data.kind == 'sft':
      more['begins_with'] = _begins_with(tokenizer, manifest['start_id'])
    data = dataclasses.replace(
        data, **{data.kind: dataclasses.replace(getattr(data, data.kind), **more)})
  return dataclasses.replace(config, model=parent.model, data=data, start=dataclasses.replace(
      config.start, run_dir=path, step=int(text)))


def _begins_with(tokenizer: Tokenizer, start_id: int | None) -> str:
  """Returns the value of data.sft.begins_with for a token before documents."""
  names = {tokenizer.bos_id: 'bos', tokenizer.eos_id: 'eos', None: 'none'}
  if start_id not in names:
    raise UserError(f'token {start_id} began the documents of the parent, but its tokenizer names it '
                    'neither bos nor eos; put its tokenizer_config.json beside its tokenizer.json')
  return names[start_id]
