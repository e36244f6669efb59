"""Sudden changes of a series: a step between two flanks beside a common slope, and its noise.

The contrast is the least-squares coefficient c of a step in `level + slope * t + c * step(t)`
over two flanks of `dwell` checkpoints, with one checkpoint between them left out. Any straight
line has contrast zero, so drift and the middle of a rise count only by their curvature. Time is
counted in checkpoints.

Its noise comes from second differences, which neither drift nor a hop (it touches three of them)
spoils. How noisy the contrast is for a given second difference depends on the autocorrelation of
checkpoints; the ratio used is the largest of all AR(1) processes, so none has to be estimated.
"""

import functools

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

_MAD = 1.4826  # median absolute deviation of a normal distribution to its standard deviation
_CORRELATIONS = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.99)


@functools.cache
def step_weights(dwell: int) -> np.ndarray:
  """Returns the weights of the contrast on the 2 * dwell + 1 checkpoints of its window."""
  time = np.arange(-dwell, dwell + 1, dtype=np.float64)
  step = np.sign(time) / 2
  residual = step - time * (step @ time) / (time @ time)
  return residual / (residual @ step)


@functools.cache
def noise_ratio(dwell: int) -> float:
  """Returns the largest variance of the contrast over that of a second difference, of all AR(1)."""
  weights = step_weights(dwell)
  second = np.array([-0.5, 1.0, -0.5])
  lags = np.abs(np.subtract.outer(np.arange(len(weights)), np.arange(len(weights))))
  return max(
      float(weights @ rho**lags @ weights / (second @ rho**lags[:3, :3] @ second))
      for rho in _CORRELATIONS)


def step_contrasts(values: np.ndarray, dwell: int) -> np.ndarray:
  """Returns the contrast at every window; values (..., T) give (..., T - 2 * dwell)."""
  return sliding_window_view(values, 2 * dwell + 1, axis=-1) @ step_weights(dwell)


def flank_means(values: np.ndarray, dwell: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the means over both flanks of every window; (..., T) gives (..., T - 2 * dwell)."""
  means = sliding_window_view(values, dwell, axis=-1).mean(-1)
  return means[..., :-dwell - 1], means[..., dwell + 1:]


def second_differences(values: np.ndarray) -> np.ndarray:
  """Returns each value minus the mean of its neighbors; (..., T) gives (..., T - 2)."""
  return values[..., 1:-1] - (values[..., :-2] + values[..., 2:]) / 2


def common_noise(values: np.ndarray, dwell: int) -> np.ndarray:
  """Returns the standard error of contrasts from the whole series' own unrest; (..., T): (...)."""
  differences = second_differences(values)
  deviation = np.abs(differences - np.median(differences, -1, keepdims=True))
  return _MAD * np.median(deviation, -1) * np.sqrt(noise_ratio(dwell))


def context_noise(values: np.ndarray, weights: np.ndarray, dwell: int) -> np.ndarray:
  """Returns the standard error of contrasts of a weighted mean from contexts that disagree.

  Args:
    values: (..., T, C) by checkpoint and context, C at least 2.
    weights: (C,) that sum to one.
    dwell: checkpoints in a flank.

  Returns:
    (..., T - 2 * dwell): of each window, from the second differences within it.
  """
  differences = second_differences(np.moveaxis(values, -1, 0))  # Contexts lead: (C, ..., T - 2).
  center = np.tensordot(weights, differences, 1)
  n_contexts = len(weights)
  spread = np.tensordot(weights**2, (differences - center)**2, 1) * n_contexts / (n_contexts - 1)
  local = sliding_window_view(spread, 2 * dwell - 1, axis=-1).mean(-1)
  return np.sqrt(local * noise_ratio(dwell))
