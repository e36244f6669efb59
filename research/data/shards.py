"""Pre-tokenized shards on disk: .npy and .bin streams, .arrayrecord documents, and their sidecar.

The sidecar `<shard>.json` holds the hash of the tokenizer that made the shard and the dtype of its
tokens. A stream is documents with EOS between them; an ArrayRecord record is one document without
EOS, as little-endian tokens.
"""

import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np
from array_record.python import array_record_module
from grain import sources as grain_sources

from research.data.errors import DataError
from research.data.tokenizers import Tokenizer
from research.data.token_store import Document, token_dtype

SUFFIXES = ('.npy', '.bin', '.arrayrecord')
_DTYPES = ('uint16', 'uint32')


def sidecar(path: pathlib.Path) -> pathlib.Path:
  """Where the description of a shard lies."""
  return path.with_name(path.name + '.json')


def write_shard(path: str | pathlib.Path, documents: Iterable[Sequence[int]],
                tokenizer: Tokenizer) -> None:
  """Writes documents (token ids without EOS) as a shard of the kind its suffix names."""
  path, dtype = pathlib.Path(path), token_dtype(tokenizer.vocab_size)
  arrays = [np.asarray(d, np.dtype(dtype).newbyteorder('<')) for d in documents]
  if path.suffix == '.arrayrecord':
    writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
    for array in arrays:
      writer.write(array.tobytes())
    writer.close()
  elif path.suffix in SUFFIXES:
    eos = np.asarray([tokenizer.eos_id], dtype)
    stream = np.concatenate([eos, *(part for array in arrays for part in (array, eos))])
    if path.suffix == '.npy':
      np.save(path, stream)
    else:
      stream.tofile(path)
  else:
    raise DataError(f'{path} does not end in any of {", ".join(SUFFIXES)}')
  facts = {'tokenizer_hash': tokenizer.hash, 'dtype': dtype.name}
  sidecar(path).write_text(json.dumps(facts, indent=2) + '\n', encoding='utf-8')


def checked_dtype(path: pathlib.Path, tokenizer: Tokenizer) -> np.dtype:
  """The dtype of a shard's tokens; raises DataError unless `tokenizer` made the shard."""
  beside = sidecar(path)
  if not beside.is_file():
    raise DataError(f'{path} has no {beside.name} beside it, which would name its tokenizer')
  try:
    facts = json.loads(beside.read_text(encoding='utf-8'))
    made_by, dtype = facts['tokenizer_hash'], facts['dtype']
  except (ValueError, KeyError, TypeError) as error:
    raise DataError(f"{beside} must be an object with 'tokenizer_hash' and 'dtype': {error!r}"
                    ) from error
  if made_by != tokenizer.hash:
    raise DataError(f'{path} was made with tokenizer {str(made_by)[:12]}, but '
                    f'data.tokens.tokenizer is {tokenizer.hash[:12]}; '
                    'name the tokenizer.json that made it')
  if dtype not in _DTYPES:
    raise DataError(f'{beside}: dtype {dtype!r} is none of {", ".join(_DTYPES)}')
  return np.dtype(dtype)


def open_stream_file(path: pathlib.Path, tokenizer: Tokenizer) -> np.ndarray:
  """Memory-mapped tokens [n] of a .npy or .bin shard, checked against the tokenizer."""
  dtype = checked_dtype(path, tokenizer)
  if path.suffix == '.bin':
    if path.stat().st_size % dtype.itemsize:
      raise DataError(f'{path} has {path.stat().st_size} bytes, not a multiple of {dtype.itemsize} '
                      f'as {dtype} tokens need')
    tokens = np.memmap(path, dtype, 'r')
  else:
    try:
      tokens = np.load(path, mmap_mode='r', allow_pickle=False)
    except (EOFError, ValueError) as error:
      raise DataError(f'{path} is not a readable .npy file: {error}') from error
    if tokens.ndim != 1 or tokens.dtype != dtype:
      raise DataError(f'{path} holds {tokens.dtype}{list(tokens.shape)}, not the one-dimensional '
                      f'{dtype} its .json promises')
  check_ids(tokens, path, tokenizer)
  return tokens


def array_record_documents(path: pathlib.Path, file: int, tokenizer: Tokenizer) -> list[Document]:
  """Every record of an .arrayrecord shard, checked against the tokenizer."""
  dtype = checked_dtype(path, tokenizer).newbyteorder('<')
  documents = []
  with grain_sources.ArrayRecordDataSource([str(path)]) as source:
    for number in range(len(source)):
      record = source[number]
      if len(record) % dtype.itemsize:
        raise DataError(f'{path}, record {number} has {len(record)} bytes, not a multiple of '
                        f'{dtype.itemsize} as {dtype.name} tokens need')
      ids = np.frombuffer(record, dtype)
      check_ids(ids, f'{path}, record {number}', tokenizer)
      documents.append(Document(ids, file, number, -1))
  return documents


def check_ids(tokens: np.ndarray, where, tokenizer: Tokenizer) -> None:
  """Raises DataError when an id lies outside the vocabulary."""
  step = 1 << 24
  for a in range(0, len(tokens), step):
    largest = int(tokens[a:a + step].max())
    if largest >= tokenizer.vocab_size:
      raise DataError(f'{where} holds token {largest}, but its tokenizer has only '
                      f'{tokenizer.vocab_size} ids')
