"""What would have happened with other data: a run again with edited windows, beside its original."""

from collections.abc import Sequence
import csv
import dataclasses
import io

import numpy as np

from research.data.edits import Edit, check_edits
from research.dynamics.curves import Curves, read_curves
from research.dynamics.intervals import Band, over_contexts
from research.dynamics.original import Original
from research.dynamics.replay import replay
from research.errors import UserError
from research.monitors.table import read_item_table
from research.run_dir import RunDir, write_whole
from research.training.logs import read_rows


@dataclasses.dataclass(frozen=True)
class Compared:
  """One quantity in both runs.

  Attributes:
    name: 'loss', 'heldout_loss', or the accuracy of a family (controls by 'control: family').
    steps: int [T], steps at which both have it.
    original, changed: its course in both; bands over demonstration contexts for accuracies.
    after: bool [T], steps that come after the first changed batch; of 'loss', those of them that
      were fed the same batch in both runs.
    gap: mean over those steps of changed - original.
    low, high: 95% interval of `gap` over demonstration contexts, which both runs share; NaN for
      losses and where there are too few contexts.
  """

  name: str
  steps: np.ndarray
  original: Band
  changed: Band
  after: np.ndarray
  gap: float
  low: float
  high: float

  @property
  def largest(self) -> tuple[int, float]:
    """The step after the first changed batch where the two differ most, and changed - original."""
    gaps = (self.changed.mean - self.original.mean)[self.after]
    at = int(np.argmax(np.abs(gaps)))
    return int(self.steps[self.after][at]), float(gaps[at])


def counterfactual(original: Original, run_dir: RunDir, edits: Sequence[Edit], until: int,
                   overrides: Sequence[tuple[str, str]] = ()) -> tuple[str, list[Compared]]:
  """Makes a run again with edited data up to step `until`; returns how it compares, in words too.

  Everything but the data is the original's: RNG, schedule, number of steps. What comes before the
  first changed batch is checked to be equal, bit for bit. Writes comparison.csv into run_dir.

  Raises:
    UserError: no edits, windows that do not exist or do not fit, or that end after `until`.
    ReplayError: a difference before the first changed batch.
  """
  if not edits:
    raise UserError('there is nothing to change; give at least one --edit')
  check_edits(edits, original.config.data, original.config.n_steps)
  first = min(a for edit in edits for a, _ in edit.changed or edit.windows)
  if not original.first <= first < until <= original.last:
    raise UserError(f'--until={until}: the edits begin at step {first}, and {original.name} holds '
                    f'steps {original.first}:{original.last}')
  for edit in edits:
    for a, b in edit.changed:
      if b > until:
        raise UserError(f'edit {str(edit)!r} changes steps {a}:{b}, but --until={until} comes '
                        f'before; the run has steps up to {original.last}')
  said = replay(original, run_dir, (first, until), list(overrides), edits)
  compared = compare(original.run_dir, run_dir, first, edits)
  write_whole(run_dir.comparison_csv, as_csv(compared))
  return said, compared


def compare(original: RunDir, changed: RunDir, first: int, edits: Sequence[Edit]
            ) -> list[Compared]:
  """Returns losses and accuracies that both runs have; gaps are of steps after `first`.

  The loss of a step whose batch an edit changed is of other tokens, and left out of the gap. What
  cannot be compared is said.
  """
  found = []
  for name, log in (('loss', 'metrics_jsonl'), ('heldout_loss', 'evals_jsonl')):
    rows = [{row['step']: row[name] for row in read_rows(getattr(run, log))}
            for run in (original, changed)]
    steps = np.array(sorted(rows[0].keys() & rows[1].keys()), np.int64)
    after = steps > first
    if name == 'loss':
      for a, b in (window for edit in edits for window in edit.changed):
        after &= (steps <= a) | (steps > b)
      if not np.any(after):
        print('the loss is not compared: no step after the first change was fed the same batch in '
              'both runs', flush=True)
    if np.any(after):
      values = [np.array([by_step[step] for step in steps.tolist()]) for by_step in rows]
      nothing = np.full(len(steps), np.nan)
      found.append(Compared(
          name, steps, *(Band(value, nothing, nothing) for value in values), after,
          float(np.mean((values[1] - values[0])[after])), float('nan'), float('nan')))
  items = [read_item_table(run.monitor_items) if run.monitor_items.exists() else []
           for run in (original, changed)]
  if items[0] != items[1]:
    print(f'accuracies are not compared: {original.path} was scored with other monitor items than '
          f'{changed.path} ({len(items[0])} and {len(items[1])})', flush=True)
    return found
  curves = [read_curves(run.monitor_items, run.monitor_scores) for run in (original, changed)]
  return found + _families(*curves, first)


def _families(original: Curves, changed: Curves, first: int) -> list[Compared]:
  steps, rows, other_rows = np.intersect1d(original.steps, changed.steps, return_indices=True)
  if not np.any(steps > first):
    return []
  found, after = [], steps > first
  for is_control, family in sorted({(c.is_control, c.family) for c in original.contexts}):
    index = [i for i, c in enumerate(original.contexts)
             if (c.is_control, c.family) == (is_control, family)]
    sizes = [original.contexts[i].n_items for i in index]
    datasets = [original.contexts[i].dataset for i in index]
    pair = [original.accuracy_TC[rows][:, index], changed.accuracy_TC[other_rows][:, index]]
    gap = over_contexts((pair[1] - pair[0])[after].mean(0, keepdims=True), sizes, datasets,
                        bounds=(-1., 1.))
    bands = [over_contexts(values_TC, sizes, datasets, bounds=(0., 1.)) for values_TC in pair]
    found.append(Compared(
        f'control: {family}' if is_control else family, steps, *bands, after,
        float(gap.mean[0]), float(gap.low[0]), float(gap.high[0])))
  return found


def as_csv(compared: Sequence[Compared]) -> str:
  """Returns one line per quantity: means after the first changed batch, gap, interval, extremes."""
  text = io.StringIO()
  writer = csv.writer(text)
  writer.writerow(['quantity', 'n_steps', 'original', 'changed', 'gap', 'gap_low', 'gap_high',
                   'largest_gap', 'at_step', 'last_step', 'last_gap'])
  for row in compared:
    at, largest = row.largest
    writer.writerow([
        row.name, int(row.after.sum()), row.original.mean[row.after].mean(),
        row.changed.mean[row.after].mean(), row.gap, row.low, row.high, largest, at,
        int(row.steps[-1]), row.changed.mean[-1] - row.original.mean[-1]])
  return text.getvalue()


def as_text(compared: Sequence[Compared]) -> str:
  """Returns the same as a table for people."""
  lines = [f'{"":24}{"original":>10}{"changed":>10}{"gap":>10}  95% interval        largest']
  for row in compared:
    at, largest = row.largest
    interval = '' if np.isnan(row.low) else f'[{row.low:+.4f}, {row.high:+.4f}]'
    lines.append(f'{row.name:24}{row.original.mean[row.after].mean():10.4f}'
                 f'{row.changed.mean[row.after].mean():10.4f}{row.gap:+10.4f}  {interval:20}'
                 f'{largest:+.4f} at step {at}')
  return '\n'.join(lines)
