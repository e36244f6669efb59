"""The arrays of a run's state: shapes and logical names, known without a mesh and remembered."""

from collections.abc import Mapping
import dataclasses
import functools
import math
from typing import NamedTuple

from models.config import ModelConfig
from parallelism import sharding
from research import build as build_lib
from research.training.config import OptimizerConfig


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


def state_leaves(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[Leaf, ...]:
  """Returns all arrays of the state of a run; paths of parameters begin with 'params.'."""
  plain = dataclasses.replace(model, remat='none', scan_layers='auto', attention='auto')
  return _state_leaves(plain, optimizer)


@functools.lru_cache(maxsize=64)
def _state_leaves(model: ModelConfig, optimizer: OptimizerConfig) -> tuple[Leaf, ...]:
  """Returns the arrays of a model whose placement settings are the defaults."""
  return tuple(Leaf(*facts) for facts in build_lib.state_facts(model, optimizer))
