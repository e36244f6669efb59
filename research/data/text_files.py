"""Text files: which files a path names, their documents, and the cut between training and held out.

The cut comes first, before a tokenizer is trained or anything is counted. A .txt file is one
document, cut at a byte; .jsonl and .parquet files are cut between documents.
"""

import dataclasses
import glob
import gzip
import hashlib
import io
import json
import pathlib
import zlib
from collections.abc import Iterator

import pyarrow
import pyarrow.parquet
import zstandard

from research.data.errors import DataError

FORMATS = ('.txt', '.jsonl', '.parquet')
COMPRESSIONS = ('.gz', '.zst')


@dataclasses.dataclass(frozen=True)
class TextFile:
  """The documents of one file on either side of the cut; `cut` is their border in words."""

  path: pathlib.Path
  sha256: str
  train: tuple[str, ...]
  heldout: tuple[str, ...]
  cut: str


def list_files(entry: str, suffixes: tuple[str, ...], field: str) -> list[pathlib.Path]:
  """Files that one entry of a `paths` field names, sorted by name.

  An entry is a file, a folder (searched in depth) or a glob. Only names that end in one of
  `suffixes` count; hidden files never do. Raises DataError when there are none.
  """
  path = pathlib.Path(entry)
  if path.is_dir():
    found = [p for p in path.rglob('*') if p.is_file()]
  elif path.exists():
    if not path.name.endswith(suffixes):
      raise DataError(f'{field}: {path} does not end in any of {", ".join(suffixes)}')
    return [path]
  else:
    found = [pathlib.Path(p) for p in glob.glob(entry, recursive=True)]
  files = sorted(p for p in found if p.name.endswith(suffixes) and not p.name.startswith('.'))
  if not files:
    raise DataError(f'{field}: {entry} names no file that ends in any of {", ".join(suffixes)}')
  return files


def text_suffixes() -> tuple[str, ...]:
  """Name endings of the text files that can be read."""
  plain = ('.txt', '.jsonl')
  return (*FORMATS, *(p + c for p in plain for c in COMPRESSIONS))


def format_of(path: pathlib.Path) -> str:
  """'.txt', '.jsonl' or '.parquet', whatever the compression."""
  name = path.with_suffix('') if path.suffix in COMPRESSIONS else path
  return name.suffix


def file_sha256(path: pathlib.Path) -> str:
  """sha256 (hex) of the file's bytes as they lie on disk; raises DataError on an empty file."""
  if path.stat().st_size == 0:
    raise DataError(f'{path} is empty')
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def read_text_file(path: pathlib.Path, heldout_fraction: float, text_field: str) -> TextFile:
  """Documents of one text file, already cut; raises DataError when a part comes out empty."""
  sha256 = file_sha256(path)
  if format_of(path) == '.txt':
    raw = _decompressed(path)
    at = _character_start(raw, len(raw) - round(len(raw) * heldout_fraction))
    train, heldout = ([_decoded(part, path, first)] if part else []
                      for part, first in ((raw[:at], 0), (raw[at:], at)))
    cut = f'byte {at} of {len(raw)}'
  else:
    reader = {'.jsonl': _jsonl_documents, '.parquet': _parquet_documents}[format_of(path)]
    documents = [text for text in reader(path, text_field) if text]
    n_heldout = max(round(len(documents) * heldout_fraction), 1) if heldout_fraction else 0
    at = max(len(documents) - n_heldout, 0)
    train, heldout, cut = documents[:at], documents[at:], f'document {at} of {len(documents)}'
  if not train or (heldout_fraction and not heldout):
    raise DataError(f'{path} is too small to be cut (at {cut}) with '
                    f'heldout_fraction={heldout_fraction}: one side would be empty')
  return TextFile(path, sha256, tuple(train), tuple(heldout), cut)


def _decompressed(path: pathlib.Path) -> bytes:
  """Bytes of the file with .gz or .zst undone."""
  raw = path.read_bytes()
  try:
    if path.suffix == '.gz':
      return gzip.decompress(raw)
    if path.suffix == '.zst':
      unpacker = zstandard.ZstdDecompressor()
      with unpacker.stream_reader(io.BytesIO(raw), read_across_frames=True) as stream:
        return stream.read()
  except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
    raise DataError(f'{path} is not a whole {path.suffix} file: {error}') from error
  return raw


def _character_start(raw: bytes, at: int) -> int:
  """The last position up to `at` where a UTF-8 character begins."""
  while 0 < at < len(raw) and raw[at] & 0xC0 == 0x80:
    at -= 1
  return at


def _decoded(raw: bytes, path: pathlib.Path, first: int) -> str:
  """`raw`, which stands at byte `first` of `path`, as text."""
  try:
    return raw.decode('utf-8')
  except UnicodeDecodeError as error:
    raise DataError(f'{path} is not UTF-8 at byte {first + error.start} '
                    f'(0x{raw[error.start]:02x}: {error.reason}); convert it to UTF-8') from error


def lines(path: pathlib.Path) -> Iterator[str]:
  """Yields the lines of a UTF-8 file, .gz and .zst undone; raises DataError where it is none."""
  first = 0
  for line in _decompressed(path).split(b'\n'):
    yield _decoded(line, path, first)
    first += len(line) + 1


def _jsonl_documents(path: pathlib.Path, text_field: str) -> list[str]:
  documents = []
  for number, text in enumerate(lines(path), 1):
    if text.strip():
      documents.append(_json_text(text, text_field, f'{path}, line {number}'))
  return documents


def _json_text(line: str, text_field: str, where: str) -> str:
  try:
    record = json.loads(line)
  except json.JSONDecodeError as error:
    raise DataError(f'{where} is not valid JSON: {error.msg} at column {error.colno}') from error
  text = record.get(text_field) if isinstance(record, dict) else None
  if not isinstance(text, str):
    raise DataError(f'{where} has no string field {text_field!r}')
  try:
    text.encode('utf-8')
  except UnicodeEncodeError as error:
    raise DataError(f'{where} has a lone surrogate in {text_field!r}, which is not text') from error
  return text


def _parquet_documents(path: pathlib.Path, text_field: str) -> list[str]:
  try:
    table = pyarrow.parquet.ParquetFile(path)
  except (pyarrow.ArrowException, OSError) as error:
    raise DataError(f'{path} is not a readable parquet file: {error}') from error
  if text_field not in table.schema_arrow.names:
    raise DataError(f'{path} has no column {text_field!r}; it has {table.schema_arrow.names}')
  column = table.read(columns=[text_field]).column(text_field)
  if not (pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)):
    raise DataError(f'{path}: column {text_field!r} holds {column.type}, not strings')
  try:
    column.validate(full=True)
  except pyarrow.ArrowInvalid as error:
    raise DataError(f'{path}: column {text_field!r} is not UTF-8: {error}') from error
  documents = column.to_pylist()
  if None in documents:
    raise DataError(f'{path}: column {text_field!r} is null in row {documents.index(None)}')
  return documents
