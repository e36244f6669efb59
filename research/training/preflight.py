"""What a training step will take on TPUs that need not be there: compiled, counted, estimated."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

from models.counting import flops_per_token
from parallelism import hlo_program, pipeline, schedules
from parallelism.compile_only import Compiled, compile_apart
from parallelism.compiler_options import usable_bytes
from parallelism.hardware import find_chip
from parallelism.hlo_program import Block, Branch, BranchRuns
from parallelism.network import Network
from parallelism.roofline import Estimate, estimate
from parallelism.storage import STAGE
from parallelism.topologies import compile_only_mesh
from research import build as build_lib
from research.config import ExperimentConfig
from research.training import pipelined
from research.training.traffic import least_bytes

BATCH = {'tokens': 'int32', 'targets': 'int32', 'segment_ids': 'int32', 'positions': 'int32',
         'loss_mask': 'float32'}
SECONDS_PER_DAY = 86_400


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes of one device's HBM; arguments as the compiler lays them out, padding included.

  total is all that a step needs, left what remains of usable (negative where it does not fit),
  chip all that the chip has for the device.
  """

  parameters: int
  moments: int
  average: int
  batch: int
  padding: int
  temporaries: int
  total: int
  usable: int
  chip: int
  left: int


@dataclasses.dataclass(frozen=True)
class Sent:
  """Bytes that a device sends in a step by one kind of collective over some mesh axes."""

  kind: str
  axes: tuple[str, ...]
  sent: float
  least: float
  ratio: float | None  # None where nothing would have to be sent


@dataclasses.dataclass(frozen=True)
class Speed:
  """The roofline estimate of a step; seconds, FLOPs and bytes of one device.

  seconds follow the schedule and hold a pipeline's bubble (the share of the step that a stage
  idles); perfect_seconds are those of perfect overlap, bound by `bound`; busy the seconds for which
  each resource works, exposed the waits for collectives by mesh axes. MFU counts model FLOPs, of
  which the compiled program has `flops`; ceiling is their ratio.
  """

  seconds: float
  perfect_seconds: float
  bound: str
  busy: Mapping[str, float]
  exposed: Mapping[str, float]
  bubble: float
  flops: float
  model_flops: float
  hbm_bytes: float
  mfu: float
  mfu_ceiling: float
  tokens_per_day: float


@dataclasses.dataclass(frozen=True)
class Preflight:
  """What is known of a step before it runs.

  collectives and speed are those of the compiled program, none where the compiler left none; speed
  is None for several slices, too.
  """

  experiment: str
  topology: str
  n_slices: int
  mesh: dict[str, int]
  n_devices: int
  batch_size: int
  sequence_length: int
  n_micro: int
  compile_seconds: float
  code: bool
  fits: bool
  refusal: str
  memory: Memory
  collectives: tuple[Sent, ...]
  host_transfers: int
  speed: Speed | None


def lowered_step(config: ExperimentConfig, topology: str, n_slices: int = 1
                 ) -> jax.stages.Lowered:
  """Returns the train step that a run of the config executes, lowered for a TPU topology.

  Raises:
    ValueError: config, mesh and topology do not go together.
  """
  built = _built(config, topology, n_slices)
  return built.in_mesh(built.jitted_step().lower)(built.abstract_state, abstract_batch(built))


def _built(config: ExperimentConfig, topology: str, n_slices: int) -> build_lib.Build:
  """Returns the model bound to the mesh of a topology, all of whose devices it has to use."""
  mesh = compile_only_mesh(topology, config.mesh, n_slices)
  return build_lib.build(config, mesh, {})


def abstract_batch(built: build_lib.Build) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and shardings of a global batch."""
  shape = built.config.data.batch_size, built.config.data.sequence_length
  return {name: jax.ShapeDtypeStruct(shape, dtype, sharding=built.batch_sharding)
          for name, dtype in BATCH.items()}


def preflight(config: ExperimentConfig, topology: str, n_slices: int = 1, *, code: bool = False
              ) -> Preflight:
  """Returns what the step of a config takes on a topology.

  Args:
    config: the experiment; its mesh is laid over the topology.
    topology: such as 'v5p:4x4x4'.
    n_slices: how many of it; with several, bytes are counted but time is not estimated.
    code: whether the compiler generates code, too.

  Raises:
    ValueError: they do not go together, or libtpu does not know the topology.
    RuntimeError: the compiler fails for a reason other than memory.
  """
  built = _built(config, topology, n_slices)
  compiled = compile_apart(lowered_step, config, topology, n_slices, code=code)
  memory = _memory(built, compiled)
  fits = compiled.refusal is None and memory.left >= 0
  sent, speed, n_host = (), None, 0
  if compiled.text:
    program = hlo_program.read_program(compiled.text, built.mesh.shape, unknown_trips=1)
    sent = _sent(built, program)
    n_host = len(hlo_program.host_transfers(program, branch_runs_of(built)))
    speed = _speed(built, program) if n_slices == 1 else None
  return Preflight(
      config.name, topology, n_slices, dict(built.mesh.shape), built.mesh.size,
      config.data.batch_size, config.data.sequence_length, built.n_micro, compiled.seconds, code,
      fits, compiled.refusal.message.splitlines()[0] if compiled.refusal else '', memory, sent,
      n_host, speed)


def _device_bytes(tree: Any) -> int:
  """Returns the bytes of one device's parts of abstract arrays."""
  return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
             for leaf in jax.tree.leaves(tree))


def _memory(built: build_lib.Build, compiled: Compiled) -> Memory:
  """Returns where a device's memory goes."""
  state, kind = built.abstract_state, built.mesh.devices.flat[0].device_kind
  chip, usable = find_chip(kind), usable_bytes(kind)
  if compiled.refusal and compiled.refusal.available:
    usable = compiled.refusal.available
  parts = [_device_bytes(tree) for tree in (
      state.params, state.optimizer, state.ema, abstract_batch(built))]
  padding = max(0, compiled.arguments - sum(parts))
  return Memory(*parts, padding, compiled.total - sum(parts) - padding, compiled.total, usable,
                chip.hbm_bytes // chip.devices, usable - compiled.total)


def _pipeline_of(built: build_lib.Build):
  """Returns a build's pipeline schedule and the layers of its places."""
  compute, n_stages = built.config.compute, built.mesh.shape[STAGE]
  return (schedules.schedule(compute.pipeline, n_stages, built.n_micro, compute.pipeline_chunks),
          pipelined.layer_order(built.config.model.n_layers, n_stages, compute.pipeline_chunks))


def branch_runs_of(built: build_lib.Build, stage: int | None = None,
                   without: str = '') -> BranchRuns:
  """Returns how often the conditionals of a build's step take each branch.

  Args:
    built: the model and mesh.
    stage: of the pipeline, None for the mean over stages.
    without: name of a conditional that is never taken.
  """
  if built.mesh.shape[STAGE] == 1:
    return hlo_program.costliest
  schedule, order_Pn = _pipeline_of(built)
  shares = {**pipeline.branch_shares(schedule, stage),
            **pipelined.branch_shares(built.config.model, order_Pn)}
  if without:
    shares[without] = (1.0, 0.0)

  def runs(branch: Branch):
    names = re.findall('|'.join(shares), branch.source)
    return shares[names[-1]] if names and _is_cond_of(branch.source, names[-1]) else None
  return runs


def _is_cond_of(source: str, name: str) -> bool:
  """Returns whether the operation of a path is the conditional that is directly in a scope."""
  return source.rpartition(name)[2].strip(')').lstrip('/') in ('cond', 'switch')


def _sent(built: build_lib.Build, program: Block) -> tuple[Sent, ...]:
  """Returns what is sent beside the least that has to be, the most first."""
  found = hlo_program.sent_bytes(program, branch_runs_of(built))
  least = least_bytes(built.config, built.mesh.shape, built.n_micro)
  rows = [Sent(*key, found.get(key, 0.0), least.get(key, 0.0),
               found.get(key, 0.0) / least[key] if least.get(key) else None)
          for key in {**found, **least}]
  return tuple(sorted((row for row in rows if row.axes), key=lambda row: -max(row.sent, row.least)))


def _speed(built: build_lib.Build, program: Block) -> Speed:
  """Returns the estimate of a step's time, of a pipeline that of its busiest stage."""
  kind = built.mesh.devices.flat[0].device_kind
  chip, network = find_chip(kind), Network(built.mesh)

  def timed(*arguments: Any) -> Estimate:
    return estimate(program, chip, network, branch_runs_of(built, *arguments))
  n_stages = built.mesh.shape[STAGE]
  stage = max({0, n_stages // 2, n_stages - 1}, key=lambda s: timed(s).seconds)
  best = timed(stage)
  seconds, bubble = best.seconds, 0.0
  if n_stages > 1:
    seconds, bubble = _with_bubble(built, best, lambda name: timed(stage, name).seconds)
  config, peak = built.config, chip.bf16_flops / chip.devices
  n_tokens = config.data.batch_size * config.data.sequence_length
  model_flops = n_tokens * flops_per_token(
      config.model, config.data.sequence_length) / built.mesh.size
  flops = hlo_program.total_flops(program, branch_runs_of(built))
  return Speed(
      seconds, best.perfect_seconds, best.bound, dict(best.busy), dict(best.exposed), bubble,
      flops, model_flops, best.hbm_bytes, model_flops / seconds / peak,
      model_flops / max(flops, 1.0), n_tokens / seconds * SECONDS_PER_DAY)


def _with_bubble(built: build_lib.Build, whole: Estimate, seconds_without: Callable[[str], float]
                 ) -> tuple[float, float]:
  """Returns a step's seconds with the waits for other stages, and their share of it.

  Forward and backward of a micro-batch take what the step would be shorter by without them.
  """
  schedule, _ = _pipeline_of(built)
  forward, backward = (max(0.0, whole.seconds - seconds_without(name))
                       for name in (pipeline.FORWARD, pipeline.BACKWARD))
  idle = schedules.bubble(schedule, forward / built.n_micro, backward / built.n_micro)
  rest = max(0.0, whole.seconds - forward - backward)
  seconds = rest + (forward + backward) / (1 - idle)
  return seconds, (seconds - whole.seconds) / seconds
