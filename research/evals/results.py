"""What benchmarks gave: a file per task and checkpoint, and one long table of all of them."""

import csv
import io
import json
import math
import pathlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from research.run_dir import RunDir, write_whole


class Row(NamedTuple):
  """One metric of one task at one checkpoint.

  Attributes:
    model: name of the run.
    step, tokens: of the checkpoint; tokens None where they are not known.
    variant: folder of the results: what was asked for, number of demonstrations and limit.
    task: of the harness; for a group also each of its tasks.
    n_shot: demonstrations.
    metric, filter: as the harness calls them.
    value, stderr: the metric and its standard error, NaN where the harness has none.
    n_samples: documents.
  """

  model: str
  step: int
  tokens: int | None
  variant: str
  task: str
  n_shot: int | None
  metric: str
  filter: str
  value: float
  stderr: float
  n_samples: int


def variant_of(task: str, num_fewshot: int | None, limit: int | None) -> str:
  """Returns the name of the folder for results of a task asked for in this way."""
  shots = '' if num_fewshot is None else f'-{num_fewshot}shot'
  return f'{task}{shots}' + ('' if limit is None else f'-first{limit}')


def rows_of(results: dict[str, Any], model: str, step: int, tokens: int | None, variant: str
            ) -> list[Row]:
  """Returns the metrics of the harness's results, of tasks and of groups."""
  rows = []
  for task, values in results['results'].items():
    for key, value in values.items():
      metric, comma, name = key.partition(',')
      if not comma or metric.endswith('_stderr'):
        continue
      rows.append(Row(model, step, tokens, variant, task, results['n-shot'].get(task), metric,
                      name, _number(value), _number(values.get(f'{metric}_stderr,{name}')),
                      values.get('sample_len', 0)))
  return rows


def _number(value: Any) -> float:
  """Returns a number of the harness; NaN for its 'N/A' and for what it left out."""
  return math.nan if value is None or isinstance(value, str) else float(value)


def write_record(path: pathlib.Path, record: dict[str, Any], rows: Iterable[Row]) -> None:
  """Writes what one task gave at one checkpoint, whole or not at all."""
  listed = [{name: None if value != value else value for name, value in row._asdict().items()}
            for row in rows]
  write_whole(path, json.dumps({**record, 'rows': listed}, indent=1) + '\n')


def read_record(path: pathlib.Path) -> dict[str, Any]:
  """Returns a record; its rows are `Row`s."""
  record = json.loads(path.read_text(encoding='utf-8'))
  record['rows'] = [Row(**{**row, **{name: math.nan for name in ('value', 'stderr')
                                     if row[name] is None}}) for row in record['rows']]
  return record


def all_rows(run_dir: RunDir) -> list[Row]:
  """Returns all metrics in a run directory, by folder and step."""
  return [row for path in sorted(run_dir.evals.glob('*/step-*.json'))
          for row in read_record(path)['rows']]


def write_table(path: pathlib.Path, rows: Iterable[Row]) -> None:
  """Writes all rows as CSV: pandas opens it, `research.dynamics.accuracies` reads it."""
  text = io.StringIO()
  csv.writer(text, lineterminator='\n').writerows([Row._fields, *rows])
  write_whole(path, text.getvalue())


def described(rows: Iterable[Row]) -> list[str]:
  """Returns the lines of a table for people."""
  cells = [('step', 'task', 'n_shot', 'metric', 'filter', 'value', 'stderr', 'n')]
  for row in rows:
    error = '' if math.isnan(row.stderr) else _text(row.stderr)
    cells.append((str(row.step), row.task, str(row.n_shot if row.n_shot is not None else ''),
                  row.metric, row.filter, _text(row.value), error, str(row.n_samples)))
  widths = [max(map(len, column)) for column in zip(*cells)]
  return ['  '.join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip()
          for line in cells]


def _text(value: float) -> str:
  """Returns a number for people; perplexities of an untrained model are large."""
  return f'{value:.4f}' if abs(value) < 1e6 else f'{value:.3e}'
