"""What the tensors of a series say about its soundness, with no hashes and no knowledge of the run.

Every tensor is followed through time on its own, three checkpoints of it in memory at once.
"""

from collections.abc import Callable, Iterator
import dataclasses
from typing import Any, NamedTuple

import numpy as np

from research.dynamics.series import Series
from research.training import hashes
from research.training.stored import DamagedError

# Frozen after seeds 0 and 1 of experiments/benchmarks/audit_faults.py, judged on others.
DETOUR = 3.0  # way through a checkpoint / way around it; independent noise gives 2, a line 1
JUMP = 5.0  # a step's length / the median of its neighbors
END_JUMP = 12.0  # the same at the first and the last checkpoint, which have one neighbor
OUTLIER = 10.0  # largest deviation of an element from its neighbors' mean / the median of that
NEAR = 5  # checkpoints on each side that are neighbors
# Distance of 1 from the next number.
_GRAIN = {'float64': 2.0**-52, 'float32': 2.0**-23, 'float16': 2.0**-10, 'bfloat16': 2.0**-7}


class Finding(NamedTuple):
  """One thing that is wrong with a series; `file` and `tensor` are '' where it is about none."""

  kind: str
  step: int
  file: str
  tensor: str
  problem: str

  def __str__(self) -> str:
    about = f'{self.tensor}: ' if self.tensor else ''
    return f'step {self.step}, {self.kind}: {self.file}: {about}{self.problem}'


@dataclasses.dataclass
class Followed:
  """One tensor through time, one entry per checkpoint in which it could be read.

  Attributes:
    steps: their steps.
    digests: content hashes.
    dtypes: stored dtypes by name.
    coarse: whether all values are exact in a dtype of fewer bits, though not all the same.
    n_nonfinite: elements that are no finite numbers.
    norms: Euclidean norms (of finite elements).
    peaks: largest magnitudes.
    moved: distance from the checkpoint before, 0 for the first.
    moved_most: largest movement of an element.
    around: distance between the checkpoints before and after, nan at the ends.
    outlier: largest deviation of an element from the line between its neighbors; nan at the ends.
    outlier_at: where that is, as an index text.
  """

  steps: list[int]
  digests: list[str]
  dtypes: list[str]
  coarse: list[bool]
  n_nonfinite: list[int]
  norms: np.ndarray
  peaks: np.ndarray
  moved: np.ndarray
  moved_most: np.ndarray
  around: np.ndarray
  outlier: np.ndarray
  outlier_at: list[str]

  @property
  def grains(self) -> np.ndarray:
    """One unit in the last place of each checkpoint's largest weight; 0 for dtypes not known."""
    names = ['bfloat16' if coarse else dtype
             for dtype, coarse in zip(self.dtypes, self.coarse, strict=True)]
    return self.peaks * np.array([_GRAIN.get(name, 0.0) for name in names])

  @property
  def detour(self) -> np.ndarray:
    """Way through each checkpoint over the way around it; 1 at the ends and where nothing moves."""
    after = np.append(self.moved[1:], 0.0)
    with np.errstate(divide='ignore', invalid='ignore'):
      ratio = (self.moved + after) / self.around
    return np.where(np.isnan(ratio), 1.0, ratio)


def _is_coarse(x: np.ndarray) -> bool:
  """Returns whether float32 values that differ are all exact in bfloat16."""
  if x.dtype != np.float32 or x.size < 2 or (x == x.flat[0]).all():
    return False
  return not (np.ascontiguousarray(x).view(np.uint32) & 0xFFFF).any()


def _outlier(before: np.ndarray, x: np.ndarray, after: np.ndarray, share: float
             ) -> tuple[float, str]:
  deviation = np.abs(x - (before + share * (after - before)))
  at = int(deviation.argmax()) if deviation.size else 0
  where = np.unravel_index(at, deviation.shape) if deviation.size else ()
  return float(deviation.max(initial=0.0)), str([int(i) for i in where])


def _distance(a: np.ndarray, b: np.ndarray) -> float:
  return float(np.linalg.norm((a - b).ravel()))


class _Follower:
  """Takes one tensor's checkpoints in order and keeps the last two."""

  def __init__(self):
    self.rows: dict[str, list] = {field.name: [] for field in dataclasses.fields(Followed)}
    self._kept: list[tuple[int, np.ndarray]] = []

  def take(self, step: int, stored: np.ndarray, digest: str) -> None:
    rows, x = self.rows, stored.astype(np.float64)
    n_nonfinite = int(x.size - np.isfinite(x).sum())
    x = np.nan_to_num(x, nan=0.0, posinf=0.0, neginf=0.0)
    with np.errstate(over='ignore'):
      entry = {
          'steps': step, 'digests': digest, 'dtypes': stored.dtype.name,
          'coarse': _is_coarse(stored), 'n_nonfinite': n_nonfinite,
          'norms': float(np.linalg.norm(x.ravel())), 'peaks': float(np.abs(x).max(initial=0.0)),
          'moved': 0.0, 'moved_most': 0.0, 'around': np.nan, 'outlier': np.nan, 'outlier_at': ''}
      same = [(s, kept) for s, kept in self._kept if kept.shape == x.shape]
      if same:
        before = same[-1][1]
        entry['moved'] = _distance(x, before)
        entry['moved_most'] = float(np.abs(x - before).max(initial=0.0))
      if len(same) == 2:
        (first, a), (middle, b) = same
        rows['around'][-1] = _distance(x, a)
        rows['outlier'][-1], rows['outlier_at'][-1] = _outlier(
            a, b, x, (middle - first) / (step - first))
    for name, value in entry.items():
      rows[name].append(value)
    self._kept = [*same[-1:], (step, x)]


def follow(series: Series, name: str, report: Callable[[Finding], None]) -> Followed:
  """Returns one tensor through time; what cannot be read is reported and left out."""
  follower, shape = _Follower(), None
  for step in series.steps:
    try:
      x = series.leaf(step, name)
    except DamagedError as error:
      report(Finding('damaged', step, str(series.file_of(step, name)), name,
                     str(error).partition(': ')[2] or str(error)))
      continue
    if shape not in (None, x.shape):
      report(Finding('shape', step, str(series.file_of(step, name)), name,
                     f'has shape {x.shape}, before it was {shape}'))
    shape = x.shape
    follower.take(step, x, series.recorded(step, name) or hashes.digest(x))
  lists = ('steps', 'digests', 'dtypes', 'coarse', 'n_nonfinite', 'outlier_at')
  return Followed(**{key: value if key in lists else np.array(value, np.float64)
                     for key, value in follower.rows.items()})


def _near_median(values: np.ndarray, i: int, without: tuple[int, ...]) -> float:
  """Returns the median of the values near i, but for some; nan without any."""
  near = [j for j in range(max(0, i - NEAR), min(len(values), i + NEAR + 1)) if j not in without]
  near = [values[j] for j in near if np.isfinite(values[j])]
  return float(np.median(near)) if near else np.nan


def _jumps(followed: Followed) -> Iterator[tuple[int, str]]:
  """Yields checkpoints that lie off the way of their neighbors, and in which sense."""
  moved, detour, n = followed.moved, followed.detour, len(followed.steps)
  grains = followed.grains  # What moves by less than these is noise of rounding.
  for i in range(1, n - 1):
    usual = _near_median(moved, i, (0, i, i + 1))
    least = min(moved[i], moved[i + 1])
    if least > 0 and detour[i] > DETOUR and least > JUMP * np.fmax(usual, grains[i]):
      yield i, (f'lies off the way from step {followed.steps[i - 1]} to {followed.steps[i + 1]}: '
                f'{detour[i]:.3g} times as far as past it')
  if n < 4:
    return
  gaps = np.diff(followed.steps)
  for i, last, before in ((0, 1, 2), (n - 1, n - 1, n - 2)):
    usual = _near_median(moved, last, (0, last)) * max(1.0, gaps[last - 1] / gaps[before - 1])
    usual = np.maximum(usual, grains[i])
    if moved[last] > END_JUMP * usual:
      yield i, (f'is {moved[last]:.3g} away from its neighbor, which moved {usual:.3g} before or '
                'after')


def _outliers(followed: Followed) -> Iterator[tuple[int, str]]:
  """Yields checkpoints in which some element jumps and jumps back."""
  outlier, gaps = np.nan_to_num(followed.outlier), np.diff(followed.steps)
  # Between checkpoints that are close together, elements stray less.
  apart = np.minimum(np.append(gaps, gaps[-1:]), np.append(gaps[:1], gaps))
  for i in range(1, len(outlier) - 1):
    others = i - 1, i, i + 1
    usual = np.maximum(_near_median(followed.outlier, i, others),
                       _near_median(followed.outlier / apart, i, others) * apart[i])
    usual = np.maximum(usual, followed.grains[i])
    is_peak = outlier[i] >= max(outlier[i - 1], outlier[i + 1])
    if is_peak and outlier[i] > OUTLIER * usual:
      yield _blamed(followed, i), (
          f'element {followed.outlier_at[i]} is {outlier[i]:.3g} off the line through steps '
          f'{followed.steps[i - 1]} to {followed.steps[i + 1]}; usual is {usual:.3g}')


def _blamed(followed: Followed, i: int) -> int:
  """Returns which of three checkpoints is off the line: the middle, unless an end of the series is.

  An end is where the jump is only on its side of the middle.
  """
  most, last = followed.moved_most, len(followed.steps) - 1
  if i == last - 1 and most[i] < most[i + 1] / 2:
    return last
  if i == 1 and most[2] < most[1] / 2:
    return 0
  return i


def judge_tensor(name: str, followed: Followed, file_of: Callable[[int, str], Any]
                 ) -> Iterator[Finding]:
  """Yields what one tensor's own history says: kinds nonfinite, dtype, jump and outlier."""
  def finding(kind: str, i: int, problem: str) -> Finding:
    step = followed.steps[i]
    return Finding(kind, step, str(file_of(step, name)), name, problem)

  usual = max(set(followed.dtypes), key=followed.dtypes.count, default='')
  mostly_fine = sum(followed.coarse) < len(followed.coarse) / 2
  jumped = set()
  for i, count in enumerate(followed.n_nonfinite):
    if count:
      yield finding('nonfinite', i, f'{count} elements are not finite')
    if followed.dtypes[i] != usual:
      yield finding('dtype', i, f'is {followed.dtypes[i]}, in most checkpoints {usual}')
    elif followed.coarse[i] and mostly_fine:
      yield finding('dtype', i, 'is float32 but holds bfloat16 values only, unlike most checkpoints')
  for i, problem in _jumps(followed):
    jumped.add(i)
    yield finding('jump', i, problem)
  for i, problem in _outliers(followed):
    if i not in jumped:
      yield finding('outlier', i, problem)
