"""A public series cut into pieces, layers and boxes of them, so that memory bounds no model."""

import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from models.interop.checkpoint import leaf_shapes
from models.interop.layout import Box
from research.dynamics.public import UnusableError
from research.dynamics.public_trajectory import PublicTrajectory
from research.training.streaming import pieces

PIECE_ELEMENTS = 2**23  # 64 MiB in float64, of which an audit holds several at a time


def boxes(leaf: str, shape: tuple[int, ...]) -> Iterator[Box]:
  """Yields the pieces of a parameter: layer by layer, none of more than PIECE_ELEMENTS.

  Scales and biases stay together: in bfloat16 those of one layer are often the same by chance.
  """
  whole = tuple((0, size) for size in shape)
  layers = [whole]
  if leaf.startswith('blocks.') and len(shape) > 2:
    layers = [((i, i + 1), *whole[1:]) for i in range(shape[0])]
  for layer in layers:
    yield from pieces(layer, 1, PIECE_ELEMENTS)


def label(leaf: str, shape: tuple[int, ...], box: Box) -> str:
  """Returns the name of a piece, such as blocks.mlp.up[3] or embedding.tokens[0:4096]."""
  cut = [i for i, size in enumerate(shape) if box[i] != (0, size)]
  parts = [str(start) if stop - start == 1 else f'{start}:{stop}'
           for start, stop in box[:max(cut, default=-1) + 1]]
  return f'{leaf}[{", ".join(parts)}]' if parts else leaf


class PieceSeries:
  """The pieces of a public series as tensors; see `research.dynamics.series.Series`."""

  def __init__(self, trajectory: PublicTrajectory, steps: Sequence[int]):
    self.steps, self._trajectory = list(steps), trajectory
    self._pieces = {label(leaf, shape, box): (leaf, box)
                    for leaf, shape in sorted(leaf_shapes(trajectory.model).items())
                    for box in boxes(leaf, shape)}
    self.names = list(self._pieces)

  def leaf(self, step: int, name: str) -> np.ndarray:
    """Returns one piece in the dtype of the files; raises UnusableError as `checkpoint`."""
    return self._trajectory.checkpoint(step).read(*self._pieces[name])

  def file_of(self, step: int, name: str) -> pathlib.Path:
    """Returns the file that holds a piece, or of a damaged step what is amiss."""
    try:
      return self._trajectory.checkpoint(step).file_of(*self._pieces[name])
    except UnusableError as error:
      return error.path

  def recorded(self, step: int, name: str) -> str:
    """Returns '': public revisions record no hashes."""
    return ''
