"""Monitor tables on disk: the items of a run, per-item scores by checkpoint, their summary."""

import dataclasses
import os
import pathlib
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from research.errors import UserError
from research.monitors.encoding import EncodedItem
from research.monitors.items import MonitorItem
from research.monitors.scoring import Scores

ITEM_SCHEMA = pa.schema([
    ('item', pa.int32()), ('item_id', pa.string()), ('family', pa.string()),
    ('dataset', pa.string()), ('seed', pa.int32()), ('variant', pa.string()),
    ('is_control', pa.bool_()), ('prompt', pa.string()), ('generalizing', pa.string()),
    ('shortcut', pa.string()), ('n_prompt_tokens', pa.int32()), ('straddles', pa.bool_())])
SCORE_SCHEMA = pa.schema([
    ('step', pa.int64()), ('item', pa.int32()), ('logp_generalizing', pa.float32()),
    ('logp_shortcut', pa.float32())])

PUBLISHED_SCHEMA = pa.schema([
    ('step', pa.int64()), ('item', pa.int32()), ('p_generalizing', pa.float32()),
    ('p_shortcut', pa.float32()), ('boundaries_differ', pa.bool_())])


def scores_name(step: int) -> str:
  """Returns the file name of one checkpoint's scores; names sort by step."""
  return f'step-{step:08d}.parquet'


def write_item_table(path: pathlib.Path, items: Sequence[MonitorItem],
                     encoded: Sequence[EncodedItem]) -> None:
  """Writes the items of a run, numbered as in the scores, with what tokenization made of them."""
  rows = [
      {'item': i, **dataclasses.asdict(item), 'n_prompt_tokens': tokens.n_prompt,
       'straddles': tokens.straddles}
      for i, (item, tokens) in enumerate(zip(items, encoded, strict=True))]
  _write_whole(pa.Table.from_pylist(rows, schema=ITEM_SCHEMA), path)


def read_item_table(path: pathlib.Path) -> list[MonitorItem]:
  """Returns the items of a run in the order of their numbers."""
  rows = _read(path, ITEM_SCHEMA).sort_by('item').to_pylist()
  names = [field.name for field in dataclasses.fields(MonitorItem)]
  return [MonitorItem(**{name: row[name] for name in names}) for row in rows]


def write_scores(folder: pathlib.Path, step: int, scores: Scores) -> pathlib.Path:
  """Writes the scores of one checkpoint whole or not at all; returns the file."""
  n_items = len(scores.logp_generalizing)
  path = folder / scores_name(step)
  _write_whole(pa.table({
      'step': np.full(n_items, step, np.int64), 'item': np.arange(n_items, dtype=np.int32),
      'logp_generalizing': scores.logp_generalizing, 'logp_shortcut': scores.logp_shortcut},
      schema=SCORE_SCHEMA), path)
  return path


def read_scores(path: pathlib.Path) -> tuple[int, Scores]:
  """Returns (step, scores in the order of the items) of one file.

  Raises UserError when the file is damaged or does not score items 0, 1, 2... of one step.
  """
  table, step = _read_step(path, SCORE_SCHEMA)
  return step, Scores(
      table['logp_generalizing'].to_numpy(), table['logp_shortcut'].to_numpy())


def _read_step(path: pathlib.Path, schema: pa.Schema) -> tuple[pa.Table, int]:
  """Returns the table of one step that scores every item in order, and the step."""
  table = _read(path, schema)
  steps = table['step'].unique().to_pylist()
  if len(steps) != 1 or not np.array_equal(table['item'].to_numpy(), np.arange(table.num_rows)):
    raise UserError(f'{path} must score every item of one step in order; it has steps {steps} and '
                    f'{table.num_rows} rows')
  return table, steps[0]


def write_published(folder: pathlib.Path, step: int, p_generalizing: np.ndarray,
                    p_shortcut: np.ndarray, differs: np.ndarray) -> pathlib.Path:
  """Writes the published score of one checkpoint whole or not at all; returns the file.

  Args:
    folder: where.
    step: of the checkpoint.
    p_generalizing, p_shortcut: mean probability of each answer's tokens by item, float32.
    differs: by item, whether exact boundaries score other tokens than the published rule.
  """
  path = folder / scores_name(step)
  n_items = len(differs)
  _write_whole(pa.table({
      'step': np.full(n_items, step, np.int64), 'item': np.arange(n_items, dtype=np.int32),
      'p_generalizing': p_generalizing, 'p_shortcut': p_shortcut, 'boundaries_differ': differs},
      schema=PUBLISHED_SCHEMA), path)
  return path


def read_published(path: pathlib.Path) -> tuple[int, np.ndarray, np.ndarray, np.ndarray]:
  """Returns (step, p_generalizing, p_shortcut, differs) of one file, in the order of the items.

  Raises UserError when the file is damaged or does not score items 0, 1, 2... of one step.
  """
  table, step = _read_step(path, PUBLISHED_SCHEMA)
  names = ('p_generalizing', 'p_shortcut', 'boundaries_differ')
  return step, *(table[name].to_numpy() for name in names)


def score_steps(folder: pathlib.Path) -> list[int]:
  """Returns the steps that have a file of scores, ascending."""
  return sorted(int(path.stem.removeprefix('step-')) for path in folder.glob('step-*.parquet'))


def score_table(items_path: pathlib.Path, folder: pathlib.Path, steps: Sequence[int],
                tokens: Callable[[int], int | None]) -> pa.Table:
  """Returns step, tokens, item, both log-probabilities, family, dataset, seed, variant, is_control.

  A row per step that was scored and item, in order; without columns where nothing was monitored.

  Args:
    items_path: the items of a run.
    folder: of its scores.
    steps: which of them.
    tokens: step -> tokens seen by then, None where that is not known.
  """
  paths = [path for path in (folder / scores_name(step) for step in steps) if path.exists()]
  if not items_path.exists() or not paths:
    return pa.table({})
  scored = pa.concat_tables([pq.read_table(path) for path in paths])
  items = pq.read_table(items_path, columns=[
      'item', 'item_id', 'family', 'dataset', 'seed', 'variant', 'is_control'])
  seen = pa.array([tokens(step) for step in scored['step'].to_pylist()], pa.int64())
  joined = scored.append_column('tokens', seen).join(items, 'item')
  return joined.sort_by([('step', 'ascending'), ('item', 'ascending')])


@dataclasses.dataclass(frozen=True)
class ContextSummary:
  """How one checkpoint does on the items of one dataset and demonstration context.

  accuracy: share of items whose generalizing answer is more likely than the shortcut (ties are
  wrong); margin: mean difference of the two probabilities.
  """

  step: int
  family: str
  dataset: str
  seed: int
  is_control: bool
  n_items: int
  accuracy: float
  margin: float


def summary(items: Sequence[MonitorItem], step: int, scores: Scores) -> list[ContextSummary]:
  """Returns one row per (dataset, seed), in order of first appearance."""
  good = np.asarray(scores.logp_generalizing, np.float64)
  short = np.asarray(scores.logp_shortcut, np.float64)
  contexts: dict[tuple[str, str, int, bool], list[int]] = {}
  for i, item in enumerate(items):
    key = (item.family, item.dataset, item.seed, item.is_control)
    contexts.setdefault(key, []).append(i)
  return [
      ContextSummary(
          step, family, dataset, seed, is_control, len(members),
          float(np.mean(good[members] > short[members])),
          float(np.mean(np.exp(good[members]) - np.exp(short[members]))))
      for (family, dataset, seed, is_control), members in contexts.items()]


def margins(scores: Scores) -> np.ndarray:
  """Returns the probability of the generalizing answer minus that of the shortcut, by item."""
  good, short = (np.exp(np.asarray(logp, np.float64)) for logp in scores)
  return good - short


def dataset_means(rows: Sequence[ContextSummary], measure: str) -> dict[str, float]:
  """Returns the accuracy or margin over all items of each dataset, from rows of one checkpoint."""
  totals: dict[str, tuple[float, int]] = {}
  for row in rows:
    total, n_items = totals.get(row.dataset, (0.0, 0))
    totals[row.dataset] = (total + getattr(row, measure) * row.n_items, n_items + row.n_items)
  return {dataset: total / n_items for dataset, (total, n_items) in totals.items()}


def _write_whole(table: pa.Table, path: pathlib.Path) -> None:
  """Writes so that a reader sees the old file or the new one, never a part."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  pq.write_table(table, temporary, compression='zstd')
  os.replace(temporary, path)


def _read(path: pathlib.Path, schema: pa.Schema) -> pa.Table:
  """Returns a table of exactly this schema."""
  if not path.is_file():
    raise UserError(f'{path} does not exist')
  try:
    table = pq.read_table(path)
  except pa.ArrowInvalid as error:
    raise UserError(f'{path} is not readable Parquet: {error}') from error
  if not table.schema.equals(schema):
    raise UserError(f'{path} has columns {table.schema.names}; expected {schema.names}')
  return table
