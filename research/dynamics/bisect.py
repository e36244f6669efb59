"""Finds the two adjacent steps between which a monitor changes state, and confirms it.

Every state of the interval must be made whatever is searched, as training cannot skip steps; what a
search saves is scoring. So the interval is replayed once with a snapshot of every step and without
monitors; a binary search over the stored snapshots scores the logarithm of their number and gives
the answer early; then the rest are scored, which confirms it and finds all other changes. All items
of the suite are scored at once, and scores and snapshots stay in the replay's directory: a repeated
command goes on where it was, and a question about another dataset or threshold between the same
steps needs no training and no scoring again. Every question has result files of its own.
"""

import collections
from collections.abc import Callable, Sequence
import dataclasses
import difflib
import itertools
import json
import math
import pathlib
import sys
import time

import numpy as np

from parallelism.mesh import make_mesh
from research import build as build_lib
from research.data import tokenizers
from research.data.windows import document_rows, write_documents
from research.dynamics.intervals import over_contexts
from research.dynamics.original import Original, check_range, trained_on
from research.dynamics.replay import replay
from research.errors import UserError
from research.monitors import table, watch
from research.monitors.items import MonitorItem
from research.monitors.scoring import Scores
from research.reports.report import build_report
from research.run_dir import RunDir, write_whole
from research.training import manifest as manifest_lib
from research.training.logs import duration
from research.training.snapshots import SnapshotReader

DEFAULT_THRESHOLDS = {'accuracy': 0.5, 'margin': 0.0}
_SAID_EVERY = 5.0  # seconds between lines of progress


@dataclasses.dataclass(frozen=True)
class Reading:
  """A monitor at one step: accuracy and margin with 95% intervals over demonstration contexts.

  Bounds are NaN where one context leaves no interval.
  """

  step: int
  accuracy: float
  accuracy_low: float
  accuracy_high: float
  margin: float
  margin_low: float
  margin_high: float

  def __str__(self) -> str:
    return (f'accuracy {self.accuracy:.3f} [{self.accuracy_low:.3f}, {self.accuracy_high:.3f}], '
            f'margin {self.margin:+.3f} at step {self.step}')


@dataclasses.dataclass(frozen=True)
class Bisection:
  """What a search found.

  Attributes:
    state: the state function.
    readings: of every step of the interval, ascending.
    found: the adjacent pair of the binary search.
    changes: all adjacent pairs of steps in different states; more than one where it changes back.
  """

  dataset: str
  n_items: int
  state: 'Above'
  readings: tuple[Reading, ...]
  found: tuple[int, int]
  changes: tuple[tuple[int, int], ...]

  def at(self, step: int) -> Reading:
    """Returns the reading of a step."""
    return self.readings[step - self.readings[0].step]

  @property
  def question(self) -> str:
    """What was asked, in words."""
    return f'{self.dataset} {self.state}'

  def as_json(self) -> str:
    """Returns everything as JSON; bounds that do not exist are null."""
    readings = [{name: None if math.isnan(value) else value
                 for name, value in dataclasses.asdict(reading).items()}
                for reading in self.readings]
    return json.dumps({**dataclasses.asdict(self), 'state': str(self.state), 'readings': readings},
                      indent=2) + '\n'

  def __str__(self) -> str:
    first, last = self.readings[0].step, self.readings[-1].step
    a, b = self.found
    lines = [f'{self.dataset} ({self.n_items} items, {self.state}) changes between steps {a} and '
             f'{b}:', f'  {self.at(a)}', f'  {self.at(b)}', *self._certainty()]
    if len(self.changes) == 1:
      lines.append(f'confirmed: scored at every step from {first} to {last}, it changes only there')
    else:
      lines.append(f'scored at every step from {first} to {last}, it changes {len(self.changes)} '
                   'times:')
      lines += [f'  {a} to {b}: accuracy {self.at(a).accuracy:.3f} to {self.at(b).accuracy:.3f}, '
                f'margin {self.at(a).margin:+.3f} to {self.at(b).margin:+.3f}'
                for a, b in self.changes]
    return '\n'.join(lines)

  def _certainty(self) -> list[str]:
    """Returns what to say where an interval beside the change contains the threshold."""
    a, b = self.found
    within = [step for step in self.found if not self.state.excluded_by(self.at(step))]
    if not within:
      return []
    first, last = self.readings[0].step, self.readings[-1].step
    before = [step for step in range(first, a + 1) if self.state.excluded_by(self.at(step))]
    after = [step for step in range(b, last + 1) if self.state.excluded_by(self.at(step))]
    return [f'  not certain: no 95% interval over demonstration contexts excludes '
            f'{self.state.threshold:g} at step {" and ".join(map(str, within))}; the last before '
            f'that does is of step {before[-1] if before else "(none)"}, the first after of step '
            f'{after[0] if after else "(none)"}']


@dataclasses.dataclass(frozen=True)
class Above:
  """The state function: is a measure above its threshold?"""

  measure: str
  threshold: float

  def __call__(self, reading: Reading) -> bool:
    return getattr(reading, self.measure) > self.threshold

  def excluded_by(self, reading: Reading) -> bool:
    """Returns whether the interval of a reading lies on one side of the threshold; no: none is."""
    low, high = (getattr(reading, f'{self.measure}_{end}') for end in ('low', 'high'))
    return low > self.threshold or high < self.threshold

  def __str__(self) -> str:
    return f'{self.measure} > {self.threshold:g}'


def above(measure: str = 'accuracy', threshold: float | None = None) -> Above:
  """Returns the state function of a measure; the default threshold is the measure's middle.

  Raises:
    UserError: an unknown measure.
  """
  if measure not in DEFAULT_THRESHOLDS:
    raise UserError(f'--measure={measure}: must be one of {", ".join(DEFAULT_THRESHOLDS)}')
  return Above(measure, DEFAULT_THRESHOLDS[measure] if threshold is None else threshold)


def read_monitor(items: Sequence[MonitorItem], step: int, scores: Scores) -> Reading:
  """Returns the reading of all items together."""
  rows = table.summary(items, step, scores)
  bands = []
  for values, bounds in (([row.accuracy for row in rows], (0., 1.)),
                         ([row.margin for row in rows], (-1., 1.))):
    band = over_contexts(np.array([values]), [row.n_items for row in rows],
                         [row.dataset for row in rows], bounds=bounds)
    bands += [float(band.mean[0]), float(band.low[0]), float(band.high[0])]
  return Reading(step, *bands)


def search(state: Callable[[int], bool], first: int, last: int) -> tuple[int, int]:
  """Returns adjacent steps in different states by halving, given that `first` and `last` differ."""
  at_first = state(first)
  while last - first > 1:
    middle = (first + last) // 2
    first, last = (middle, last) if state(middle) == at_first else (first, middle)
  return first, last


def suite_of(original: Original, overrides: list[tuple[str, str]]) -> list[MonitorItem]:
  """Returns the items that the run was scored with, or those of a suite that overrides name."""
  config, changed = original.configured(overrides)
  if 'monitors.suite' in changed or not original.run_dir.monitor_items.exists():
    tokenizer = tokenizers.load(original.run_dir.tokenizer_json)
    return watch.read_suite(config, tokenizer, original.manifest['start_id']).items
  return table.read_item_table(original.run_dir.monitor_items)


def chosen_items(items: Sequence[MonitorItem], dataset: str) -> list[MonitorItem]:
  """Returns the items of a dataset, or those of a family that are no controls.

  Raises:
    UserError: no such dataset; the message names those that there are.
  """
  chosen = [item for item in items if item.dataset == dataset] or [
      item for item in items if item.family == dataset and not item.is_control]
  if not chosen:
    names = sorted({item.dataset for item in items})
    near = difflib.get_close_matches(dataset, names, n=1, cutoff=0.0)
    raise UserError(f'--dataset={dataset}: no such dataset among the monitor items; '
                    + (f'the nearest is {near[0]} (all: {", ".join(names)})' if names else
                       'there are none, name a suite with --config.monitors.suite'))
  return chosen


class _Readings:
  """Readings of the snapshots of a replay, scored when first asked for and kept on disk.

  All of `suite` is scored, `items` of it are read.
  """

  def __init__(self, original: Original, run_dir: RunDir, suite: list[MonitorItem],
               items: list[MonitorItem], overrides: list[tuple[str, str]]):
    config, _ = original.configured(overrides)
    manifest = manifest_lib.read(run_dir)
    self._built = build_lib.build(config, make_mesh(config.mesh), manifest['numerics'])
    self._scorer = watch.make_scorer(config, tokenizers.load(run_dir.tokenizer_json),
                                     manifest['start_id'], self._built, suite)
    self._suite, self._items, self._run_dir = suite, items, run_dir
    self._snapshots = SnapshotReader(run_dir.snapshots)
    if not run_dir.monitor_items.exists():
      table.write_item_table(run_dir.monitor_items, suite, self._scorer.encoded)

  def __call__(self, step: int) -> Reading:
    path = watch.scored_path(self._run_dir, step)
    if not path.exists():
      stored = self._built.place_params(self._snapshots.params(step, self._built.params))
      scores = watch.score_snapshot(self._scorer, self._built, stored)
      table.write_scores(self._run_dir.monitor_scores, step, scores)
    return _read_items(self._suite, self._items, step, table.read_scores(path)[1])


def bisect(original: Original, run_dir: RunDir, between: tuple[int, int], dataset: str,
           state: Above, overrides: Sequence[tuple[str, str]] = ()) -> Bisection:
  """Returns the step at which a monitor changes state, and every change of the interval.

  Writes the answer, the documents of the found step and a report into the replay's directory.

  Args:
    original: the run.
    run_dir: where the interval is replayed.
    between: two steps on either side of the change.
    dataset: of the monitor's items, or a family.
    state: reading -> state.
    overrides: placement settings of the replay.

  Raises:
    UserError: no such steps or dataset, or both steps are in the same state.
    ReplayError: the replay is not the original's, on the same machine, mesh and packages.
  """
  overrides = list(overrides)
  check_range(original, *between, '--between')
  suite = suite_of(original, overrides)
  items = chosen_items(suite, dataset)
  if run_dir.monitor_items.exists() and table.read_item_table(run_dir.monitor_items) != suite:
    raise UserError(f'{run_dir.path} holds scores of other items; choose another directory')
  _check_stored_ends(original, between, items, dataset, state)
  every_step = [('checkpoints.snapshot_every', '1'), ('monitors.suite', 'none'),
                ('evals.every', '0')]
  print(replay(original, run_dir, between, [*overrides, *every_step]), flush=True)
  readings = _Readings(original, run_dir, suite, items, overrides)
  _check_ends([readings(step) for step in between], dataset, state)

  def said_state(step: int) -> bool:
    reading = readings(step)
    print(f'  {reading}', flush=True)
    return state(reading)

  found = search(said_state, *between)
  print(f'{dataset} changes between steps {found[0]} and {found[1]}; scoring the others to confirm',
        flush=True)
  all_readings = _every_reading(readings, between)
  states = [state(reading) for reading in all_readings]
  changes = [(between[0] + i, between[0] + i + 1) for i, (old, new) in enumerate(
      itertools.pairwise(states)) if old != new]
  result = Bisection(dataset, len(items), state, tuple(all_readings), found, tuple(changes))
  write_whole(run_dir.bisection_json(result.question), result.as_json())
  _write_documents(original, run_dir.documents_parquet(result.question), found)
  build_report(run_dir)
  return result


def _check_stored_ends(original, between, items, dataset, state) -> None:
  """Raises UserError where the original's own scores already say that both ends are alike."""
  folder = original.run_dir.monitor_scores
  files = [folder / table.scores_name(step) for step in between]
  if not all(file.exists() for file in files):
    return
  scored = table.read_item_table(original.run_dir.monitor_items)
  if set(items) <= set(scored):
    _check_ends([_read_items(scored, items, step, scores)
                 for step, scores in map(table.read_scores, files)], dataset, state)


def _read_items(scored: Sequence[MonitorItem], items: Sequence[MonitorItem], step: int,
                scores: Scores) -> Reading:
  """Returns the reading of those `items` of all that were scored."""
  index = {item: i for i, item in enumerate(scored)}
  rows = [index[item] for item in items]
  return read_monitor(items, step, Scores(*(column[rows] for column in scores)))


def _check_ends(ends: list[Reading], dataset: str, state) -> None:
  if state(ends[0]) == state(ends[1]):
    raise UserError(f'{dataset} is in the same state at both ends ({ends[0]}; {ends[1]}); choose '
                    'steps on either side of a change, or another --threshold')


def _every_reading(readings: _Readings, between: tuple[int, int]) -> list[Reading]:
  """Returns the reading of every step, saying where it is."""
  found, began = [], time.monotonic()
  said = began
  for step in range(between[0], between[1] + 1):
    found.append(readings(step))
    now, left = time.monotonic(), between[1] - step
    if now - said > _SAID_EVERY:
      print(f'scored {len(found)} of {len(found) + left} steps  '
            f'ETA {duration((now - began) / len(found) * left)}', file=sys.stderr, flush=True)
      said = now
  return found


def _write_documents(original: Original, path: pathlib.Path, found: tuple[int, int]) -> None:
  """Writes the documents of the found step and says of which kinds they are."""
  source, batch_size = trained_on(original), original.config.data.batch_size
  kinds = collections.Counter()
  for row in document_rows(source, batch_size, *found):
    kinds[row['kind']] += row['n_tokens']
  n_documents = write_documents(path, source, batch_size, *found)
  print(f'what step {found[1]} was trained on: {n_documents} documents in '
        f'{path} ('
        + ', '.join(f'{kind} {n} tokens' for kind, n in kinds.most_common()) + ')', flush=True)
