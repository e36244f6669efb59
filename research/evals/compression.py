"""General compressors as baselines of bits per byte: they too are given the training text."""

import bz2
import lzma
from collections.abc import Callable

from research.data.errors import DataError

# Name to compressed size in bytes; the settings are those of `xz -9e` and `bzip2 -9`.
COMPRESSORS: dict[str, Callable[[bytes], int]] = {
  'xz -9e': lambda raw: len(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)),
  'bzip2 -9': lambda raw: len(bz2.compress(raw, 9)),
}


def compressed_bits_per_byte(train: bytes, heldout: bytes) -> dict[str, float]:
  """Bits per held-out byte by compressor: size of both texts less that of training text."""
  if not heldout:
    raise DataError('there is no held-out text to compress; set data.text.heldout_fraction above 0')
  return {name: 8 * (size(train + heldout) - size(train)) / len(heldout)
          for name, size in COMPRESSORS.items()}
