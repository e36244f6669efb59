"""What a window of steps was fed, document by document, as a table on disk."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from research.data.batches import Source, window_documents
from research.data.errors import DataError

DOCUMENT_SCHEMA = pa.schema([
    ('step', pa.int64()), ('row', pa.int32()), ('position', pa.int32()), ('n_tokens', pa.int32()),
    ('source', pa.string()), ('kind', pa.string()), ('id', pa.string()), ('masked', pa.bool_()),
    ('text', pa.string())])


def document_rows(source: Source, batch_size: int, first: int, last: int
                  ) -> Iterator[dict[str, Any]]:
  """Yields every document that took the state of step `first` to that of step `last`, in order.

  `step` is the step of metrics.jsonl whose update it entered, first + 1 to last; `row` and
  `position` say where in the batch its first token stands; `masked` that no loss counts it. Text
  is what of the document lies in the row.
  """
  for document in window_documents(source, batch_size, first, last):
    row = {'masked': False, **document, 'step': document['step'] + 1}
    yield {name: row[name] for name in DOCUMENT_SCHEMA.names}


def write_documents(path: pathlib.Path, source: Source, batch_size: int, first: int, last: int
                    ) -> int:
  """Writes `document_rows` to a .parquet or .jsonl file, whole or not at all; returns their number.

  Raises DataError for another suffix.
  """
  if path.suffix not in _WRITERS:
    raise DataError(f'{path} must end in .parquet or .jsonl')
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  steps = (list(document_rows(source, batch_size, step, step + 1)) for step in range(first, last))
  n_documents = _WRITERS[path.suffix](temporary, steps)
  os.replace(temporary, path)
  return n_documents


def _write_parquet(path: pathlib.Path, steps: Iterator[list[dict[str, Any]]]) -> int:
  """Writes one row group per step, so that memory stays at one step."""
  n_documents = 0
  with pq.ParquetWriter(path, DOCUMENT_SCHEMA, compression='zstd') as writer:
    for rows in steps:
      writer.write_table(pa.Table.from_pylist(rows, schema=DOCUMENT_SCHEMA))
      n_documents += len(rows)
  return n_documents


def _write_json_lines(path: pathlib.Path, steps: Iterator[list[dict[str, Any]]]) -> int:
  n_documents = 0
  with path.open('w', encoding='utf-8') as file:
    for rows in steps:
      file.writelines(json.dumps(row, ensure_ascii=False) + '\n' for row in rows)
      n_documents += len(rows)
  return n_documents


_WRITERS = {'.parquet': _write_parquet, '.jsonl': _write_json_lines}
