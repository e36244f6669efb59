"""The decoders that all contenders compute, and the batches they are given."""

import dataclasses

import numpy as np

Weights = dict[str, np.ndarray]  # named as the production parameters, dots between keys
Batch = dict[str, np.ndarray]  # tokens and targets, int32 [B, L]

# Settings of the optimizer, the same for every contender; norms and embeddings don't decay.
LEARNING_RATE = 1e-3
B1, B2, EPS = 0.9, 0.95, 1e-8
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
NORM_EPS = 1e-6
ROPE_THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class Shape:
  """A decoder with tied embeddings, pre-RMSNorm, RoPE, full heads and SwiGLU."""

  n_layers: int
  d_model: int
  n_heads: int
  d_head: int
  d_ff: int
  vocab_size: int = 1024
  length: int = 256


SHAPES = {
    'tiny': Shape(2, 32, 2, 16, 64, vocab_size=64, length=32),  # tries the machinery, no result
    '1M': Shape(4, 128, 4, 32, 384),
    '3M': Shape(6, 192, 6, 32, 512),
    '10M': Shape(8, 320, 5, 64, 864),
}


def batches(shape: Shape, n_rows: int, n_batches: int) -> list[Batch]:
  """Returns batches of random tokens, the same in every process; targets are the next tokens."""
  rng = np.random.default_rng(0)
  size = (n_batches, n_rows, shape.length + 1)
  rows_NBL = rng.integers(shape.vocab_size, size=size, dtype=np.int32)
  return [{'tokens': np.ascontiguousarray(rows_BL[:, :-1]),
           'targets': np.ascontiguousarray(rows_BL[:, 1:])} for rows_BL in rows_NBL]


def rope_tables(shape: Shape) -> tuple[np.ndarray, np.ndarray]:
  """Returns cosines and sines, float32 [L, E / 2], of positions 0..L-1 (Su et al. 2021)."""
  frequencies = ROPE_THETA ** (-np.arange(0, shape.d_head, 2) / shape.d_head)
  angles_LE = np.arange(shape.length)[:, None] * frequencies
  return np.cos(angles_LE).astype(np.float32), np.sin(angles_LE).astype(np.float32)
