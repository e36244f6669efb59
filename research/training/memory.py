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
      model=model, optimizer=optimizer,
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
