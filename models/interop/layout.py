"""Where an element of a parameter of ours stands in a tensor of a file, both ways.

Axes are letters: those of names of arrays, and P for tensors that several parameters share, U
for 1. A file's axis is a product of letters: 'HPE D' is a matrix of which the rows run over heads,
then parts, then features of a head.
"""

import math
from typing import Callable, NamedTuple, Optional

import numpy as np

from models.config import ModelConfig

Range = tuple[int, int]
Box = tuple[Range, ...]  # start and stop along each axis of a parameter
Sizes = dict[str, int]


class Part(NamedTuple):
  """Which of the parameters that share a tensor this one is."""

  index: int
  count: int


class Row(NamedTuple):
  """One parameter and the tensors of files that hold it.

  leaf: dotted name in our tree; under `blocks.` one tensor per layer holds it.
  axes: its letters, without that of the layers.
  tensor: name in the file, with {layer}; with {expert} where each expert has its own.
  layout: the tensor's axes, each a product of letters.
  part: None where the tensor holds nothing else.
  """

  leaf: str
  axes: str
  tensor: str
  layout: str
  part: Optional[Part] = None

  @property
  def stacked(self) -> bool:
    """Returns whether there is one tensor per layer."""
    return '{layer}' in self.tensor

  @property
  def per_expert(self) -> bool:
    """Returns whether there is one tensor per expert."""
    return '{expert}' in self.tensor

  @property
  def own_axes(self) -> str:
    """Returns the letters that one tensor holds."""
    return self.axes.replace('X', '') if self.per_expert else self.axes


def sizes_of(config: ModelConfig) -> Sizes:
  """Returns the size of every letter but P."""
  moe = config.moe
  return {
    'D': config.d_model, 'H': config.n_heads, 'K': config.n_kv_heads, 'E': config.d_head,
    'F': moe.d_expert if moe.n_experts else config.d_ff, 'V': config.vocab_size,
    'X': moe.n_experts, 'U': 1,
  }


def with_part(row: Row, sizes: Sizes) -> Sizes:
  """Returns the sizes with that of P, where the tensor has parts."""
  return sizes if row.part is None else {**sizes, 'P': row.part.count}


def tensor_shape(row: Row, sizes: Sizes) -> tuple[int, ...]:
  """Returns the shape of a tensor of the row."""
  sizes = with_part(row, sizes)
  return tuple(math.prod(sizes[letter] for letter in axis) for axis in row.layout.split())


class _Cut(NamedTuple):
  """A slice of one axis of a file, the letters it is then reshaped to, what is kept of each."""

  index: slice
  shape: tuple[int, ...]
  kept: tuple[slice, ...]


def _cut(axis: str, sizes: Sizes, ranges: dict[str, Range]) -> _Cut:
  """Returns the shortest slice of a file's axis that holds the ranges of its letters."""
  extents = [sizes[letter] for letter in axis]
  wanted = [ranges[letter] for letter in axis]
  outer = 0  # letters before this one have one index each, so the slice lies within it
  while outer < len(axis) - 1 and wanted[outer][1] - wanted[outer][0] == 1:
    outer += 1
  offset = 0
  for extent, (start, _) in zip(extents[:outer], wanted[:outer]):
    offset = offset * extent + start
  inner, (start, stop) = math.prod(extents[outer + 1 :]), wanted[outer]
  first = (offset * extents[outer] + start) * inner
  shape = (1,) * outer + (stop - start, *extents[outer + 1 :])
  kept = (slice(None),) * (outer + 1) + tuple(slice(*r) for r in wanted[outer + 1 :])
  return _Cut(slice(first, first + (stop - start) * inner), shape, kept)


def source(
  row: Row, sizes: Sizes, box: Box
) -> tuple[tuple[slice, ...], Callable[[np.ndarray], np.ndarray]]:
  """Returns which part of the tensor holds a box of `own_axes`, and what makes it the box."""
  sizes, ranges = with_part(row, sizes), dict(zip(row.own_axes, box, strict=True))
  if row.part is not None:
    ranges['P'] = (row.part.index, row.part.index + 1)
  cuts = [_cut(axis, sizes, ranges) for axis in row.layout.split()]
  letters = row.layout.replace(' ', '')

  def finish(values: np.ndarray) -> np.ndarray:
    values = values.reshape([n for cut in cuts for n in cut.shape])
    values = values[tuple(kept for cut in cuts for kept in cut.kept)]
    order = [letters.index(letter) for letter in ('P' if row.part else '') + row.own_axes]
    return values.transpose(order).reshape([stop - start for start, stop in box])

  return tuple(cut.index for cut in cuts), finish


def tensor_of(rows: list[Row], sizes: Sizes, values: list[np.ndarray]) -> np.ndarray:
  """Returns the tensor that holds the values (of `own_axes`) of the rows that share it."""
  row, letters = rows[0], rows[0].layout.replace(' ', '')
  if row.part is None:
    stacked, axes = values[0], row.own_axes
  else:
    order = sorted(range(len(rows)), key=lambda i: rows[i].part.index)
    stacked, axes = np.stack([values[i] for i in order]), 'P' + row.own_axes
  tensor = stacked.transpose([axes.index(letter) for letter in letters])
  return np.ascontiguousarray(tensor).reshape(tensor_shape(row, sizes))
