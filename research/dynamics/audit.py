"""The audit of any series of checkpoints: each tensor through time, then what tensors say together."""

import collections
from collections.abc import Callable, Sequence
import itertools
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from research.dynamics.audit_content import Finding, Followed, follow, judge_tensor
from research.dynamics.audit_equal import Reach, equal_checkpoints
from research.dynamics.series import Series
from research.training.stored import DamagedError

Bound = Callable[[int, int, float], float]

MOST_SWAPPED = 32  # tensors that jump at one step, so that pairs of them are looked at


def audit_series(series: Series, bound: Bound | None = None, reach: Reach | None = None,
                 progress: Callable[[str, int, int], None] | None = None
                 ) -> tuple[list[Finding], dict[str, Followed]]:
  """Returns what is wrong with a series, by its tensors alone, and the history of each tensor.

  Tensors are read one at a time; three checkpoints of one tensor are in memory at once.

  Args:
    series: the checkpoints.
    bound: (step, later step, largest weight) -> farthest that an element can move in between;
      None where it is not known.
    reach: the same before an element is rounded to the stored dtype, without skipped steps.
    progress: called with the tensor's name, its number from 0 and how many there are.
  """
  findings: list[Finding] = []
  histories = {}
  for number, name in enumerate(series.names):
    if progress:
      progress(name, number, len(series.names))
    followed = histories[name] = follow(series, name, findings.append)
    findings += judge_tensor(name, followed, series.file_of)
    if bound:
      findings += _too_far(name, followed, series, bound)
  findings += equal_checkpoints(series, histories, reach)
  findings += _swapped(series, findings)
  return sorted(findings, key=lambda finding: (finding.step, finding.kind, finding.tensor)), histories


def _too_far(name: str, followed: Followed, series: Series, bound: Bound) -> list[Finding]:
  """Returns the checkpoints to which some element moved farther than the optimizer can move it."""
  found, steps = [], followed.steps
  excess = {}
  for i in range(1, len(steps)):
    allowed = bound(steps[i - 1], steps[i], max(followed.peaks[i - 1], followed.peaks[i]))
    if followed.moved_most[i] > allowed:
      excess[i] = allowed
  for i, allowed in excess.items():
    if i - 1 in excess:
      continue  # The way back from a checkpoint that is wrong itself.
    # The first checkpoint is the wrong one where the way on from the second is as it should be.
    wrong = 0 if i == 1 and 2 not in excess and len(steps) > 2 else i
    found.append(Finding(
        'too far', steps[wrong], str(series.file_of(steps[wrong], name)), name,
        f'an element moves by {followed.moved_most[i]:.3g} between steps {steps[i - 1]} and '
        f'{steps[i]}; the learning rate allows {allowed:.3g}'))
  return found


def _swapped(series: Series, findings: Sequence[Finding]) -> list[Finding]:
  """Returns pairs of tensors that jumped at one step, each to where the other had been."""
  jumps = collections.defaultdict(list)
  for finding in findings:
    if finding.kind == 'jump':
      jumps[finding.step].append(finding)
  found = []
  for step, jumped in jumps.items():
    if len(jumped) > MOST_SWAPPED:
      continue  # The whole moved; comparing every pair would read it hundreds of times.
    i = series.steps.index(step)
    near = series.steps[i - 1] if i else series.steps[1]
    for a, b in itertools.combinations(jumped, 2):
      if _exchanged(series, step, near, a.tensor, b.tensor):
        found.append(Finding('swapped', step, a.file, a.tensor,
                             f'holds {b.tensor}, and {b.file} holds {a.tensor}'))
  return found


def _exchanged(series: Series, step: int, near: int, a: str, b: str) -> bool:
  """Returns whether each of two tensors is closer to the other's neighbor than to its own."""
  def distance(name: str, other: str) -> float:
    x, y = series.leaf(step, name), series.leaf(near, other)
    return np.inf if x.shape != y.shape else float(
        np.linalg.norm((x.astype(np.float64) - y.astype(np.float64)).ravel()))
  try:
    return distance(a, b) < distance(a, a) / 2 and distance(b, a) < distance(b, b) / 2
  except DamagedError:
    return False


def norms_table(histories: dict[str, Followed]) -> pa.Table:
  """Returns a row per tensor and checkpoint: step, tensor, dtype, norm, peak, moved, detour, hash."""
  parts = [pa.table({
      'step': pa.array(followed.steps, pa.int64()), 'tensor': [name] * len(followed.steps),
      'dtype': pa.array(followed.dtypes, pa.string()), 'norm': followed.norms,
      'largest': followed.peaks, 'moved': followed.moved, 'moved_most': followed.moved_most,
      'detour': followed.detour, 'outlier': followed.outlier,
      'n_nonfinite': pa.array(followed.n_nonfinite, pa.int64()),
      'hash': pa.array(followed.digests, pa.string())})
           for name, followed in histories.items()]
  return pa.concat_tables(parts)


def write_table(table: pa.Table, path: pathlib.Path) -> None:
  """Writes a table as CSV where the name ends so, else as Parquet."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == '.csv':
    pyarrow.csv.write_csv(table, path)
  else:
    pq.write_table(table, path)
