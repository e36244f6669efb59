"""Points made of several checkpoints, and how far checkpoints are apart; one tensor at a time.

Sums are taken in float64 and rounded to float32 once.
"""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pyarrow as pa

from research.dynamics.series import Series
from research.errors import UserError

BLOCK_BYTES = 2**28  # of tensors in memory at a time, where pairs of checkpoints are compared


def uniform_weights(n: int) -> np.ndarray:
  """Returns the weights of the mean of n checkpoints, float64 [n]."""
  return np.full(n, 1 / n)


def ema_weights(n: int, decay: float) -> np.ndarray:
  """Returns the weights of an exponential moving average that begins at the first checkpoint.

  e_0 = x_0 and e_k = decay e_(k-1) + (1 - decay) x_k, so x_k weighs (1 - decay) decay^(n-1-k) and
  x_0 all that is left, decay^(n-1). float64 [n], oldest first, sum 1.

  Raises:
    UserError: decay is not in [0, 1).
  """
  if not 0 <= decay < 1:
    raise UserError(f'--decay={decay} must lie in [0, 1)')
  weights = (1 - decay) * decay ** np.arange(n - 1, -1, -1, dtype=np.float64)
  weights[0] = decay ** (n - 1)
  return weights


def line_weights(at: float) -> np.ndarray:
  """Returns the weights of the point `at` on the line from one checkpoint (0) to another (1)."""
  return np.array([1 - at, at], np.float64)


def combined(series: Series, steps: Sequence[int], weights: np.ndarray
             ) -> Iterator[tuple[str, np.ndarray]]:
  """Yields (name, sum of weight x tensor in float32), reading one tensor of one step at a time.

  Raises:
    UserError: shapes differ between steps.
    DamagedError: a tensor is missing or not sound.
  """
  for name in series.names:
    total = None
    for step, weight in zip(steps, weights, strict=True):
      x = series.leaf(step, name)
      if total is None:
        total = np.zeros(x.shape)
      if x.shape != total.shape:
        raise UserError(f'{series.file_of(step, name)}: {name} has shape {x.shape} at step {step}, '
                        f'{total.shape} at step {steps[0]}')
      total += weight * x.astype(np.float64)
    yield name, total.astype(np.float32)


def _rows(series: Series, steps: Sequence[int], name: str) -> np.ndarray:
  return np.stack([series.leaf(step, name).astype(np.float64).ravel() for step in steps])


def distances(series: Series, steps: Sequence[int],
              progress: Callable[[str, int, int], None] | None = None) -> np.ndarray:
  """Returns the Euclidean distances between checkpoints over all parameters, float64 [T, T].

  Blocks of a tensor's checkpoints are compared two at a time, of BLOCK_BYTES in all.
  """
  squares_TT = np.zeros((len(steps), len(steps)))
  for number, name in enumerate(series.names):
    if progress:
      progress(name, number, len(series.names))
    size = 8 * max(1, series.leaf(steps[0], name).size)
    n = max(1, BLOCK_BYTES // (2 * size))
    blocks = [slice(i, i + n) for i in range(0, len(steps), n)]
    for i, first in enumerate(blocks):
      a_TP = _rows(series, steps[first], name)
      origin = a_TP[0].copy()
      a_TP -= origin  # What all have in common would cost digits below.
      for second in blocks[i:]:
        b_TP = a_TP if second is first else _rows(series, steps[second], name) - origin
        part_TT = ((a_TP**2).sum(1)[:, None] + (b_TP**2).sum(1)[None] - 2 * a_TP @ b_TP.T)
        squares_TT[first, second] += part_TT
        if second is not first:
          squares_TT[second, first] += part_TT.T
  np.fill_diagonal(squares_TT, 0.0)
  return np.sqrt(np.maximum(squares_TT, 0.0))


def norms(series: Series, steps: Sequence[int]) -> np.ndarray:
  """Returns the Euclidean norms of checkpoints over all parameters, float64 [T]."""
  squares = np.zeros(len(steps))
  for name in series.names:
    squares += [float((series.leaf(step, name).astype(np.float64)**2).sum()) for step in steps]
  return np.sqrt(squares)


def cyclic_table(steps: Sequence[int], distances_TT: np.ndarray, norms_T: np.ndarray) -> pa.Table:
  """Returns a row per pair of checkpoints that tells whether the way between them closes a cycle.

  relative: their distance over the root of the product of their norms. closure: their distance over
  the length of the way through all checkpoints in between; 1 on a straight line, near 0 where the
  model comes back, about 1 / sqrt(n) after n steps of a random walk. A cycle of a period shows as
  pairs of that lag with less closure than shorter lags have.
  """
  way = np.concatenate([[0.0], np.cumsum(np.diagonal(distances_TT, 1))])
  first, second = np.triu_indices(len(steps), 1)
  apart, length = distances_TT[first, second], way[second] - way[first]
  steps = np.asarray(steps)
  return pa.table({
      'step': steps[first], 'other_step': steps[second], 'lag': steps[second] - steps[first],
      'distance': apart, 'relative': apart / np.sqrt(norms_T[first] * norms_T[second]),
      'closure': np.divide(apart, length, out=np.ones_like(apart), where=length > 0)})


def by_lag(table: pa.Table) -> pa.Table:
  """Returns mean and least relative distance and closure of the pairs of each lag, by lag."""
  grouped = table.group_by('lag').aggregate([
      ('relative', 'mean'), ('relative', 'min'), ('closure', 'mean'), ('closure', 'min'),
      ('step', 'count')])
  return grouped.rename_columns(
      {'step_count': 'pairs'}).sort_by('lag').select(
          ['lag', 'pairs', 'relative_mean', 'relative_min', 'closure_mean', 'closure_min'])
