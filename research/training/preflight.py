"""What a training step will take on TPUs that need not be there: compiled, measured, estimated."""

import dataclasses

import jax

from models.counting import flops_per_token
from parallelism import collectives, hlo_program, schedules
from parallelism.compile_only import Compiled, compile_apart
from parallelism.hardware import find_chip
from parallelism.network import Network
from parallelism.roofline import estimate
from parallelism.topologies import compile_only_mesh
from research import build as build_lib
from research.config import ExperimentConfig

BATCH = {'tokens': 'int32', 'targets': 'int32', 'segment_ids': 'int32', 'positions': 'int32',
         'loss_mask': 'float32'}


def lowered_step(config: ExperimentConfig, topology: str, n_slices: int = 1
                 ) -> jax.stages.Lowered:
  """Returns the train step that a run of the config executes, lowered for a TPU topology.

  Raises:
    ValueError: config, mesh and topology do not go together.
  """
  mesh = compile_only_mesh(topology, config.mesh, n_slices)
  built = build_lib.build(config, mesh, {})
  return built.in_mesh(built.jitted_step().lower)(built.abstract_state, abstract_batch(built))


def abstract_batch(built: build_lib.Build) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and shardings of a global batch."""
  shape = built.config.data.batch_size, built.config.data.sequence_length
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=built.batch_sharding)
          for name, dtype in BATCH.items()}
