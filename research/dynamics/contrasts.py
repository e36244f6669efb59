"""Sudden changes of a series: a step between two flanks beside a common slope, and its noise.

The contrast is the least-squares coefficient c of a step in `level + slope * t + c * step(t)`
over two flanks of `dwell` checkpoints, with one checkpoint between them left out. Any straight
line has contrast zero, so drift and the middle of a rise count only by their curvature. Time is
counted in checkpoints.

Its noise comes from second differences of blocks half a flank long: drift does not touch them, a
hop only a few. Blocks of that length are as sensitive to autocorrelated checkpoints as the
contrast is: the ratio of the two variances hardly depends on the correlation. The largest ratio
of all AR(1) processes is used, so that no correlation has to be estimated.
"""

import functools

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from scipy import ndimage

_MAD = 1.4826  # median absolute deviation of a normal distribution to its standard deviation
_CUT = 3.0  # deviations beyond which a second difference is taken for a hop's, not noise
_INSIDE = 0.9733  # variance of a standard normal within three deviations
_LEAST_ROOM = 0.1
_CORRELATIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99)


@functools.cache
def step_weights(dwell: int) -> np.ndarray:
  """Returns the weights of the contrast on the 2 * dwell + 1 checkpoints of its window."""
  time = np.arange(-dwell, dwell + 1, dtype=np.float64)
  step = np.sign(time) / 2
  residual = step - time * (step @ time) / (time @ time)
  return residual / (residual @ step)


def block_length(dwell: int) -> int:
  """Returns how many checkpoints a block of the noise's second differences has."""
  return max(dwell // 2, 1)


def noise_degrees(n_checkpoints: int, dwell: int) -> float:
  """Returns the degrees of freedom of `common_noise`: its second differences by blocks."""
  block = block_length(dwell)
  return (n_checkpoints - 6 * block + 1) / block


def least_checkpoints(dwell: int) -> int:
  """Returns how many checkpoints leave two blocks of second differences beside any window."""
  return 8 * block_length(dwell) - 1


@functools.cache
def noise_ratio(dwell: int) -> float:
  """Returns the largest variance of the contrast over that of a second difference, of all AR(1)."""
  block = block_length(dwell)
  second = np.repeat([-0.5, 1.0, -0.5], block) / block
  return max(variance(step_weights(dwell), rho) / variance(second, rho) for rho in _CORRELATIONS)


def variance(weights: np.ndarray, correlation: float) -> float:
  """Returns the variance of a weighted sum of an AR(1) process of variance one."""
  lags = np.abs(np.subtract.outer(np.arange(len(weights)), np.arange(len(weights))))
  return float(weights @ correlation**lags @ weights)


def step_contrasts(values: np.ndarray, dwell: int) -> np.ndarray:
  """Returns the contrast at every window; values (..., T) give (..., T - 2 * dwell)."""
  return sliding_window_view(values, 2 * dwell + 1, axis=-1) @ step_weights(dwell)


def flank_means(values: np.ndarray, dwell: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the means over both flanks of every window; (..., T) gives (..., T - 2 * dwell)."""
  means = sliding_window_view(values, dwell, axis=-1).mean(-1)
  return means[..., :-dwell - 1], means[..., dwell + 1:]


def second_differences(values: np.ndarray, block: int) -> np.ndarray:
  """Returns block means minus the mean of both neighboring blocks; (..., T): (..., T-3*block+1)."""
  means = sliding_window_view(values, block, axis=-1).mean(-1)
  return means[..., block:-block] - (means[..., :-2 * block] + means[..., 2 * block:]) / 2


def common_noise(values: np.ndarray, dwell: int, bounds: tuple[float, float]) -> np.ndarray:
  """Returns the standard error of contrasts from the whole series' own unrest.

  Noise in log-odds moves a level in proportion to its room, 1 at the middle of the bounds and 0 at
  either of them. Second differences are therefore counted by their room, and a window is as noisy
  as its own room says; else the quiet ends of a rise would speak for its middle. Differences that
  contain the middle of the window are left out: a hop there is not its own noise.

  Args:
    values: (..., T).
    dwell: checkpoints in a flank.
    bounds: least and greatest possible value.

  Returns:
    (..., T - 2 * dwell).
  """
  block = block_length(dwell)
  size = np.abs(second_differences(values, block)) / _room(values, 3 * block, bounds)
  middle = np.arange(dwell, values.shape[-1] - dwell)[:, None]
  first = np.arange(size.shape[-1])
  kept = (first > middle) | (first + 3 * block <= middle)  # (windows, differences)
  size = np.where(kept, size[..., None, :], np.inf)
  median = np.take_along_axis(
      np.sort(size, -1), np.broadcast_to((kept.sum(-1) // 2)[:, None], (*size.shape[:-1], 1)), -1)
  inside = size <= _CUT * _MAD * median
  noise = np.mean(size**2, -1, where=inside) / _INSIDE
  return np.sqrt(noise * noise_ratio(dwell)) * _room(values, 2 * dwell + 1, bounds)


def _room(values, length, bounds):
  """How far means over so many checkpoints are from their bounds, between _LEAST_ROOM and 1."""
  means = sliding_window_view(values, length, axis=-1).mean(-1)
  low, high = bounds
  return np.maximum(1 - ((2 * means - low - high) / (high - low))**2, _LEAST_ROOM)


def context_noise(values: np.ndarray, weights: np.ndarray, dwell: int) -> np.ndarray:
  """Returns the standard error of contrasts of a weighted mean from contexts that disagree.

  Args:
    values: (..., T, C) by checkpoint and context, C at least 2.
    weights: (C,) that sum to one.
    dwell: checkpoints in a flank.

  Returns:
    (..., T - 2 * dwell): of each window, from the second differences around it.
  """
  block, n_contexts, n_steps = block_length(dwell), values.shape[-1], values.shape[-2]
  differences = second_differences(np.moveaxis(values, -1, 0), block)  # Contexts lead: (C, ...).
  center = np.tensordot(weights, differences, 1)
  spread = np.tensordot(weights**2, (differences - center)**2, 1) * n_contexts / (n_contexts - 1)
  local = ndimage.uniform_filter1d(spread, 2 * dwell + 1, axis=-1, mode='nearest')
  first = dwell - (3 * block - 1) // 2  # Of the second difference centered as the first window.
  local = local[..., first:first + n_steps - 2 * dwell]
  return np.sqrt(np.maximum(local, 0) * noise_ratio(dwell))  # Running sums round below zero.
