"""Bits per byte of held-out text: every raw byte is scored exactly once, whatever the tokenizer."""

import collections
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from research.data.corpus import HeldoutDocument
from research.data.errors import DataError
from research.data.packing import Row, make_row, stack_rows

Score = Callable[[dict[str, np.ndarray]], np.ndarray]


@dataclasses.dataclass(frozen=True)
class BitsPerByte:
  """Sums over held-out text: nats of its tokens, and how many bytes and tokens it has."""

  nats: float
  n_bytes: int
  n_tokens: int

  @property
  def bits_per_byte(self) -> float:
    return self.nats / (self.n_bytes * math.log(2))


@dataclasses.dataclass(frozen=True)
class _Window:
  """One row to be scored, and the document it belongs to."""

  document: int
  row: Row


def bits_per_byte(documents: Sequence[HeldoutDocument], score: Score, *, length: int,
                  batch_size: int, eos_id: int,
                  pad_id: int | None = None) -> dict[str, BitsPerByte]:
  """Bits per byte by file, and over all of them under 'all'.

  A document is read through windows of `length` tokens, half a window apart, beginning with EOS;
  each token is scored in the first window that holds it, so with at least half a window of context
  (or all there is). The end of a document is no byte and isn't scored.

  Args:
    documents: held-out documents; n_bytes is the UTF-8 length of the text that `ids` decode to.
    score: batch (tokens, targets, segment_ids, positions int32, loss_mask float32, each [B, L]) to
      nats per token [B, L], counted where loss_mask is 1. Always called with one shape.
    length: L, tokens per window, at least 2.
    batch_size: B, windows scored at once.
    eos_id: the token before every document.
    pad_id: fills up rows behind the last token; None: 0.

  Raises DataError when there is nothing to score or a score is not finite.
  """
  if length < 2:
    raise DataError(f'bits per byte need windows of at least 2 tokens, got {length}')
  if not documents:
    raise DataError('there is no held-out text; set data.text.heldout_fraction above 0')
  pad_id = 0 if pad_id is None else pad_id
  nats, n_tokens = np.zeros(len(documents)), np.zeros(len(documents), np.int64)
  pending: list[_Window] = []

  def flush():
    rows = [window.row for window in pending]
    empty = make_row(np.asarray([pad_id]), eos_id, length, pad_id)
    batch = stack_rows(rows + [empty] * (batch_size - len(rows)))
    scored_BL = np.asarray(score(batch), np.float64)
    for window, scored_L in zip(pending, scored_BL[:len(rows)], strict=True):
      counted = scored_L[window.row['loss_mask_L'] > 0]
      if not np.isfinite(counted).all():
        raise DataError(f'the model gave a score that is not finite in held-out document '
                        f'{documents[window.document].file}#{documents[window.document].number}')
      nats[window.document] += counted.sum()
      n_tokens[window.document] += len(counted)
    pending.clear()

  for d, document in enumerate(documents):
    for row in windows(document.ids, length, eos_id, pad_id):
      pending.append(_Window(d, row))
      if len(pending) == batch_size:
        flush()
  if pending:
    flush()
  return _by_file(documents, nats, n_tokens)


def windows(ids: np.ndarray, length: int, eos_id: int, pad_id: int) -> Iterator[Row]:
  """Rows over EOS + ids in whose loss masks every token of `ids` occurs once."""
  stream = np.concatenate([[eos_id], np.asarray(ids, np.int64)])
  n_scored, stride = 0, length // 2  # targets scored so far
  first = 0
  while n_scored < len(ids):
    row = make_row(stream[first:first + length + 1], eos_id, length, pad_id)
    row['loss_mask_L'][:n_scored - first] = 0
    yield row
    n_scored = min(first + length, len(ids))
    first += stride


def _by_file(documents: Sequence[HeldoutDocument], nats: np.ndarray,
             n_tokens: np.ndarray) -> dict[str, BitsPerByte]:
  members = collections.defaultdict(list)
  for d, document in enumerate(documents):
    members[document.file].append(d)
  members['all'] = list(range(len(documents)))
  return {
    name: BitsPerByte(float(nats[ds].sum()), sum(documents[d].n_bytes for d in ds),
                      int(n_tokens[ds].sum()))
    for name, ds in members.items()}
