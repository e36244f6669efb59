"""Every experiment is imported, built and shape-evaluated; its settings stand in a golden file.

A changed default shows here. Update the golden files with
`python -m tests.test_experiments` after reading what changed.
"""

import pathlib
import sys

import jax
import pytest

from launchers import flags
from models import transformer
from models.counting import parameter_counts
from parallelism.mesh import MeshConfig, make_mesh
from parallelism.sharding import path_name
from research import build as build_lib
from research import config as config_lib

GOLDEN = pathlib.Path(__file__).parent / 'golden'
# Not experiments: packages of another kind.
RUNS = [name for name in flags.experiment_names() if hasattr(
    __import__(f'experiments.{name}', fromlist=['x']), 'get_config')]
SWEEPS = [name for name in flags.experiment_names() if name not in RUNS]


def golden_text(name: str) -> str:
  """The flat settings and the parameter table of one experiment."""
  config = flags.load_experiment(name)
  leaves = jax.tree.leaves_with_path(transformer.abstract_params(config.model))
  rows = [f'{path_name(path)} {leaf.shape} {leaf.dtype}\n' for path, leaf in leaves]
  return config_lib.as_text(config) + '\n' + ''.join(rows)


@pytest.mark.parametrize('name', RUNS)
def test_settings_equal_the_golden_file(name):
  path = GOLDEN / f'{name}.txt'
  assert path.exists(), 'new experiment: run `python -m tests.test_experiments`'
  assert golden_text(name) == path.read_text(encoding='utf-8'), (
      'if this change is meant, run `python -m tests.test_experiments` and review the diff')


@pytest.mark.parametrize('name', RUNS)
def test_experiment_builds(name):
  config = flags.load_experiment(name)
  assert config.name == name
  mesh = make_mesh(MeshConfig(data=1))
  built = build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))
  sizes = sum(leaf.size for leaf in jax.tree.leaves(built.params))
  assert sizes == parameter_counts(config.model).total


@pytest.mark.parametrize('name', SWEEPS)
def test_sweep_members_differ_and_build(name):
  members = flags.load_sweep(name)
  texts = {config_lib.as_text(config) for config in members.values()}
  assert len(texts) == len(members) > 1
  for member, config in members.items():
    assert config.name == member
    assert flags.load_experiment(f'{name}/{member}') == config


if __name__ == '__main__':
  for experiment in RUNS:
    (GOLDEN / f'{experiment}.txt').write_text(golden_text(experiment), encoding='utf-8')
    print(f'wrote {GOLDEN / experiment}.txt', file=sys.stderr)
