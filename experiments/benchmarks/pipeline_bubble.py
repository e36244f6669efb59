"""States the idle share of pipelines: what each stage ran at each tick, with measured times.

  python -m experiments.benchmarks.pipeline_bubble --stages=2,4 --microbatches_per_stage=1,2,8

The production step runs once on as many fake CPU devices as stages; counters inside the branches
say which stage ran a forward or a backward at which tick. One stage's forward and backward (which
runs the forward again) of a micro-batch are timed alone on one device, in the same process, the
median of --rounds. `measured` is the idle share that follows when stages wait for their neighbors
only; `formula` is (S - 1) / (M + S - 1), with C chunks of layers (S - 1) / (C M + S - 1). The
paired ticks of interleaved 1F1B begin their backwards later than the published schedule does.
"""

import dataclasses
import json
import statistics
import time

from absl import flags
import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import command_line
from experiments.benchmarks.estimates import machine, table
from models import transformer
from models.config import ModelConfig
from parallelism import schedules
from parallelism.mesh import MeshConfig, make_mesh
from research.build import Build, build
from research.config import ExperimentConfig
from research.data.config import DataConfig
from research.training.config import ComputeConfig

STAGES = flags.DEFINE_list('stages', ['2', '4'], 'numbers of stages S')
PER_STAGE = flags.DEFINE_list('microbatches_per_stage', ['1', '2', '8'], 'micro-batches M / S')
ROUNDS = flags.DEFINE_integer('rounds', 9, 'timings of a forward and of a backward')
JSON = flags.DEFINE_string('json', '', 'file for the same as JSON')

LENGTH, ROWS = 128, 2  # of a micro-batch
LAYERS_PER_STAGE = 2
MODEL = ModelConfig(vocab_size=256, context_length=LENGTH, d_model=128, d_ff=512, n_heads=4,
                    n_kv_heads=4, d_head=32)


def built_for(pipeline: str, S: int, M: int, C: int) -> Build:
  """Returns the production build of a pipeline of S stages, M micro-batches, C chunks."""
  config = ExperimentConfig(
      model=dataclasses.replace(MODEL, n_layers=LAYERS_PER_STAGE * S),
      mesh=MeshConfig(data=1, stage=S), data=DataConfig(sequence_length=LENGTH, batch_size=ROWS * M),
      compute=ComputeConfig(pipeline=pipeline, pipeline_chunks=C,
                            microbatch_tokens=ROWS * LENGTH))
  return build(config, make_mesh(config.mesh), {})


def what_ran(built: Build) -> np.ndarray:
  """Returns the forwards and backwards that ran, int32 [ticks, stages, 2]."""
  shape = built.config.data.batch_size, LENGTH
  batch = built.place_batch({
      'tokens': np.ones(shape, np.int32), 'targets': np.ones(shape, np.int32),
      'segment_ids': np.ones(shape, np.int32), 'loss_mask': np.ones(shape, np.float32),
      'positions': np.tile(np.arange(LENGTH, dtype=np.int32), (shape[0], 1))})
  totals = built.in_mesh(jax.jit(built.pipelined_totals()))
  key = jax.random.key_data(jax.random.key(0))
  return np.asarray(totals(built.init_state().params, batch, key, jnp.float32(1))[1])


def stage_seconds(rounds: int) -> tuple[float, float]:
  """Returns the median times of a stage's forward and backward of one micro-batch."""
  config = dataclasses.replace(MODEL, n_layers=LAYERS_PER_STAGE)
  graphdef = transformer.build(config)
  params = transformer.init(config, 0)
  x_BLD = jax.random.normal(jax.random.key(0), (ROWS, LENGTH, MODEL.d_model))

  def stage(params, x_BLD):
    model = transformer.apply(graphdef, params)
    return model.through_blocks(x_BLD, np.arange(LENGTH), model.own_row(None))[0]

  def backward(params, x_BLD):
    y_BLD, vjp = jax.vjp(stage, params, x_BLD)
    return vjp(y_BLD)

  def median(function) -> float:
    function = jax.jit(function)
    jax.block_until_ready(function(params, x_BLD))
    seconds = []
    for _ in range(rounds):
      start = time.perf_counter()
      jax.block_until_ready(function(params, x_BLD))
      seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
  return median(stage), median(backward)


def record(pipeline: str, S: int, M: int, C: int, forward: float, backward: float) -> dict:
  """Returns what a schedule ran and its idle share."""
  planned = schedules.schedule(pipeline, S, M, C)
  ran = what_ran(built_for(pipeline, S, M, C))
  halves = np.stack([planned.forward, planned.backward], axis=2)[..., 0] != schedules.IDLE
  counted = dataclasses.replace(
      planned, forward=np.where(ran[..., :1] > 0, 0, schedules.IDLE),
      backward=np.where(ran[..., 1:] > 0, 0, schedules.IDLE))
  return {'schedule': pipeline, 'stages': S, 'microbatches': M, 'chunks': C,
          'ticks': planned.n_ticks, 'forwards': int(ran[..., 0].sum()),
          'backwards': int(ran[..., 1].sum()), 'as_planned': bool((ran == halves).all()),
          'stored_inputs': schedules.slots(planned).n_slots,
          'measured': schedules.bubble(counted, forward, backward),
          'formula': (S - 1) / (C * M + S - 1)}


def main() -> None:
  stages = command_line.positive_numbers(STAGES)
  jax.config.update('jax_num_cpu_devices', max(stages))
  forward, backward = stage_seconds(ROUNDS.value)
  print(machine())
  print(f'a stage: forward {forward * 1e3:.2f} ms, backward {backward * 1e3:.2f} ms')
  records = []
  for S in stages:
    for per_stage in command_line.positive_numbers(PER_STAGE):
      for pipeline, C in (('gpipe', 1), ('1f1b', 1), ('interleaved', 2)):
        records.append(record(pipeline, S, per_stage * S, C, forward, backward))
        print(f'{len(records)}: {pipeline}, {S} stages, {per_stage * S} micro-batches', flush=True)
  print(table(list(records[0]), [
      [f'{value:.3f}' if isinstance(value, float) else str(value) for value in row.values()]
      for row in records]))
  if JSON.value:
    with open(JSON.value, 'w', encoding='utf-8') as file:
      json.dump({'forward': forward, 'backward': backward, 'rows': records}, file, indent=2)


if __name__ == '__main__':
  command_line.run(main)
