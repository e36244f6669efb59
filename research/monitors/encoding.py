"""From item text to static-shaped token arrays: exact answer boundaries, contexts, buckets."""

import bisect
import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from research.data.tokenizers import Tokenizer
from research.errors import UserError
from research.monitors.items import MonitorItem, check_items

# rows are padded up to one of these lengths (tokens), later to multiples of the last
SUFFIX_LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
PREFIX_MULTIPLE = 16
# contexts shorter than this are not worth running apart from their rows
SHORTEST_PREFIX = 8

Tokens = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class EncodedItem:
  """Token ids of both texts, which share their first `n_prompt` ids; the rest is scored.

  `straddles`: the prompt alone is tokenized otherwise, so some token spans prompt and answer.
  """

  generalizing: Tokens
  shortcut: Tokens
  n_prompt: int
  straddles: bool

  @property
  def prompt(self) -> Tokens:
    return self.generalizing[:self.n_prompt]

  @property
  def starts(self) -> tuple[int, int]:
    """Where the scored tokens of either text begin; not before `n_prompt`."""
    return self.n_prompt, self.n_prompt

  @property
  def is_single(self) -> bool:
    """Whether each answer is one token, so that one row scores both."""
    return (len(self.generalizing) == len(self.shortcut) == self.n_prompt + 1
            and self.starts == (self.n_prompt, self.n_prompt))


def encode_item(item: MonitorItem, tokenizer: Tokenizer, start_id: int | None = None
                ) -> EncodedItem:
  """Returns the item in tokens.

  Prompt and answer are encoded together, as they would be in a document. The scored span of both
  answers begins after their longest common run of tokens that end at or before the prompt's end:
  a token that straddles the boundary is scored for both, so that the two probabilities compare
  complete texts with the same beginning.

  Args:
    item: what to encode.
    tokenizer: any tokenizer.
    start_id: token put before the prompt; None puts none.

  Raises UserError when nothing precedes the first scored token, or an answer adds no token.
  """
  end = len(item.prompt)
  texts = []
  for answer in (item.generalizing, item.shortcut):
    ids, offsets = tokenizer.encode_with_offsets(item.prompt + answer)
    n_inside = sum(1 for _ in itertools.takewhile(lambda offset: offset[1] <= end, offsets))
    texts.append((tuple(ids), n_inside))
  (good, good_inside), (short, short_inside) = texts
  n_prompt = min(common_length(good, short), good_inside, short_inside)
  if n_prompt in (len(good), len(short)):
    raise UserError(f'monitor item {item.item_id!r}: an answer adds no token to its prompt')
  straddles = tuple(tokenizer.encode(item.prompt)) != good[:n_prompt]
  start = () if start_id is None else (start_id,)
  if not start and n_prompt == 0:
    raise UserError(f'monitor item {item.item_id!r}: no whole token comes before the answers; '
                    'lengthen the prompt or give a start token')
  return EncodedItem(start + good, start + short, len(start) + n_prompt, straddles)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
  """Returns the length of the longest common beginning."""
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def encode_items(items: Sequence[MonitorItem], tokenizer: Tokenizer, context_length: int,
                 start_id: int | None = None) -> list[EncodedItem]:
  """Returns all items in tokens; raises UserError for one that is longer than the context."""
  check_items(items)
  encoded = [encode_item(item, tokenizer, start_id) for item in items]
  for item, tokens in zip(items, encoded, strict=True):
    check_length(item, tokens, context_length)
  return encoded


def n_context(tokens: EncodedItem) -> int:
  """Returns how many tokens a model must see to score both texts."""
  return max(len(tokens.generalizing), len(tokens.shortcut)) - 1


def check_length(item: MonitorItem, tokens: EncodedItem, context_length: int) -> None:
  """Raises UserError for an item that is longer than the context."""
  n_tokens = n_context(tokens)
  if n_tokens > context_length:
    raise UserError(f'monitor item {item.item_id!r} needs {n_tokens} tokens of context; '
                    f'model.context_length={context_length}')


@dataclasses.dataclass(frozen=True)
class Row:
  """One sequence to run, and what is read from it.

  `targets[t]` are the tokens whose log-probability is read at input position `start + t`: two
  rival ones for single-token answers, otherwise one. `slots` number the sums over t (2 i and
  2 i + 1 are the generalizing and the shortcut answer of item i).
  """

  inputs: Tokens
  start: int
  targets: tuple[Tokens, ...]
  slots: tuple[int, ...]


def _rows(i: int, item: EncodedItem) -> list[Row]:
  """Returns the row or rows that score item i."""
  if item.is_single:
    targets = ((item.generalizing[-1], item.shortcut[-1]),)
    return [Row(item.prompt, item.n_prompt - 1, targets, (2 * i, 2 * i + 1))]
  texts = zip((item.generalizing, item.shortcut), item.starts, strict=True)
  return [
      Row(text[:-1], start - 1, tuple((token,) for token in text[start:]), (2 * i + answer,))
      for answer, (text, start) in enumerate(texts)]


@dataclasses.dataclass(frozen=True)
class _Group:
  """Rows behind one shared prefix (empty: rows that stand alone)."""

  prefix: Tokens
  rows: list[Row]


def _groups(items: Sequence[MonitorItem], encoded: Sequence[EncodedItem]) -> list[_Group]:
  """Returns the rows of all items, gathered by demonstration context.

  Items of one dataset, seed and variant share whatever beginning their prompts have in common,
  as long as every row keeps a token of its own to predict from.
  """
  contexts: dict[tuple, list[int]] = {}
  for i, (item, tokens) in enumerate(zip(items, encoded, strict=True)):
    key = (item.dataset, item.seed, item.variant, tokens.is_single)
    contexts.setdefault(key, []).append(i)
  groups = []
  for members in contexts.values():
    rows = [row for i in members for row in _rows(i, encoded[i])]
    first = encoded[members[0]].prompt
    n_shared = min(min(common_length(first, encoded[i].prompt), encoded[i].n_prompt - 1)
                   for i in members)
    if len(rows) == 1 or n_shared < SHORTEST_PREFIX:
      groups += [_Group((), [row]) for row in rows]
      continue
    groups.append(_Group(first[:n_shared], [
        dataclasses.replace(row, inputs=row.inputs[n_shared:], start=row.start - n_shared)
        for row in rows]))
  return groups


@dataclasses.dataclass(frozen=True)
class Bucket:
  """Rows of one static shape, in Z chunks of C contexts with I rows each (B = C I rows).

  Arrays: prefix_ZCP and prefix_lengths_ZC (P may be 0), tokens_ZBS, and for each of T read
  positions of a row its place among the S inputs, R targets and whether it counts.
  `slots_ZBR` numbers the sums, -1 for padding.
  """

  prefix_ZCP: np.ndarray
  prefix_lengths_ZC: np.ndarray
  tokens_ZBS: np.ndarray
  places_ZBT: np.ndarray
  targets_ZBTR: np.ndarray
  counts_ZBT: np.ndarray
  slots_ZBR: np.ndarray

  @property
  def n_tokens(self) -> int:
    """Tokens that go through the model, padding included."""
    return self.prefix_ZCP.size + self.tokens_ZBS.size


def make_buckets(items: Sequence[MonitorItem], encoded: Sequence[EncodedItem], *,
                 context_length: int, batch_rows: int, row_multiple: int = 1,
                 pad_id: int = 0) -> list[Bucket]:
  """Returns all rows in as few shapes as padding allows.

  Args:
    items, encoded: the suite.
    context_length: of the model, in tokens; no padded row exceeds it.
    batch_rows: rows run at a time, at most (but `row_multiple` at least).
    row_multiple: the number of contexts run at a time is a multiple of this.
    pad_id: any valid token.
  """
  shapes: dict[tuple, list[_Group]] = {}
  for group in _groups(items, encoded):
    for start in range(0, len(group.rows), batch_rows):
      part = _Group(group.prefix, group.rows[start:start + batch_rows])
      shapes.setdefault(_shape(part, context_length), []).append(part)
  return [
      _bucket(shapes[shape], shape, batch_rows, row_multiple, pad_id) for shape in sorted(shapes)]


def _shape(group: _Group, context_length: int) -> tuple[int, int, int, int, int]:
  """Returns the padded (prefix, rows per context, row length, reads, targets per read)."""
  n_prefix = len(group.prefix)
  length = min(_padded(max(len(row.inputs) for row in group.rows)), context_length - n_prefix)
  prefix = min(-(-n_prefix // PREFIX_MULTIPLE) * PREFIX_MULTIPLE, context_length - length)
  n_reads = _padded(max(len(row.targets) for row in group.rows))
  return prefix, _padded(len(group.rows)), length, n_reads, len(group.rows[0].targets[0])


def _padded(n: int) -> int:
  """Returns the padded form of a length."""
  largest = SUFFIX_LENGTHS[-1]
  if n > largest:
    return -(-n // largest) * largest
  return SUFFIX_LENGTHS[bisect.bisect_left(SUFFIX_LENGTHS, n)]


def _bucket(groups: list[_Group], shape: tuple[int, ...], batch_rows: int, row_multiple: int,
            pad_id: int) -> Bucket:
  """Returns groups of one shape as arrays."""
  P, I, S, T, R = shape
  I = min(I, max(len(group.rows) for group in groups))
  most = max(1, batch_rows // I)
  n_chunks = -(-len(groups) // most)
  C = -(-len(groups) // n_chunks)
  C = -(-C // row_multiple) * row_multiple
  n_chunks = -(-len(groups) // C)
  n_contexts = n_chunks * C
  # empty contexts keep one visible token, so that no softmax runs over nothing
  prefix_CP = np.full((n_contexts, P), pad_id, np.int32)
  lengths_C = np.full(n_contexts, min(1, P), np.int32)
  tokens_BS = np.full((n_contexts * I, S), pad_id, np.int32)
  places_BT = np.zeros((n_contexts * I, T), np.int32)
  targets_BTR = np.full((n_contexts * I, T, R), pad_id, np.int32)
  counts_BT = np.zeros((n_contexts * I, T), bool)
  slots_BR = np.full((n_contexts * I, R), -1, np.int64)
  for c, group in enumerate(groups):
    prefix_CP[c, :len(group.prefix)] = group.prefix
    lengths_C[c] = len(group.prefix)
    for b, row in enumerate(group.rows, start=c * I):
      n_reads = len(row.targets)
      tokens_BS[b, :len(row.inputs)] = row.inputs
      places_BT[b, :n_reads] = np.arange(row.start, row.start + n_reads)
      targets_BTR[b, :n_reads] = row.targets
      counts_BT[b, :n_reads] = True
      slots_BR[b] = row.slots
  chunked = lambda x: x.reshape(n_chunks, -1, *x.shape[1:])
  return Bucket(
      prefix_CP.reshape(n_chunks, C, P), chunked(lengths_C), chunked(tokens_BS),
      chunked(places_BT), chunked(targets_BTR), chunked(counts_BT), chunked(slots_BR))
