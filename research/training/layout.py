"""How many bytes arrays take as a TPU's compiler lays out the arguments of a program.

The two minor dimensions of an array lie in tiles of 8 x 128 elements; an array of one dimension
lies in tiles of 128 to 1,024. The compiler may take any two dimensions for the minor ones and takes
those that waste least. Seen in the layouts of libtpu 0.0.52 for v5e, v5p and v6e, element sizes 2 and 4.
"""

import itertools
import math

LANES, SUBLANES = 128, 8
LONGEST_LINE = 1024  # elements of the tile of an array of one dimension, at most


def _up(n: int, tile: int) -> int:
  """Returns the least multiple of a tile that is not below n."""
  return -(-n // tile) * tile


def _power(n: int, low: int, high: int) -> int:
  """Returns the least power of two that is not below n, but from low to high."""
  return min(high, max(low, 1 << max(0, n - 1).bit_length()))


def laid_out_bytes(shape: tuple[int, ...], itemsize: int) -> int:
  """Returns the bytes of one array with the padding of its tiles.

  Args:
    shape: of the device's part.
    itemsize: bytes per element, 2 or 4; two elements of 2 bytes share a word of a sublane, so
      that such an array has an even number of rows at least.
  """
  if math.prod(shape) == 0:
    return 0
  if len(shape) < 2:
    n = math.prod(shape)
    return _up(n, _power(n, LANES, LONGEST_LINE)) * itemsize
  least = 4 // itemsize

  def padded(minor: int, second: int) -> int:
    rows = _up(shape[second], _power(shape[second], least, SUBLANES))
    rest = math.prod(shape) // (shape[minor] * shape[second])
    return _up(shape[minor], LANES) * rows * rest

  return min(padded(*pair) for pair in itertools.permutations(range(len(shape)), 2)) * itemsize
