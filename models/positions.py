"""Owns position encodings: rotary frequencies and their scalings, ALiBi slopes."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from models.config import RopeConfig


def _unscaled(rope: RopeConfig, n_rotated: int) -> np.ndarray:
  """Returns angular frequencies theta^(-2i/n), float64 (Su et al. 2021, section 3.2)."""
  return rope.theta ** (-np.arange(0, n_rotated, 2, dtype=np.float64) / n_rotated)


def _linear(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
  """Returns all frequencies divided by the factor (position interpolation)."""
  return frequencies / rope.factor


def _llama3(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
  """Returns Llama 3.1 frequencies: long waves scaled, short kept, a ramp between."""
  rotations = rope.original_context * frequencies / (2 * np.pi)
  low, high = rope.low_freq_factor, rope.high_freq_factor
  kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
  return frequencies * (kept + (1 - kept) / rope.factor)


def _yarn(rope: RopeConfig, frequencies: np.ndarray) -> np.ndarray:
  """Returns YaRN frequencies (Peng et al. 2023, eq. 23 with the ramp over dimensions)."""
  n_rotated = 2 * len(frequencies)

  def dimension(rotations: float) -> float:
    wavelength = rope.original_context / (rotations * 2 * math.pi)
    return n_rotated * math.log(wavelength) / (2 * math.log(rope.theta))

  low = max(math.floor(dimension(rope.beta_fast)), 0)
  high = min(math.ceil(dimension(rope.beta_slow)), n_rotated - 1)
  ramp = (np.arange(len(frequencies)) - low) / max(high - low, 0.001)
  kept = 1 - np.clip(ramp, 0.0, 1.0)
  return frequencies * (kept + (1 - kept) / rope.factor)


SCALINGS = {'none': lambda rope, frequencies: frequencies, 'linear': _linear,
            'llama3': _llama3, 'yarn': _yarn}


def rope_frequencies(rope: RopeConfig, d_head: int) -> np.ndarray:
  """Returns the angular frequencies of the rotated pairs, float32 [fraction * d_head / 2]."""
  frequencies = _unscaled(rope, int(d_head * rope.fraction))
  return SCALINGS[rope.scaling](rope, frequencies).astype(np.float32)


def rope_magnitude(rope: RopeConfig) -> float:
  """Returns the factor on cos and sin, 1 but for YaRN (its attention temperature)."""
  if rope.scaling != 'yarn':
    return 1.0
  if rope.attention_factor is not None:
    return rope.attention_factor
  return 0.1 * math.log(rope.factor) + 1.0


def rope_tables(
  rope: RopeConfig, d_head: int, positions: jax.Array, n_positions: int
) -> tuple[jax.Array, jax.Array]:
  """Returns cos and sin, float32 [..., fraction * d_head / 2], for positions [...] < n_positions.

  They are looked up in tables of all n_positions: what is computed from the positions
  themselves XLA computes again per head in every rotation, a tenth of a step on CPU.
  """
  angles = jnp.arange(n_positions, dtype=jnp.float32)[:, None] * rope_frequencies(rope, d_head)
  magnitude = rope_magnitude(rope)
  cos, sin = jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude
  return cos[positions], sin[positions]


def rotate(x_BLHE: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Returns the heads with their first dimensions rotated, in the dtype of the input.

  Pairs are (i, i + n/2) of the n rotated dimensions, the rest passes through. The tables
  are [L, n/2] or [B, L, n/2].
  """
  half = cos.shape[-1]
  cos, sin = cos[..., None, :], sin[..., None, :]
  x1, x2 = x_BLHE[..., :half], x_BLHE[..., half : 2 * half]
  parts = [x1 * cos - x2 * sin, x2 * cos + x1 * sin]
  rotated = jnp.concatenate(parts, axis=-1).astype(x_BLHE.dtype)
  if 2 * half == x_BLHE.shape[-1]:
    return rotated
  return jnp.concatenate([rotated, x_BLHE[..., 2 * half :]], axis=-1)


def alibi_slopes(n_heads: int) -> np.ndarray:
  """Returns the slope of each head, float32 [H] (Press et al. 2021, section 3).

  A power of two gives the geometric series from 2^(-8/n); otherwise the series of the
  next lower power, then every other slope of the series of twice that power.
  """

  def series(n: int) -> list[float]:
    return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

  power = 2 ** int(math.log2(n_heads))
  extra = series(2 * power)[0::2][: n_heads - power]
  return np.array(series(power) + extra, np.float32)
