"""Mixtures: which source, and which of its rows, stands at each place of the endless row order.

Between two changes of the weights the order is cut into windows of at most WINDOW rows. In a
window each source has its quota of rows (largest remainder), in an order permuted by (seed,
window); a source's rows are used in its own order, so none repeats before its epoch ends.
"""

import bisect
import functools

import numpy as np

from research.data.errors import DataError

WINDOW = 4096  # rows: the longest stretch over which shares are exact to one row


def largest_remainder(weights: np.ndarray, n: int) -> np.ndarray:
  """Whole quotas that sum to n, in proportion to weights (Hamilton's method).

  Ties go to the earlier source.
  """
  exact = np.asarray(weights, np.float64) / np.sum(weights) * n
  quotas = np.floor(exact).astype(np.int64)
  left = n - int(quotas.sum())
  # Rounding keeps equal remainders equal, so that the tie rule decides and not the last bit.
  order = np.argsort(-np.round(exact - quotas, 9), kind='stable')
  quotas[order[:left]] += 1
  return quotas


class WeightSchedule:
  """Weights by step: constant from each window's start step to the next."""

  def __init__(self, windows: list[tuple[int, tuple[float, ...]]]):
    """Takes (start step, weights) in order, the first starting at step 0."""
    self.start_steps = [int(start) for start, _ in windows]
    self.weights = [np.asarray(weights, np.float64) for _, weights in windows]
    if not windows or self.start_steps[0] != 0 or sorted(set(self.start_steps)) != self.start_steps:
      raise DataError(f'a weight schedule starts at step 0 and rises; got {self.start_steps}')

  def at(self, step: int) -> np.ndarray:
    """Shares at a step, summing to 1."""
    weights = self.weights[bisect.bisect_right(self.start_steps, step) - 1]
    return weights / weights.sum()


class Mixture:
  """The row order of several sources, as a pure function of the row index."""

  def __init__(self, schedule: WeightSchedule, batch_size: int, seed: int, window: int = WINDOW):
    """`schedule` is in steps of `batch_size` rows; `window` is in rows."""
    self._schedule, self._seed, self._window = schedule, seed, window
    self._starts = [step * batch_size for step in schedule.start_steps]  # rows
    # Rows of each source before the start of each stretch of constant weights.
    self._before = [np.zeros(len(schedule.weights[0]), np.int64)]
    for k in range(len(self._starts) - 1):
      self._before.append(self._before[k] + self._counts(k, self._starts[k + 1] - self._starts[k]))
    self._cached_window = functools.lru_cache(maxsize=8)(self._permuted_window)
    self._check_everyone_is_seen()

  def place(self, j: int) -> tuple[int, int]:
    """(source, index within that source's endless order) of row j."""
    k = bisect.bisect_right(self._starts, j) - 1
    w, at = divmod(j - self._starts[k], self._window)
    sources, indices = self._cached_window(k, w)
    return int(sources[at]), int(indices[at])

  def counts(self, j: int) -> np.ndarray:
    """How many of the rows before row j belong to each source; int64."""
    k = bisect.bisect_right(self._starts, j) - 1
    whole, rest = divmod(j - self._starts[k], self._window)
    counts = self._before[k] + self._counts(k, whole * self._window)
    if rest:
      sources, _ = self._cached_window(k, whole)
      counts = counts + np.bincount(sources[:rest], minlength=len(counts))
    return counts

  def _length(self, k: int, w: int) -> int:
    """Rows in window w of stretch k; the last one is cut short by the next stretch."""
    if k + 1 == len(self._starts):
      return self._window
    return min(self._window, self._starts[k + 1] - self._starts[k] - w * self._window)

  def _counts(self, k: int, n: int) -> np.ndarray:
    """Rows of each source in the first n rows of stretch k; n ends at the end of a window."""
    whole, rest = divmod(n, self._window)
    counts = whole * largest_remainder(self._schedule.weights[k], self._window)
    return counts + largest_remainder(self._schedule.weights[k], rest)

  def _permuted_window(self, k: int, w: int) -> tuple[np.ndarray, np.ndarray]:
    """Source of each row of a window, and the row's index within its source."""
    quotas = largest_remainder(self._schedule.weights[k], self._length(k, w))
    start = self._starts[k] + w * self._window
    rng = np.random.default_rng((self._seed, start))
    sources = rng.permutation(np.repeat(np.arange(len(quotas)), quotas))
    earlier = self._before[k] + self._counts(k, w * self._window)
    indices = np.empty(len(sources), np.int64)
    for s, first in enumerate(earlier):
      mine = np.flatnonzero(sources == s)
      indices[mine] = first + np.arange(len(mine))
    return sources, indices

  def _check_everyone_is_seen(self):
    wanted, seen = np.zeros_like(self._before[0], bool), self._before[-1].copy()
    for weights in self._schedule.weights:
      wanted |= weights > 0
    seen += largest_remainder(self._schedule.weights[-1], self._window)
    if (wanted & (seen == 0)).any():
      source = int(np.flatnonzero(wanted & (seen == 0))[0])
      raise DataError(f'source {source} of the mixture has so small a positive weight that it '
                      f'gets no row in {self._window} rows; raise it or set it to 0')
