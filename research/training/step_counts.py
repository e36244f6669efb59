"""Counts of a training step that its memory follows from: tokens, layers and matrices of a device."""

from collections.abc import Mapping
import dataclasses
import functools
import math
import re
from typing import NamedTuple

from parallelism import experts, schedules, sharding
from parallelism.compiler_options import OPTIONS
from parallelism.hardware import find_chip
from parallelism.storage import CAST
from research.config import ExperimentConfig
from research.training import divisions, pipelined
from research.training.leaves import Leaf, state_leaves

F32 = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Step:
  """What the formulas are made of: counts of one device.

  sizes: of the mesh; itemsize: bytes of the compute dtype; rows, tokens, own: rows, tokens (T) and
  tokens between branches (l) of a micro-batch; heads, kv_heads, d_ff: of one tensor device;
  n_choices: rows of the experts' matrices, 0 without experts; exchanges: whether those rows go
  between devices in rounds; n_micro: micro-batches; n_own: layers
  of the device's stage; n_chunk: layers of one chunk of it; n_stored: chunk inputs kept at a time;
  n_body: layers of one round of the loop over layers, 1 where there is none; offloads: whether
  sparse cores carry collectives; waits: whether a layer's parameters are longer on the way than its
  forward takes; first_parts: devices over which gradients are scattered at first.
  """

  config: ExperimentConfig
  sizes: dict[str, int]
  itemsize: int
  rows: int
  tokens: int
  own: int
  heads: int
  kv_heads: int
  d_ff: int
  n_choices: int
  exchanges: bool
  n_micro: int
  n_own: int
  n_chunk: int
  n_stored: int
  n_body: int
  offloads: bool
  waits: bool
  first_parts: int

  @property
  def embedding(self) -> int:
    """Elements of an embedding that is whole but for the vocabulary (U)."""
    return self.config.model.vocab_size // self.sizes['tensor'] * self.config.model.d_model

  @property
  def n_embeddings(self) -> int:
    """Embeddings: one where input and output share it."""
    return 1 if self.config.model.tie_embeddings else 2

  @property
  def stages(self) -> int:
    """Pipeline stages."""
    return self.sizes['stage']

  @property
  def parts(self) -> int:
    """Devices over which an embedding's other axis is split."""
    return math.prod(self.sizes[axis] for axis in sharding.STORAGE['embed'])

  def stream(self, dtype_bytes: int = 0) -> int:
    """Returns the bytes of the residual stream between branches."""
    return self.own * self.config.model.d_model * (dtype_bytes or self.itemsize)


def lanes(n: int) -> int:
  """Returns a minor dimension with its padding."""
  return -(-n // 128) * 128


@functools.lru_cache(maxsize=4096)
def _n_slots(name: str, n_stages: int, n_micro: int, n_chunks: int) -> int:
  """Returns how many chunk inputs a stage stores at a time."""
  return schedules.slots(schedules.schedule(name, n_stages, n_micro, n_chunks)).n_slots


def _first_parts(sizes: Mapping[str, int], topology: str) -> int:
  """Returns over how many devices gradients are scattered first.

  All that hold parts, but where they are a whole slice (`mesh.slice_levels`) one of its dimensions.
  """
  parts = math.prod(sizes[axis] for axis in sharding.STORAGE['embed'] if axis != 'stage')
  dims = [int(n) for n in re.findall(r'\d+', topology.partition(':')[2]) if int(n) > 1]
  return min(dims) if len(dims) > 1 and math.prod(dims) == parts else parts


def step_counts(config: ExperimentConfig, sizes: Mapping[str, int], topology: str) -> Step:
  """Returns the counts of a step on a mesh of a topology such as 'v5e:2x4'."""
  model, tensor, n_stages = config.model, sizes['tensor'], sizes['stage']
  n_micro = divisions.count_microbatches(config, sizes, 'tpu')
  rows = config.data.batch_size // divisions.replicas(sizes) // n_micro
  tokens = rows * config.data.sequence_length // sizes['context']
  own = tokens // tensor if config.compute.sequence else tokens
  n_own, n_chunk, n_stored = model.n_layers, model.n_layers, 0
  n_body = len(model.layer_pattern) if model.n_layers >= 2 * len(model.layer_pattern) else 1
  if n_stages > 1:
    order_Pn = pipelined.layer_order(model.n_layers, n_stages, config.compute.pipeline_chunks)
    n_chunk = order_Pn.shape[1]
    n_own, n_body = n_chunk * config.compute.pipeline_chunks, 1
    n_stored = _n_slots(config.compute.pipeline, n_stages, n_micro, config.compute.pipeline_chunks)
  n_choices, group = own * model.moe.top_k if model.moe.n_experts else 0, math.prod(
      divisions.expert_group(config, sizes).values())
  exchanges = n_choices > 0 and group > 1 and not model.moe.capacity_factor
  if exchanges:
    n_choices = group * experts.round_rows(n_choices, group, model.moe.exchange_factor)
  elif n_choices and model.moe.capacity_factor:
    n_choices = int(n_choices * model.moe.capacity_factor)
  chip, itemsize = find_chip(topology), 2 if model.compute_dtype == 'bfloat16' else 4
  return Step(
      config, dict(sizes), itemsize, rows, tokens, own,
      model.n_heads // tensor, model.n_kv_heads // tensor, model.d_ff // tensor, n_choices,
      exchanges, n_micro, n_own, n_chunk, n_stored, n_body, chip.name in OPTIONS,
      2 * tokens / chip.bf16_flops < (itemsize + F32) / chip.link_bytes_per_second,
      _first_parts(sizes, topology))


class Blocks(NamedTuple):
  """Bytes of the parameters of blocks.

  shards: a device's parts of its layers in float32; cast: in the compute dtype, matrices only;
  layer: the matrices of one layer as gathered, in the compute dtype.
  """

  shards: int
  cast: int
  layer: int


def block_bytes(step: Step) -> Blocks:
  """Returns the sizes of the blocks' parameters; a stage's layers are not split over stages."""
  leaves = state_leaves(step.config.model, step.config.optimizer)
  shard, cast, layer = _layer_elements(leaves, tuple(step.sizes.items()))
  return Blocks(shard * step.n_own * F32, cast * step.n_own * step.itemsize, layer * step.itemsize)


@functools.lru_cache(maxsize=4096)
def _layer_elements(leaves: tuple[Leaf, ...], sizes: tuple[tuple[str, int], ...]
                    ) -> tuple[int, int, int]:
  """Returns elements of one layer: a device's part, its part of matrices, matrices as gathered."""
  shard = cast = layer = 0
  of_mesh = dict(sizes)
  for leaf in leaves:
    if not leaf.path.startswith('params.blocks.'):
      continue
    own = math.prod(leaf.shard(of_mesh, ('stage',))[1:])
    shard += own
    if CAST & set(leaf.names) and len(leaf.names) > 2:
      kept = {axis for name in leaf.names if name not in sharding.GATHERED
              for axis in sharding.STORAGE[name]}
      gathered = tuple(axis for axis in of_mesh if axis not in kept)
      cast += own
      layer += math.prod(leaf.shard(of_mesh, gathered)[1:])
  return shard, cast, layer
