"""A short real run, trained once, that tests copy."""

import dataclasses
import shutil

import jax
from jax.experimental.compilation_cache.compilation_cache import reset_cache
import pytest

from experiments import quickstart
from parallelism.mesh import MeshConfig
from research import overrides
from research.run_dir import RunDir
from research.training.loop import train

SHORT = {
    'n_steps': '30', 'seed': '3', 'model.d_model': '32', 'model.d_ff': '64', 'model.n_heads': '2',
    'model.n_kv_heads': '2', 'model.n_layers': '1', 'data.batch_size': '8',
    'optimizer.ema_decay': '0.9', 'checkpoints.every': '10', 'checkpoints.keep': '0',
    'checkpoints.snapshot_every': '1', 'monitors.suite': 'none', 'evals.every': '0',
    'logging.tensorboard': 'false'}


def short_config(**more: str):
  config = overrides.apply(quickstart.get_config(), [*SHORT.items(), *more.items()])
  return dataclasses.replace(config, mesh=MeshConfig(data=8))


@pytest.fixture(scope='session')
def trained(tmp_path_factory) -> RunDir:
  """A finished run of 30 steps with 31 snapshots and three checkpoints; not to be changed."""
  run_dir = RunDir(tmp_path_factory.mktemp('short') / 'run')
  before = jax.config.read('jax_disable_most_optimizations')
  jax.config.update('jax_disable_most_optimizations', True)
  train(short_config(), run_dir)
  jax.config.update('jax_disable_most_optimizations', before)
  return run_dir


@pytest.fixture
def short_run(trained, tmp_path) -> RunDir:
  """A copy of the short run that a test may damage."""
  shutil.copytree(trained.path, tmp_path / 'run')
  return RunDir(tmp_path / 'run')


@pytest.fixture(scope='module')
def compilation_cache(tmp_path_factory):
  """Programs that are the same in all runs of a file are compiled once."""
  names = {'jax_compilation_cache_dir': str(tmp_path_factory.mktemp('xla')),
           'jax_persistent_cache_min_compile_time_secs': 0}
  before = {name: getattr(jax.config, name) for name in names}
  for name, value in names.items():
    jax.config.update(name, value)
  yield
  for name, value in before.items():
    jax.config.update(name, value)
  reset_cache()
