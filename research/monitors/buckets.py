"""From rows to static-shaped arrays: padding, limits, buckets."""

import bisect
import dataclasses
import sys
from collections.abc import Iterator, Sequence

import numpy as np

from research.monitors.rows import Group, Item, grouped, padded_prefix

# rows are padded up to one of these lengths (tokens), later to multiples of LENGTH_MULTIPLE
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
LENGTH_MULTIPLE = 32
SHAPE_SHARE = 0.005
UNLIMITED = sys.maxsize

Shape = tuple[int, int, int, int, int]
Shapes = dict[Shape, list[Group]]


@dataclasses.dataclass(frozen=True)
class Limits:
  """What may run at a time.

  Attributes:
    context_length: of the model, in tokens; no padded row exceeds it.
    batch_rows: rows, at most (but `row_multiple` at least).
    row_multiple: the number of contexts is a multiple of this (devices that rows spread over).
    tokens, reads: on each of these devices, at most (but one row at least).
    shape_tokens: another compiled shape has to save as many, or SHAPE_SHARE of all.
  """

  context_length: int
  batch_rows: int
  row_multiple: int
  tokens: int
  reads: int
  shape_tokens: int

  def n_rows(self, shape: Shape) -> int:
    """Returns how many rows of a shape may run behind one prefix."""
    P, _, S, T, _ = shape
    n = min((self.tokens - P) // S, self.reads // T)
    return max(1, min(self.batch_rows, _padded_down(max(1, n))))

  def n_contexts(self, shape: Shape) -> int:
    """Returns how many contexts of a shape may run in one chunk."""
    P, I, S, T, _ = shape
    n = self.row_multiple * max(1, min(self.tokens // (P + I * S), self.reads // (I * T)))
    return max(1, min(self.batch_rows // I, n))


@dataclasses.dataclass(frozen=True)
class Bucket:
  """Rows of one static shape, in Z chunks of C contexts with I rows each (B = C I rows).

  Arrays: prefix_ZCP and prefix_lengths_ZC (P may be 0), tokens_ZBS, and for each of T read
  positions of a row its place among the S inputs, R targets and which of them count.
  `slots_ZBR` numbers the sums, -1 for padding.
  """

  prefix_ZCP: np.ndarray
  prefix_lengths_ZC: np.ndarray
  tokens_ZBS: np.ndarray
  places_ZBT: np.ndarray
  targets_ZBTR: np.ndarray
  counts_ZBTR: np.ndarray
  slots_ZBR: np.ndarray

  @property
  def n_tokens(self) -> int:
    """Tokens that go through the model, padding included."""
    return self.prefix_ZCP.size + self.tokens_ZBS.size


def make_buckets(items: Sequence[Item], *, context_length: int, batch_rows: int = UNLIMITED,
                 row_multiple: int = 1, tokens: int = UNLIMITED, reads: int = UNLIMITED,
                 shape_tokens: int = 512, pad_id: int = 0) -> list[Bucket]:
  """Returns all rows in as few shapes as padding allows.

  Args:
    items: what is to be scored.
    context_length, batch_rows, row_multiple, tokens, reads, shape_tokens: see `Limits`.
    pad_id: any valid token.
  """
  limits = Limits(context_length, batch_rows, row_multiple, tokens, reads, shape_tokens)
  shapes: Shapes = {}
  for group in grouped(items):
    for part in _parts(group, limits):
      shapes.setdefault(_shape(part, context_length), []).append(part)
  shapes = _fewer(shapes, limits)
  return [_bucket(shapes[shape], shape, limits, pad_id) for shape in sorted(shapes)]


def _parts(group: Group, limits: Limits) -> Iterator[Group]:
  """Yields a group in parts that may run at a time, short rows apart from long ones.

  They part where that saves more padding than running the prefix again costs.
  """
  rows = sorted(group.rows, key=lambda row: len(row.inputs))
  lengths = np.array([len(row.inputs) for row in rows])
  saved = np.arange(len(rows)) * (lengths[-1] - np.roll(lengths, 1))  # by the first k rows
  k = int(np.argmax(saved))
  if saved[k] > len(group.prefix) + limits.shape_tokens:
    yield from _parts(Group(group.prefix, rows[:k]), limits)
    yield from _parts(Group(group.prefix, rows[k:]), limits)
    return
  n = limits.n_rows(_shape(group, limits.context_length))
  for start in range(0, len(rows), n):
    yield Group(group.prefix, rows[start:start + n])


def _shape(group: Group, context_length: int) -> Shape:
  """Returns the padded (prefix, rows per context, row length, reads, targets per read)."""
  n_prefix = len(group.prefix)
  length = min(_padded(max(len(row.inputs) for row in group.rows)), context_length - n_prefix)
  prefix = min(padded_prefix(n_prefix), context_length - length)
  n_reads = _padded(max(row.n_reads for row in group.rows))
  n_targets = max(len(row.spans) for row in group.rows)
  return prefix, _padded(len(group.rows)), length, n_reads, n_targets


def _padded(n: int) -> int:
  """Returns the padded form of a length."""
  if n > LENGTHS[-1]:
    return -(-n // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
  return LENGTHS[bisect.bisect_left(LENGTHS, n)]


def _padded_down(n: int) -> int:
  """Returns the largest padded form that is not above a length."""
  if n > LENGTHS[-1]:
    return n // LENGTH_MULTIPLE * LENGTH_MULTIPLE
  return LENGTHS[bisect.bisect_right(LENGTHS, n) - 1]


def _tokens(shape: Shape, n_groups: int) -> int:
  """Returns what groups cost; a read costs as much as a token: it meets the vocabulary."""
  P, I, S, T, _ = shape
  return n_groups * (P + I * (S + T))


def _least(shapes: Shapes, limits: Limits) -> float:
  """Returns the tokens that a shape of its own has to save."""
  total = sum(_tokens(shape, len(groups)) for shape, groups in shapes.items())
  return max(limits.shape_tokens, SHAPE_SHARE * total)


def _joined(shapes: Shapes, limits: Limits) -> Shapes:
  """Returns the groups in fewer shapes: one joins another where that costs few tokens.

  The smallest goes first. Rows with a prefix stay apart from rows without.
  """
  shapes, least = dict(shapes), _least(shapes, limits)
  for shape in sorted(shapes, key=lambda shape: (_tokens(shape, len(shapes[shape])), shape)):
    if shape not in shapes:  # another has joined it
      continue
    added = {}
    for other in shapes:
      both: Shape = tuple(map(max, shape, other))
      if (other != shape and bool(other[0]) == bool(shape[0]) and both[1] <= limits.n_rows(both)
          and both[0] + both[2] <= limits.context_length):
        added[other] = (_tokens(both, len(shapes[shape]) + len(shapes[other]))
                        - _tokens(shape, len(shapes[shape])) - _tokens(other, len(shapes[other])))
    other = min(added, key=lambda other: (added[other], other), default=None)
    if other is not None and added[other] <= least:
      groups = shapes.pop(shape) + shapes.pop(other)
      both = tuple(map(max, shape, other))
      shapes[both] = shapes.get(both, []) + groups
  return shapes


def _fewer(shapes: Shapes, limits: Limits) -> Shapes:
  """Returns the groups in the fewest shapes: `_joined` until nothing changes.

  Rows go without their prefix, too, where that costs few tokens: contexts that fill the model's
  are parted from what follows at many places, and no shape holds two of them.
  """
  n_before = 0
  while n_before != len(shapes):
    n_before, shapes = len(shapes), _joined(shapes, limits)
    least, alone = _least(shapes, limits), max((s for s in shapes if not s[0]), default=(0,) * 5)
    for shape in sorted(shape for shape in shapes if shape[0]):
      P, _, S, T, R = shape
      both: Shape = tuple(map(max, alone, (0, 1, P + S, T, R)))
      before, groups = shapes.get(alone, []), shapes[shape]
      n_rows = sum(len(group.rows) for group in groups)
      added = (_tokens(both, len(before) + n_rows) - _tokens(alone, len(before))
               - _tokens(shape, len(groups)))
      if added <= least and len(shapes) > 1:
        rows = [Group((), [row.after(group.prefix)]) for group in groups for row in group.rows]
        shapes = {s: g for s, g in shapes.items() if s not in (alone, shape)}
        shapes[both], alone = before + rows, both
  return shapes


def _bucket(groups: list[Group], shape: Shape, limits: Limits, pad_id: int) -> Bucket:
  """Returns groups of one shape as arrays."""
  P, I, S, T, R = shape
  I = min(I, max(len(group.rows) for group in groups))
  n_chunks = -(-len(groups) // limits.n_contexts((P, I, S, T, R)))
  C = -(-len(groups) // n_chunks)
  C = -(-C // limits.row_multiple) * limits.row_multiple
  n_chunks = -(-len(groups) // C)
  n_contexts = n_chunks * C
  # empty contexts keep one visible token, so that no softmax runs over nothing
  prefix_CP = np.full((n_contexts, P), pad_id, np.int32)
  lengths_C = np.full(n_contexts, min(1, P), np.int32)
  tokens_BS = np.full((n_contexts * I, S), pad_id, np.int32)
  places_BT = np.zeros((n_contexts * I, T), np.int32)
  targets_BTR = np.full((n_contexts * I, T, R), pad_id, np.int32)
  counts_BTR = np.zeros((n_contexts * I, T, R), bool)
  slots_BR = np.full((n_contexts * I, R), -1, np.int64)
  for c, group in enumerate(groups):
    prefix_CP[c, :len(group.prefix)] = group.prefix
    lengths_C[c] = len(group.prefix)
    for b, row in enumerate(group.rows, start=c * I):
      tokens_BS[b, :len(row.inputs)] = row.inputs
      places_BT[b, :row.n_reads] = np.arange(row.place, row.place + row.n_reads)
      for r, span in enumerate(row.spans):
        read = slice(span.place - row.place, span.place - row.place + len(span.targets))
        targets_BTR[b, read, r], counts_BTR[b, read, r] = span.targets, True
        slots_BR[b, r] = span.slot
  chunked = lambda x: x.reshape(n_chunks, -1, *x.shape[1:])
  return Bucket(
      prefix_CP.reshape(n_chunks, C, P), chunked(lengths_C), chunked(tokens_BS),
      chunked(places_BT), chunked(targets_BTR), chunked(counts_BTR), chunked(slots_BR))
