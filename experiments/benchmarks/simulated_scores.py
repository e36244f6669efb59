"""Simulated trajectories of item scores with a known truth, for the benchmark of the detector.

An item's log-odds are the trajectory's level, plus effects of the item and of its demonstration
context, plus noise: common to all items of a checkpoint (autocorrelated), of a context at a
checkpoint (autocorrelated), and of an item at a checkpoint. A margin is tanh(log-odds / 2), the
difference of two probabilities that sum to one. The detector knows none of this: it sees means of
margins, assumes straight lines beside steps, and no distribution of items.
"""

import dataclasses

import numpy as np
from scipy.special import ndtr


@dataclasses.dataclass(frozen=True)
class Noise:
  """Standard deviations in log-odds, and correlations between neighboring checkpoints."""

  item: float  # between items, for good
  context: float  # between demonstration contexts, for good
  common_step: float  # a checkpoint, all items together
  context_step: float  # a context at a checkpoint
  item_step: float  # an item at a checkpoint
  common_correlation: float
  context_correlation: float


@dataclasses.dataclass(frozen=True)
class Size:
  """How much is scored: checkpoints, datasets, demonstration contexts and items of each."""

  n_checkpoints: int
  n_datasets: int
  n_contexts: int
  n_items: int


@dataclasses.dataclass(frozen=True)
class Simulated:
  """Context means of B trajectories, and the truth of their levels.

  Attributes:
    margin_BKTC: mean margins.
    accuracy_BKTC: shares of margins above 0.
    truth_BKT: expected margin at a checkpoint over all contexts and items.
    accuracy_truth_BKT: expected accuracy.
  """

  margin_BKTC: np.ndarray
  accuracy_BKTC: np.ndarray
  truth_BKT: np.ndarray
  accuracy_truth_BKT: np.ndarray


_POINTS, _WEIGHTS = np.polynomial.hermite_e.hermegauss(41)
_WEIGHTS = _WEIGHTS / _WEIGHTS.sum()


def expected_margin(level: np.ndarray, deviation: float) -> np.ndarray:
  """Returns the mean of tanh((level + deviation * normal) / 2), by Gauss and Hermite."""
  return np.tanh((level[..., None] + deviation * _POINTS) / 2) @ _WEIGHTS


def level_of_margin(margin: np.ndarray, deviation: float) -> np.ndarray:
  """Returns the level in log-odds with these expected margins."""
  levels = np.linspace(-12, 12, 2401)
  return np.interp(margin, expected_margin(levels, deviation), levels)


def spread(noise: Noise) -> float:
  """Returns the standard deviation of log-odds of an item drawn anew, given the checkpoint."""
  return float(np.sqrt(noise.item**2 + noise.context**2 + noise.context_step**2
                       + noise.item_step**2))


def draw(levels_BKT: np.ndarray, noise: Noise, size: Size, random: np.random.Generator
         ) -> Simulated:
  """Returns scores of trajectories with these levels in log-odds."""
  n_series = len(levels_BKT)
  shape = (n_series, size.n_datasets, size.n_checkpoints)
  center = levels_BKT + noise.common_step * _autocorrelated(
      shape, noise.common_correlation, random)
  odds_BKTC = center[..., None] + np.moveaxis(
      noise.context_step * _autocorrelated((*shape[:2], size.n_contexts, shape[2]),
                                           noise.context_correlation, random), -1, -2)
  odds_BKTC += noise.context * random.standard_normal((*shape[:2], 1, size.n_contexts))
  item = noise.item * random.standard_normal(
      (n_series, size.n_datasets, size.n_contexts, size.n_items), np.float32)
  margin_BKTC, accuracy_BKTC = np.empty_like(odds_BKTC), np.empty_like(odds_BKTC)
  for t in range(size.n_checkpoints):  # One checkpoint at a time fits into caches.
    odds = random.standard_normal(item.shape, np.float32)
    odds *= noise.item_step
    odds += item
    odds += odds_BKTC[:, :, t, :, None].astype(np.float32)
    accuracy_BKTC[:, :, t] = np.mean(odds > 0, -1)
    odds /= 2
    margin_BKTC[:, :, t] = np.tanh(odds, out=odds).mean(-1)
  deviation = spread(noise)
  return Simulated(margin_BKTC, accuracy_BKTC, expected_margin(center, deviation),
                   ndtr(center / deviation))


def constant(size: Size, deviation: float, n: int, random: np.random.Generator) -> np.ndarray:
  """Returns levels (B, K, T) that stay at a margin between -0.9 and 0.9."""
  margin = random.uniform(-0.9, 0.9, (n, size.n_datasets, 1))
  return np.repeat(level_of_margin(margin, deviation), size.n_checkpoints, -1)


def smooth_rise(size: Size, deviation: float, n: int, random: np.random.Generator) -> np.ndarray:
  """Returns levels of margins that rise or fall from -0.9 to 0.9 along a logistic curve.

  From a tenth to nine tenths of the way takes between a quarter and the whole of the trajectory.
  """
  shape = (n, size.n_datasets, 1)
  width = random.uniform(0.25, 1, shape) * size.n_checkpoints / (2 * np.log(9))
  middle = random.uniform(0.2, 0.8, shape) * size.n_checkpoints
  sign = random.choice([-1, 1], shape)
  time = np.arange(size.n_checkpoints)
  return level_of_margin(sign * 0.9 * np.tanh((time - middle) / width / 2), deviation)


def slow_drift(size: Size, deviation: float, n: int, random: np.random.Generator) -> np.ndarray:
  """Returns levels of margins that wander through 0 along a sum of slow waves."""
  time = np.arange(size.n_checkpoints) / size.n_checkpoints
  margin = np.zeros((n, size.n_datasets, size.n_checkpoints))
  for cycles in (0.5, 1, 1.5):
    phase = random.uniform(0, 2 * np.pi, (n, size.n_datasets, 1))
    margin += random.uniform(0, 0.3, phase.shape) * np.sin(2 * np.pi * cycles * time + phase)
  return level_of_margin(margin, deviation)


def near_the_center(size: Size, deviation: float, n: int, random: np.random.Generator
                    ) -> np.ndarray:
  """Returns constant levels of margins within 0.15 of 0, where noise alone changes sides."""
  margin = random.uniform(-0.15, 0.15, (n, size.n_datasets, 1))
  return np.repeat(level_of_margin(margin, deviation), size.n_checkpoints, -1)


def planted_hops(size: Size, deviation: float, n: int, random: np.random.Generator,
                 shift: float, dwell: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns levels with one hop in the first dataset, and its first checkpoint (B,).

  From margin -shift / 2 to shift / 2 for `dwell` checkpoints and back, or the reverse; half of
  the hops pass a checkpoint in the middle. The other datasets stay where they are.
  """
  start = random.integers(dwell + 1, size.n_checkpoints - 2 * dwell, n)
  time = np.arange(size.n_checkpoints)[None]
  inside = (time >= start[:, None]) & (time < (start + dwell)[:, None])
  margin = shift * (inside - 0.5)
  halfway = random.random(n) < 0.5
  margin[halfway, start[halfway] - 1] = 0.0
  margin *= random.choice([-1, 1], n)[:, None]
  levels = constant(size, deviation, n, random)
  levels[:, 0] = level_of_margin(margin, deviation)
  return levels, start


def _autocorrelated(shape, correlation, random):
  """AR(1) normals of variance one along the last axis."""
  noise = random.standard_normal(shape)
  for t in range(1, shape[-1]):
    noise[..., t] *= np.sqrt(1 - correlation**2)
    noise[..., t] += correlation * noise[..., t - 1]
  return noise
