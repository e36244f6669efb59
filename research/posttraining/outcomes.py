"""What fine-tunes did: rows by checkpoint and seed, means over seeds with intervals, tables."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from scipy import stats

from research.monitors import table
from research.posttraining.free_form import PUBLISHED, Answer
from research.run_dir import RunDir
from research.training.logs import read_rows

CONFIDENCE = 0.95


class Row(NamedTuple):
  """One line of the table: a checkpoint, a seed, and a set of items in one wording.

  `loss`: nats per token of responses, over the last tenth of the fine-tune's steps.
  """

  step: int
  seed: int
  family: str
  dataset: str
  variant: str
  is_control: bool
  n_items: int
  accuracy_before: float
  accuracy_after: float
  margin_before: float
  margin_after: float
  loss: float


class Outcome(NamedTuple):
  """One line of the summary: a measure of a dataset at a checkpoint, over all seeds.

  Attributes:
    step, dataset, is_control: which.
    measure: 'accuracy' (share of items whose generalizing answer is likelier), 'margin' (mean
      difference of the two probabilities), or 'free <verdict>': the share of free answers of it.
    n_seeds, n_items: of all seeds.
    before, after, change: means over items, each with the bounds of a 95% interval.
  """

  step: int
  dataset: str
  is_control: bool
  measure: str
  n_seeds: int
  n_items: int
  before: float
  before_low: float
  before_high: float
  after: float
  after_low: float
  after_high: float
  change: float
  change_low: float
  change_high: float


class _Seed(NamedTuple):
  """A measure of one seed, before and after, over n_items."""

  n_items: int
  before: float
  after: float


def compared(child: RunDir, step: int, seed: int, n_steps: int) -> list[Row]:
  """Returns the rows of one finished fine-tune: the same items before its first step and after.

  Of a fine-tune that scored no items there are none.
  """
  if not child.monitor_items.exists():
    return []
  items = table.read_item_table(child.monitor_items)
  scores = [table.read_scores(child.monitor_scores / table.scores_name(at))[1]
            for at in (0, n_steps)]
  good_TB, short_TB = (np.stack([getattr(s, name) for s in scores]).astype(np.float64)
                       for name in ('logp_generalizing', 'logp_shortcut'))
  groups: dict[tuple[str, str, str, bool], list[int]] = {}
  for i, item in enumerate(items):
    groups.setdefault((item.family, item.dataset, item.variant, item.is_control), []).append(i)
  loss = final_loss(child)
  rows = []
  for key, members in groups.items():
    accuracy = (good_TB > short_TB)[:, members].mean(axis=1)
    margin = (np.exp(good_TB) - np.exp(short_TB))[:, members].mean(axis=1)
    rows.append(Row(step, seed, *key, len(members), *accuracy.tolist(), *margin.tolist(), loss))
  return rows


def final_loss(child: RunDir) -> float:
  """Returns the mean loss over the last tenth of a run's steps, nats per token."""
  losses = [row['loss'] for row in read_rows(child.metrics_jsonl)]
  return float(np.mean(losses[-max(1, len(losses) // 10):]))


def summary(rows: Sequence[Row], answers: dict[tuple[int, int], Sequence[Answer]],
            is_generated: bool = True) -> list[Outcome]:
  """Returns every measure of every dataset by step, means over seeds.

  The interval of a mean is a Student t interval over seeds, whose data, items and order are drawn
  anew; of a share it is no narrower than the exact binomial interval over all items (Clopper and
  Pearson 1934), which alone is left where there is one seed: it says nothing of other fine-tunes.
  Without either it is NaN. That of a change is over seeds, whose items are the same before and
  after. Where all seeds are asked the same, in files and published questions, items count once, and
  what is no share has no interval: seeds say nothing of other items. Items that ask for one thing in
  several ways count as so many, so trust intervals of several seeds.

  Args:
    rows: of the table.
    answers: (step, seed) -> free answers.
    is_generated: whether items are drawn anew for every seed; published questions never are.
  """
  found: dict[tuple[int, str, bool, str], list[_Seed]] = {}
  for (step, _, dataset, is_control), mine in _grouped(
      rows, lambda row: (row.step, row.seed, row.dataset, row.is_control)).items():
    weights = [row.n_items for row in mine]
    for measure in ('accuracy', 'margin'):
      before, after = (float(np.average([getattr(row, f'{measure}_{when}') for row in mine],
                                        weights=weights)) for when in ('before', 'after'))
      found.setdefault((step, dataset, is_control, measure), []).append(
          _Seed(sum(weights), before, after))
  verdicts = {}
  for said in answers.values():
    for answer in said:
      verdicts.setdefault((answer.dataset, answer.is_control), {})[answer.verdict] = None
  for (step, _), said in answers.items():
    for (dataset, is_control), mine in _grouped(
        said, lambda answer: (answer.dataset, answer.is_control)).items():
      for verdict in sorted(verdicts[dataset, is_control]):
        found.setdefault((step, dataset, is_control, f'free {verdict}'), []).append(
            _shares(mine, verdict))
  return [_outcome(*key, seeds, alike=key[1] == PUBLISHED or not is_generated)
          for key, seeds in sorted(found.items(), key=lambda one: one[0][0])]


def _grouped(rows: Iterable, key: Callable) -> dict:
  groups: dict = {}
  for row in rows:
    groups.setdefault(key(row), []).append(row)
  return groups


def _shares(answers: Sequence[Answer], verdict: str) -> _Seed:
  """Returns the share of a verdict before the fine-tune and after."""
  before, after = ([answer.verdict == verdict for answer in answers if bool(answer.at) == late]
                   for late in (False, True))
  return _Seed(len(after), float(np.mean(before)), float(np.mean(after)))


def _outcome(step: int, dataset: str, is_control: bool, measure: str, seeds: Sequence[_Seed], *,
             alike: bool) -> Outcome:
  """Returns the outcome of a measure; `alike`: every seed was asked the same."""
  is_share = measure != 'margin'
  weights = np.asarray([seed.n_items for seed in seeds])
  before, after = (np.asarray([getattr(seed, when) for seed in seeds])
                   for when in ('before', 'after'))
  n_items = int(weights.max() if alike else weights.sum())
  bands = []
  for values, share in ((before, is_share), (after, is_share), (after - before, False)):
    mean, low, high = _interval(values, weights, n_items if share else 0)
    bands += [mean, *((np.nan, np.nan) if alike and not share else (low, high))]
  return Outcome(step, dataset, is_control, measure, len(seeds), n_items, *bands)


def _interval(values_S: np.ndarray, weights_S: np.ndarray, n_items: int
              ) -> tuple[float, float, float]:
  """Returns the mean over seeds and its bounds; see `summary`. A share is of `n_items`, else 0."""
  mean, low, high = float(np.average(values_S, weights=weights_S)), np.nan, np.nan
  if len(values_S) > 1:
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, len(values_S) - 1) * stats.sem(values_S)
    low, high = mean - half, mean + half
  if n_items:
    exact = stats.binomtest(round(mean * n_items), n_items).proportion_ci(CONFIDENCE)
    low, high = max(0.0, np.nanmin([low, exact.low])), min(1.0, np.nanmax([high, exact.high]))
  return mean, float(low), float(high)


def said(rows: Sequence[Row], answers: Sequence[Answer]) -> str:
  """Returns what one fine-tune did, in words: loss, accuracies, number of free answers."""
  parts = [f'loss {rows[0].loss:.3f}'] if rows else []
  for dataset, mine in _grouped(rows, lambda row: row.dataset).items():
    weights = [row.n_items for row in mine]
    before, after = (np.average([getattr(row, f'accuracy_{when}') for row in mine],
                                weights=weights) for when in ('before', 'after'))
    parts.append(f'{dataset} {before:.2f} -> {after:.2f}')
  if answers:
    parts.append(f'{sum(bool(answer.at) for answer in answers)} free answers after it')
  return ', '.join(parts) or 'nothing is asked'


def as_text(outcomes: Sequence[Outcome]) -> list[str]:
  """Returns lines for the screen: by dataset, measure and step."""
  lines = []
  for (dataset, is_control), mine in _grouped(
      outcomes, lambda one: (one.dataset, one.is_control)).items():
    lines.append(f'{dataset}{" (control)" if is_control else ""}')
    for one in sorted(mine, key=lambda one: (one.measure, one.step)):
      lines.append(
          f'  {one.measure:<18} step {one.step:>6}: '
          f'{_span(one.before, one.before_low, one.before_high)} -> '
          f'{_span(one.after, one.after_low, one.after_high)}, change '
          f'{_span(one.change, one.change_low, one.change_high)}')
  return lines


def _span(mean: float, low: float, high: float) -> str:
  return f'{mean:.2f}' + ('' if np.isnan(low) else f' [{low:.2f}, {high:.2f}]')


def read_table(folder: pathlib.Path) -> list[Row]:
  """Returns the rows that earlier commands wrote, none where there is no table."""
  path = folder / 'table.parquet'
  rows = pq.read_table(path).to_pylist() if path.exists() else []
  return [Row(**{'loss': np.nan, **row}) for row in rows]  # Older tables had no loss.


def read_outcomes(folder: pathlib.Path) -> list[Outcome]:
  """Returns the summary, nothing where there is none."""
  path = folder / 'summary.parquet'
  return [Outcome(**row) for row in pq.read_table(path).to_pylist()] if path.exists() else []


def write_answers(folder: pathlib.Path, answers: dict[tuple[int, int], Sequence[Answer]]) -> None:
  """Writes answers.parquet and answers.csv: all free answers with step and seed, if any."""
  rows = [{'step': step, 'seed': seed, **dataclasses.asdict(answer)}
          for (step, seed), said in answers.items() for answer in said]
  write_tables(folder, 'answers', rows)


def write_tables(folder: pathlib.Path, name: str, rows: Sequence[dict[str, Any]]) -> None:
  """Writes <name>.parquet and <name>.csv, each whole or not at all; none without rows."""
  if not rows:
    return
  found = pa.Table.from_pylist(rows)
  for ending, write in (('parquet', pq.write_table), ('csv', pyarrow.csv.write_csv)):
    path = folder / f'{name}.{ending}'
    write(found, path.with_name(path.name + '.tmp'))
    os.replace(path.with_name(path.name + '.tmp'), path)
