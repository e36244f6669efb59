"""Token shards: memory-mapped streams of token ids, and the cache that text is tokenized into.

A cache entry is a folder named by the content hash of what made it, complete or absent.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from research.data.errors import DataError
from research.data.tokenizers import Tokenizer, pieces_of

_FORMAT = 1  # of a cache entry; part of its key
_PIECE = 1 << 20  # characters tokenized at once
_SCAN = 1 << 24  # tokens searched for EOS at once


@dataclasses.dataclass(frozen=True)
class Document:
  """One document to be stored: tokens without EOS, file, number there, bytes of text.

  n_bytes is -1 where the text is unknown or not what the tokens decode to.
  """

  ids: np.ndarray
  file: int
  number: int
  n_bytes: int


class TokenShard:
  """One stream of tokens, read through a memory map.

  Attributes:
    tokens: uint16 or uint32 [n], EOS before (where the stream has it) and after every document.
    files: paths of the files it came from.
  """

  def __init__(self, tokens: np.ndarray, eos_id: int, files: list[str],
               documents: np.ndarray | None = None):
    """`documents` int64 [n_documents, 3] gives file, number in the file and bytes, if known."""
    self.tokens = tokens.view(np.ndarray)  # slicing a np.memmap costs more than reading it
    self.eos_id, self.files, self.documents = eos_id, files, documents

  def __len__(self) -> int:
    return len(self.tokens)

  @functools.cached_property
  def starts(self) -> np.ndarray:
    """int64 [n_documents]: where each document's first token (not its EOS) stands."""
    found = [np.flatnonzero(self.tokens[a:a + _SCAN] == self.eos_id) + a + 1
             for a in range(0, len(self), _SCAN)]
    starts = np.concatenate(found) if found else np.zeros(0, np.int64)
    if len(self) and self.tokens[0] != self.eos_id:
      starts = np.concatenate([[0], starts])
    return starts[starts < len(self)].astype(np.int64)

  def describe(self, first: int, last: int) -> list[dict]:
    """The documents that tokens [first, last) touch: file, number, and which of its tokens.

    `tokens` is the half-open range within the document, its leading EOS not counted; `position`
    is that of its first token, counted from `first`.
    """
    a = max(int(np.searchsorted(self.starts, first, 'right')) - 1, 0)
    b = int(np.searchsorted(self.starts, last, 'left'))
    described = []
    for d in range(a, b):
      start, end = self.span(d)
      low, high = max(first, start), min(last, end)
      if low < high:
        file, number = (0, d) if self.documents is None else self.documents[d, :2]
        name = self.files[int(file)]
        described.append({'id': f'{name}#{int(number)}', 'file': name, 'document': int(number),
                          'tokens': (low - start, high - start), 'position': low - first})
    return described

  def span(self, d: int) -> tuple[int, int]:
    """Where the tokens of document d begin and end, EOS not counted."""
    if d + 1 < len(self.starts):
      return int(self.starts[d]), int(self.starts[d + 1]) - 1
    return int(self.starts[d]), len(self) - int(self.tokens[-1] == self.eos_id)


def token_dtype(vocab_size: int) -> np.dtype:
  """Smallest of uint16 and uint32 that holds every id."""
  return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def encode_document(tokenizer: Tokenizer, text: str) -> np.ndarray:
  """Token ids of one document, uint32 [n]; long texts are tokenized in pieces cut at line ends."""
  pieces = [np.asarray(tokenizer.encode(p), np.uint32) for p in pieces_of(text, _PIECE)]
  return np.concatenate(pieces) if pieces else np.zeros(0, np.uint32)


def content_key(**parts) -> str:
  """sha256 (hex) of JSON-able parts: the name of what is made from them alone."""
  canonical = json.dumps({'format': _FORMAT, **parts}, sort_keys=True)
  return hashlib.sha256(canonical.encode()).hexdigest()


@contextlib.contextmanager
def _whole_folder(folder: pathlib.Path) -> Iterator[pathlib.Path]:
  """A scratch folder that becomes `folder` when the block ends well and vanishes otherwise."""
  folder.parent.mkdir(parents=True, exist_ok=True)
  scratch = pathlib.Path(tempfile.mkdtemp(prefix='.partial-', dir=folder.parent))
  try:
    yield scratch
    try:
      os.replace(scratch, folder)
    except OSError:
      if not folder.is_dir():  # else another process finished the same entry first
        raise
  finally:
    shutil.rmtree(scratch, ignore_errors=True)


def cached_folder(folder: pathlib.Path, write: Callable[[pathlib.Path], None]) -> pathlib.Path:
  """`folder`, written by `write(scratch folder)` unless it is there already."""
  if not folder.is_dir():
    with _whole_folder(folder) as scratch:
      write(scratch)
  return folder


def write_stream(folder: pathlib.Path, name: str, documents: Iterable[Document],
                 tokenizer: Tokenizer) -> None:
  """Writes a stream and its table of documents: <name>.npy and <name>_documents.npy."""
  dtype, table = token_dtype(tokenizer.vocab_size), []
  raw = folder / f'{name}.raw'
  eos = np.asarray([tokenizer.eos_id], dtype).tobytes()
  with raw.open('wb') as file:
    file.write(eos)
    for document in documents:
      file.write(document.ids.astype(dtype).tobytes() + eos)
      table.append((document.file, document.number, document.n_bytes))
  n_tokens = raw.stat().st_size // dtype.itemsize
  stream = np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', dtype, (n_tokens,))
  stream[:] = np.memmap(raw, dtype, 'r')
  stream.flush()
  raw.unlink()
  np.save(folder / f'{name}_documents.npy', np.asarray(table, np.int64).reshape(-1, 3))


def open_stream(folder: pathlib.Path, name: str, eos_id: int, files: list[str]) -> TokenShard:
  """The stream that `write_stream` wrote; raises DataError when the entry is damaged."""
  try:
    tokens = np.load(folder / f'{name}.npy', mmap_mode='r')
    documents = np.load(folder / f'{name}_documents.npy')
  except (OSError, EOFError, ValueError) as error:
    raise DataError(f'cache entry {folder} is damaged ({error}); delete it') from error
  return TokenShard(tokens, eos_id, files, documents)
