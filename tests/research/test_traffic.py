"""Bytes that the TPU compiler's program of a step sends, against the least by arithmetic.

Shards have 128 lanes or more, so that padding of tiles is none. The TPUs are v5e:2x4, and where
all of a larger slice gathers and scatters together v5e:4x4 and v5p:4x4x4.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from models.config import ModelConfig, MoEConfig
from parallelism import storage
from parallelism.collectives import wire_bytes
from parallelism.mesh import MeshConfig
from parallelism.sharding import path_name
from parallelism.topologies import compile_only_mesh
from research import build as build_lib
from research.config import ExperimentConfig
from research.data.config import DataConfig
from research.training.config import ComputeConfig
from research.training.preflight import Preflight, lowered_step, preflight
from research.training import preflight as preflight_lib
from research.training.traffic import least_bytes

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

TOPOLOGY = 'v5e:2x4'
LENGTH, ROWS, D = 2048, 16, 2048
MODEL = ModelConfig(
    vocab_size=8192, context_length=LENGTH, n_layers=4, d_model=D, n_heads=16, n_kv_heads=8,
    d_head=128, d_ff=8192, tie_embeddings=False, compute_dtype='bfloat16', remat='full')
EXPERTS = dataclasses.replace(MODEL, moe=MoEConfig(n_experts=8, d_expert=2048))
SLOTS = dataclasses.replace(MODEL, moe=MoEConfig(n_experts=8, d_expert=2048, capacity_factor=1.25))
SLIDING = dataclasses.replace(MODEL, layer_pattern=('sliding', 'full'), window=300)
TIED = dataclasses.replace(MODEL, tie_embeddings=True, remat='none')


def config_of(compute: dict[str, Any] = {}, model: ModelConfig = MODEL, **axes: int
              ) -> ExperimentConfig:
  return ExperimentConfig(
      name='traffic', n_steps=10, model=model, mesh=MeshConfig(**{'data': 1, **axes}),
      data=DataConfig(sequence_length=LENGTH, batch_size=ROWS), compute=ComputeConfig(**compute))


CASES = {
    'fsdp': config_of(fsdp=8),
    'data and fsdp': config_of(data=2, fsdp=4),
    'micro-batches': config_of({'microbatch_tokens': LENGTH}, fsdp=8),
    'tokens over tensor': config_of(fsdp=4, tensor=2),
    'whole tokens': config_of({'sequence': False}, fsdp=2, tensor=4),
    'ring': config_of(context=4, fsdp=2),
    'ring with windows': config_of(context=4, fsdp=2, model=SLIDING),
    'heads for tokens': config_of({'context': 'all_to_all'}, context=4, fsdp=2),
    'dropless experts': config_of(expert=4, fsdp=2, model=EXPERTS),
    'slots of experts': config_of(expert=4, fsdp=2, model=SLOTS),
    'pipeline': config_of(stage=2, fsdp=2, tensor=2),
    'interleaved pipeline': config_of(
        {'pipeline': 'interleaved', 'pipeline_chunks': 2}, stage=2, fsdp=4),
    'once a step': config_of({'gather': 'step'}, fsdp=8),
    'sums in bfloat16': config_of({'reduce_dtype': 'bfloat16'}, fsdp=8),
    'tied embeddings, activations kept': config_of(data=2, fsdp=2, tensor=2, model=TIED),
}
QUICK = ('tokens over tensor', 'dropless experts')


def excess(found: Preflight) -> list[str]:
  """Returns what is sent beyond 1.1 of the least; of the sum also if it is below 0.99 of it.

  What need not be sent at all, or is less than a percent of all, counts in the sum alone: gathers
  and scatters over two devices, or parts of them over some, the compiler makes of permutes.
  """
  total = sum(row.least for row in found.collectives)
  rows = [(f'{row.kind} over {"+".join(row.axes)}', row.sent, row.least, 0.0)
          for row in found.collectives if row.least > total / 100]
  rows.append(('all', sum(row.sent for row in found.collectives), total, 0.99 * total))
  return [f'{name}: {sent:.4g} of {least:.4g}' for name, sent, least, bound in rows
          if not bound <= sent <= 1.1 * least]


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES])
def test_no_more_is_sent_than_has_to_be(name):
  found = preflight(CASES[name], TOPOLOGY)
  assert found.fits and found.host_transfers == 0
  assert not excess(found)


@pytest.mark.slow
@pytest.mark.parametrize('topology, fsdp', [('v5p:2x2x2', 8), ('v5e:4x4', 16), ('v5p:4x4x4', 64)])
def test_no_more_is_sent_over_the_whole_of_a_torus(topology, fsdp):
  """There one collective over all would be an all-reduce, which sends twice as much."""
  wide = dataclasses.replace(MODEL, d_model=128 * fsdp, n_layers=2)
  config = config_of(fsdp=fsdp, model=wide)
  config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=fsdp))
  assert not excess(preflight(config, topology))


def redundant_step(config: ExperimentConfig, topology: str, n_slices: int):
  """Returns the step with every parameter gathered twice, lowered."""
  once = storage.Storage.gathered

  def twice(self, params, names, without=()):
    more = once(self, jax.tree.map(lambda x: x * 0.5, params), names, without)
    return jax.tree.map(jnp.add, once(self, params, names, without), more)
  storage.Storage.gathered = twice
  return lowered_step(config, topology, n_slices)


def test_a_redundant_gather_is_found(monkeypatch):
  monkeypatch.setattr(preflight_lib, 'lowered_step', redundant_step)
  assert any('all-gather over fsdp' in line
             for line in excess(preflight(CASES['tokens over tensor'], TOPOLOGY)))


def test_the_least_of_fsdp_is_the_closed_form():
  """A gather in forward and one in backward in 2 bytes, a scatter in 4; ends once; all 7/8."""
  blocks = 4 * (2 * D * 128 * (16 + 8) + 3 * D * 8192)
  ends, vectors = 2 * 8192 * D, (2 * 4 + 1) * D
  sizes = {'data': 1, 'stage': 1, 'fsdp': 8, 'expert': 1, 'context': 1, 'tensor': 1}
  least = least_bytes(CASES['fsdp'], sizes, 1)
  assert least == {
      ('all-gather', ('fsdp',)): 7 / 8 * (
          2 * (2 * blocks + ends) + 4 * (2 * vectors - D)),
      ('reduce-scatter', ('fsdp',)): 7 / 8 * 4 * (blocks + ends + vectors)}


def test_the_least_over_tensor_is_the_closed_form():
  """Per layer six gathers and five scatters of the residual stream, plus those of the ends."""
  sizes = {'data': 1, 'stage': 1, 'fsdp': 4, 'expert': 1, 'context': 1, 'tensor': 2}
  least = least_bytes(CASES['tokens over tensor'], sizes, 1)
  residual = ROWS // 4 * LENGTH * D * 2
  assert least['all-gather', ('tensor',)] == residual / 2 * (4 * 6 + 2)
  assert least['reduce-scatter', ('tensor',)] == residual / 2 * (4 * 5 + 2)
  logits = wire_bytes('all-reduce', 3 * 4 * ROWS // 4 * LENGTH, 2)
  norms = wire_bytes('all-reduce', 4 * 9 * D / 4, 2)
  assert least['all-reduce', ('tensor',)] == logits + norms


@pytest.mark.parametrize('name', CASES)
def test_no_moments_of_matrices_are_replicated(name):
  config = CASES[name]
  built = build_lib.build(config, compile_only_mesh(TOPOLOGY, config.mesh), {})
  share = built.mesh.size // built.mesh.shape['data']
  for path, leaf in jax.tree.leaves_with_path(built.abstract_state.optimizer):
    names = path_name(path)
    if leaf.ndim >= 3 and 'router' not in names:  # matrices stacked over layers
      parts = math.prod(leaf.shape) // math.prod(leaf.sharding.shard_shape(leaf.shape))
      assert parts == share, names
