"""Predicts, without a compiler, what a training step occupies in the memory of a TPU.

Bytes of one device. Arguments (state and batch) are exact. All else is one heap, whose size is that
of the fullest of three moments: the loss, the backward pass of a layer, and the sums of gradients
at the end. Each term below is a formula of shapes; the few constants among them (`CONSTANTS`) were
counted in the compiler's buffer assignments of `experiments.benchmarks.memory_prediction`.

Letters: T tokens of a device's micro-batch, l those it has between branches, D, F, V, H, K, E as
everywhere, F, V, H, K of one tensor device; U = V * D, the embedding of one tensor device.
"""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import numpy as np

from models import transformer
from models.config import ModelConfig
from models.layers import GATED
from parallelism import experts, schedules, sharding
from parallelism.compiler_options import OPTIONS, usable_bytes
from parallelism.hardware import find_chip
from parallelism.storage import CAST
from research import build as build_lib
from research.config import ExperimentConfig
from research.training import divisions, pipelined
from research.training.config import OptimizerConfig
from research.training.layout import laid_out_bytes
from research.training.optimizers import make_optimizer
from research.training.step import ENDS

F32 = 4
MARGIN = 1.2  # what fits is predicted to stay below the usable memory divided by this
BATCH = ('tokens', 'targets', 'segment_ids', 'loss_mask')  # 4 bytes per token
READ_POSITIONS = ('rope', 'learned')  # embeddings that read the batch's positions


class Leaf(NamedTuple):
  """One array of the state: its shape, element size and logical names, () where replicated."""

  path: str
  shape: tuple[int, ...]
  itemsize: int
  names: tuple[str | None, ...]

  def shard(self, sizes: Mapping[str, int], without: tuple[str, ...] = ()) -> tuple[int, ...]:
    """Returns the shape of a device's part, whole over the axes `without`."""
    names = self.names or (None,) * len(self.shape)
    return tuple(
        n // math.prod(sizes[axis] for axis in sharding.STORAGE[name] if axis not in without)
        for n, name in zip(self.shape, names, strict=True))


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Bytes of a device.

  arguments: of state and batch; moments: the heap at each moment, term by term; usable: what a
  program may take on the chip.
  """

  arguments: int
  moments: dict[str, dict[str, int]]
  usable: int

  @property
  def moment(self) -> str:
    """The fullest moment."""
    return max(self.moments, key=lambda name: sum(self.moments[name].values()))

  @property
  def heap(self) -> int:
    """Bytes of all but the arguments."""
    return sum(self.moments[self.moment].values())

  @property
  def peak(self) -> int:
    """Bytes of all."""
    return self.arguments + self.heap

  @property
  def fits(self) -> bool:
    """Whether it fits with the margin; what does not may still fit, which a compiler can say."""
    return self.peak * MARGIN <= self.usable


@functools.lru_cache(maxsize=256)
def state_leaves(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[Leaf, ...]:
  """Returns all arrays of the state of a run, parameters first (paths begin with 'params.')."""
  config = ExperimentConfig(
      model=model, optimizer=optimizer,  # the rest changes no shape
      data=dataclasses.replace(ExperimentConfig().data, sequence_length=model.context_length))
  axes = transformer.logical_axes(model)
  shapes = jax.eval_shape(
      lambda: build_lib.fresh_state(config, make_optimizer(optimizer, axes)))
  names = [*jax.tree.leaves(axes, is_leaf=lambda leaf: isinstance(leaf, tuple)), ()]
  which = sharding.mirrored(shapes, shapes.params, list(range(len(names) - 1)), -1)
  return tuple(
      Leaf(sharding.path_name(path), leaf.shape, leaf.dtype.itemsize, names[index])
      for (path, leaf), index in zip(
          jax.tree.leaves_with_path(shapes), jax.tree.leaves(which), strict=True))


def argument_bytes(config: ExperimentConfig, sizes: Mapping[str, int]) -> int:
  """Returns the bytes of the state and the batch, exact with the padding of their tiles."""
  state = sum(laid_out_bytes(leaf.shard(sizes), leaf.itemsize)
              for leaf in state_leaves(config.model, config.optimizer))
  rows = config.data.batch_size // divisions.replicas(sizes)
  tokens = config.data.sequence_length // sizes['context']
  n_arrays = len(BATCH) + (config.model.positions in READ_POSITIONS)
  return state + n_arrays * laid_out_bytes((rows, tokens), F32)


@dataclasses.dataclass(frozen=True)
class Step:
  """What the formulas are made of: counts of one device.

  sizes: of the mesh; itemsize: bytes of the compute dtype; rows, tokens, own: rows, tokens (T) and
  tokens between branches (l) of a micro-batch; heads, kv_heads, d_ff: of one tensor device;
  n_choices: rows of the experts' matrices, 0 without experts; n_micro: micro-batches; n_own: layers
  of the device's stage; n_chunk: layers of one chunk of it; n_stored: chunk inputs kept at a time;
  offloads: whether sparse cores carry collectives.
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
  n_micro: int
  n_own: int
  n_chunk: int
  n_stored: int
  offloads: bool

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


def _lanes(n: int) -> int:
  """Returns a minor dimension with its padding."""
  return -(-n // 128) * 128


def step_counts(config: ExperimentConfig, sizes: Mapping[str, int], chip: str) -> Step:
  """Returns the counts of a step on a mesh of chips such as 'v5e'."""
  model, tensor, n_stages = config.model, sizes['tensor'], sizes['stage']
  n_micro = divisions.count_microbatches(config, sizes, 'tpu')
  rows = config.data.batch_size // divisions.replicas(sizes) // n_micro
  tokens = rows * config.data.sequence_length // sizes['context']
  own = tokens // tensor if config.compute.sequence else tokens
  n_own, n_chunk, n_stored = model.n_layers, model.n_layers, 0
  if n_stages > 1:
    order_Pn = pipelined.layer_order(model.n_layers, n_stages, config.compute.pipeline_chunks)
    n_chunk = order_Pn.shape[1]
    n_own = n_chunk * config.compute.pipeline_chunks
    n_stored = schedules.slots(schedules.schedule(
        config.compute.pipeline, n_stages, n_micro, config.compute.pipeline_chunks)).n_slots
  n_choices, group = own * model.moe.top_k if model.moe.n_experts else 0, math.prod(
      divisions.expert_group(config, sizes).values())
  if n_choices and group > 1 and not model.moe.capacity_factor:
    n_choices = group * experts.round_rows(n_choices, group, model.moe.exchange_factor)
  elif n_choices and model.moe.capacity_factor:
    n_choices = int(n_choices * model.moe.capacity_factor)
  return Step(
      config, dict(sizes), 2 if model.compute_dtype == 'bfloat16' else 4, rows, tokens, own,
      model.n_heads // tensor, model.n_kv_heads // tensor, model.d_ff // tensor, n_choices,
      n_micro, n_own, n_chunk, n_stored, chip in OPTIONS)


def _block_bytes(step: Step) -> tuple[int, int, int, int]:
  """Returns bytes of blocks: float32 shards of all, cast shards, one layer whole cast, in float32.

  Shards are those of the device's stage: the stages have split nothing of its layers.
  """
  shards = cast = whole = 0
  model = step.config.model
  for leaf in state_leaves(model, step.config.optimizer):
    if not leaf.path.startswith('params.blocks.'):
      continue
    n_whole = math.prod(leaf.shard(step.sizes, sharding.STORAGE['embed'][:1] + (
        'context', 'stage') + (() if 'experts' in leaf.names else ('expert',)))[1:])
    split = () if step.stages == 1 else ('stage',)
    n_shard = math.prod(leaf.shard(step.sizes, split)[1:]) * step.n_own
    shards += n_shard * F32
    if CAST & set(leaf.names) and len(leaf.names) > 2:
      cast += n_shard * step.itemsize
      whole += n_whole
  return shards, cast, whole * step.itemsize, whole * F32


def saved_bytes(step: Step) -> int:
  """Returns what one layer keeps for its backward pass.

  full: its input, l D. dots: also the results of matrix products that backward reads: queries, keys
  and values, the attention's output before it is summed over tensor (T D), the hidden units (T F,
  twice if gated). none: also what lies between: norms in float32, rotated and transposed heads,
  activations, and the gathered matrices themselves. The minor dimension is padded to 128.
  """
  model, a, T = step.config.model, step.itemsize, step.tokens
  D, F = model.d_model, _lanes(step.d_ff)
  q, kv = (_lanes(n * model.d_head) for n in (step.heads, step.kv_heads))
  gated = model.mlp in GATED
  saved = step.stream()
  if model.remat == 'full':
    return saved
  if model.remat == 'dots':
    hidden = step.own * model.moe.n_experts * F32 if step.n_choices else T * F * (1 + gated) * a
    return saved + T * (q + 2 * kv + D) * a + hidden
  _, _, whole, _ = _block_bytes(step)
  if step.n_choices:
    hidden = 0 if step.n_choices else 0
  hidden = step.n_choices * (5 * model.moe.d_expert + 2 * D) if step.n_choices else (
      T * F * (2 + 2 * gated))
  norms = 2 * 2 * step.stream(F32)
  wide = whole if math.prod(step.sizes.values()) > 1 else 0
  return norms + 5 * T * D * a + T * (2 * q + 2 * kv) * a + hidden * a + wide


def _work_bytes(step: Step) -> dict[str, int]:
  """Returns what the backward pass of one layer takes beside what all layers keep."""
  model, a, T, D = step.config.model, step.itemsize, step.tokens, step.config.model.d_model
  q, kv = (_lanes(n * model.d_head) for n in (step.heads, step.kv_heads))
  _, _, whole, whole_f32 = _block_bytes(step)
  gated = model.mlp in GATED
  hidden = T * _lanes(step.d_ff) * a * (2 + 2 * gated)
  if step.n_choices:
    hidden = step.n_choices * (4 * D + 4 * model.moe.d_expert) * a + 2 * step.stream(F32)
  return {
      'hidden units': hidden,
      'attention': T * (3 * q + 4 * kv) * a,
      'residual stream': 3 * step.stream() + 2 * T * D * a,
      'gathered weights': whole * 2 // 3,
      'weight gradients': whole_f32 * 2 // 3}


def _ends(step: Step) -> dict[str, int]:
  """Returns the embeddings' share of the pipeline's loop: cast parts and their gradients' sums."""
  if step.stages == 1:
    return {}
  parts = step.n_embeddings * step.embedding * step.stages // step.parts
  return {"ends' parts": parts * step.itemsize, "ends' gradients": parts * F32}


def predict(config: ExperimentConfig, sizes: Mapping[str, int], chip: str) -> Prediction:
  """Returns the memory of a training step on a mesh of TPU chips such as 'v5e' (or 'v5e:2x4').

  Raises:
    ValueError: the chip is unknown or the batch is not divided by the mesh.
  """
  chip = find_chip(chip).name
  step = step_counts(config, sizes, chip)
  shards, cast, whole, _ = _block_bytes(step)
  U, a, T, D = step.embedding, step.itemsize, step.tokens, config.model.d_model
  kept = {'saved by layers': step.n_chunk * saved_bytes(step),
          "stages' stored inputs": (step.n_stored + 3) * step.stream() if step.stages > 1 else 0,
          'cast shards': cast, **_ends(step)}
  if step.n_micro > 1:
    kept['gradient sums'] = shards + (
        step.n_embeddings * U * F32 // step.parts if step.stages == 1 else 0)
  if step.stages > 1:
    kept['placed shards'] = shards
  logits = min(T, config.compute.loss_chunk) * config.model.vocab_size // sizes['tensor']
  moments = {
      'loss': kept | {
          'unembedding': U * a * (1 + (step.offloads and step.stages == 1)),
          'unembedding gradient': U * F32 * (1 + step.offloads),
          'logits': logits * (F32 + a), 'hidden states': 3 * T * D * a},
      'backward': kept | {'unembedding gradient': U * F32 * (step.stages == 1),
                          'gradient shards': shards, **_work_bytes(step)},
      'ends': {'gradient shards': shards * (1 + (sizes['data'] > 1)),
               **{k: v for k, v in kept.items() if k == 'gradient sums'},
               'embedding gradients': U * F32 * (3 if step.offloads and step.n_embeddings > 1 else 2),
               'embedding scatter': U * a,
               'sums on the way': U * F32 * (step.parts - 1) // step.parts if step.offloads else 0}}
  return Prediction(argument_bytes(config, sizes), moments, usable_bytes(chip_kind(chip)))


def chip_kind(chip: str) -> str:
  """Returns JAX's name of a chip."""
  return find_chip(chip).device_kinds[0]
