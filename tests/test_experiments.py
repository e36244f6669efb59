"""Every experiment is imported, built and shape-evaluated; its settings stand in a golden file.

A changed default shows here. Update the golden files with
`python -m tests.test_experiments` after reading what changed.
"""

import dataclasses
import importlib
import math
import pathlib
import sys

import jax
import pytest

from launchers import flags
from models import transformer
from models.counting import flops_per_token, parameter_counts
from parallelism.mesh import MeshConfig, make_mesh
from parallelism.sharding import path_name
from parallelism.topologies import compile_only_mesh
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


# What model cards and papers say, in billions or exactly: all parameters, those of a token, and the
# slice that the experiment's header names.
PUBLISHED = {
    'llama3_8b': (8_030_261_248, 8_030_261_248, 'v5p:4x4x4'),
    'llama3_8b_128k': (8_030_261_248, 8_030_261_248, 'v5p:4x4x4'),
    'llama3_70b': (70_553_706_496, 70_553_706_496, 'v5p:8x8x8'),
    'qwen3_30b_a3b': (30.5, 3.3, 'v5p:4x4x4'),
    'olmo3_7b': (7.3, 7.3, 'v5p:4x4x4'),
    'olmo3_32b': (32.2, 32.2, 'v5p:8x8x8'),
}


def agrees(count: int, published: float) -> bool:
  """Whether a count is the published one; the others round to a tenth, Qwen cuts off after it."""
  tenths = round(count / 1e8) / 10, count // 10**8 / 10
  return count == published if isinstance(published, int) else published in tenths


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_shapes_have_the_published_number_of_parameters(name):
  total, active, _ = PUBLISHED[name]
  config = flags.load_experiment(name).model
  counts = parameter_counts(config)
  assert agrees(counts.total, total) and agrees(counts.active, active)
  header = importlib.import_module(f'experiments.{name}').__doc__
  assert f'{counts.total:,} parameters' in header


@pytest.mark.parametrize('name, d_model', [('olmo3_7b', 4096), ('olmo3_32b', 5120)])
def test_padding_of_the_vocabulary_is_what_the_header_says(name, d_model):
  model = flags.load_experiment(name).model
  unpadded = parameter_counts(dataclasses.replace(model, vocab_size=100_278))
  extra = parameter_counts(model).total - unpadded.total
  assert extra == 2 * (100_352 - 100_278) * d_model
  assert f'{extra:,} parameters more' in importlib.import_module(f'experiments.{name}').__doc__
  assert model.layer_kinds[-1] == 'full' and model.layer_kinds.count('full') == model.n_layers // 4


@pytest.mark.parametrize('name', PUBLISHED)
def test_published_shapes_build_on_the_slice_of_their_header(name):
  pytest.importorskip('libtpu')
  config, topology = flags.load_experiment(name), PUBLISHED[name][2]
  module = importlib.import_module(f'experiments.{name}')
  mesh = compile_only_mesh(topology, config.mesh)
  assert f'{topology} slice ({mesh.size} chips' in module.__doc__
  built = build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))
  sharded = sum(math.prod(leaf.sharding.shard_shape(leaf.shape))
                for leaf in jax.tree.leaves(built.params))
  # All but the norms are split over all chips, evenly.
  assert sharded < 1.01 * parameter_counts(config.model).total / mesh.size
  tokens = config.n_steps * config.data.batch_size * config.data.sequence_length
  assert f'{tokens / 1e9:,.0f}B tokens' in module.__doc__
  flops = flops_per_token(config.model, config.data.sequence_length)
  assert f'{flops / 1e9:.3g} GFLOP per token' in module.__doc__
  assert f'{flops * tokens:.1e}'.replace('+', '') + ' FLOP' in module.__doc__


if __name__ == '__main__':
  for experiment in RUNS:
    (GOLDEN / f'{experiment}.txt').write_text(golden_text(experiment), encoding='utf-8')
    print(f'wrote {GOLDEN / experiment}.txt', file=sys.stderr)
