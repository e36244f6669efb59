"""Where a run's parameters come from: initialization, or a checkpoint of another run."""

import json
from typing import Any

import jax
import jax.numpy as jnp

from models import transformer
from parallelism.sharding import path_name
from research import config as config_lib
from research.build import Build
from research.config import ExperimentConfig
from research.data.tokenizers import Tokenizer
from research.errors import UserError
from research.run_dir import RunDir
from research.training.checkpoints import Checkpoints
from research.training.step import State


def find_parent(config: ExperimentConfig, tokenizer: Tokenizer) -> dict[str, Any] | None:
  """Returns the parent's run directory and step, or None for a run that initializes.

  Raises:
    UserError: the directory is no run, has no such checkpoint, another tokenizer, or parameters
      of other shapes.
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
  if step not in steps:
    raise UserError(f'start.step={config.start.step}: {config.start.run_dir} has checkpoints of '
                    f'steps {steps}')
  if config.start.optimizer and 'derived' in manifest:
    raise UserError(f'start.optimizer: {config.start.run_dir} was made from other checkpoints and has '
                    'no optimizer state; set --config.start.optimizer=false')
  return {'run_dir': str(run_dir.whole.resolve()), 'step': step}


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
  ema = jax.tree.map(jnp.copy, params) if state.ema else {}
  return state._replace(params=params, optimizer=optimizer, ema=ema)
