"""From encoded items to static-shaped arrays: rows, the prefixes they share, buckets."""

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from research.monitors.encoding import EncodedItem, Tokens, common_length

# rows are padded up to one of these lengths (tokens), later to multiples of LENGTH_MULTIPLE
LENGTHS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64)
LENGTH_MULTIPLE, PREFIX_MULTIPLE = 32, 16
# contexts shorter than this are not worth running apart from their rows; each has to save as many
SHORTEST_PREFIX = 8
# another compiled shape has to save this many tokens, or this share of all
SHAPE_TOKENS, SHAPE_SHARE = 512, 0.005

Shape = tuple[int, int, int, int, int]


@dataclasses.dataclass(frozen=True)
class Row:
  """One sequence to run, and what is read from it.

  `targets[t]` are the tokens whose log-probability is read at input position `start + t`, each
  for one of `slots`, where `counts[t]` says so. Slots number the sums over t (2 i and 2 i + 1 are
  the generalizing and the shortcut answer of item i).
  """

  inputs: Tokens
  start: int
  targets: tuple[Tokens, ...]
  counts: tuple[tuple[bool, ...], ...]
  slots: tuple[int, ...]


def _rows(i: int, item: EncodedItem) -> list[Row]:
  """Returns the row or rows that score item i."""
  answers = list(zip((item.generalizing, item.shortcut), item.starts, (2 * i, 2 * i + 1)))
  return [_row(together) for together in ([answers] if item.in_one_row else
                                          [[answer] for answer in answers])]


def _row(answers: list[tuple[Tokens, int, int]]) -> Row:
  """Returns the row of (text, where its scored tokens begin, slot)s; the longest has all inputs."""
  longest = max((text for text, _, _ in answers), key=len)
  first = min(start for _, start, _ in answers)
  places = range(first, len(longest))
  targets = tuple(tuple(text[min(p, len(text) - 1)] for text, _, _ in answers) for p in places)
  counts = tuple(tuple(start <= p < len(text) for text, start, _ in answers) for p in places)
  return Row(longest[:-1], first - 1, targets, counts, tuple(slot for _, _, slot in answers))


@dataclasses.dataclass(frozen=True)
class _Group:
  """Rows behind one shared prefix (empty: rows that stand alone), which their inputs lack."""

  prefix: Tokens
  rows: list[Row]


@dataclasses.dataclass
class _Node:
  """A beginning of `depth` tokens that the items first..last (in order of prompts) share.

  `cost` is the least number of tokens that runs them as groups from `parts`, each (first, last,
  tokens of its prefix).
  """

  depth: int
  first: int
  last: int
  cost: int
  parts: list[tuple[int, int, int]]

  def add(self, child: '_Node') -> None:
    self.last, self.cost = child.last, self.cost + child.cost
    self.parts += child.parts


def _prefixes(prompts: Sequence[Tokens], n_rows: Sequence[int], n_inputs: Sequence[int]
              ) -> list[tuple[int, int, int]]:
  """Returns which prompts run behind one prefix: (first, last, its length), 0 for alone.

  Goes up the tree of all beginnings and takes at each the cheaper: one prefix for all below, or
  what is best for its branches.

  Args:
    prompts: in lexicographic order.
    n_rows, n_inputs: of each item, how many rows it takes and how many tokens these have.
  """
  rows, inputs = np.cumsum([0, *n_rows]), np.cumsum([0, *n_inputs])

  def closed(node: _Node) -> _Node:
    # every row keeps a token of its own to predict from; the shortest prompt comes first
    n_shared = min(node.depth, len(prompts[node.first]) - 1)
    n = int(rows[node.last + 1] - rows[node.first])
    cost = _padded_prefix(n_shared) + int(inputs[node.last + 1] - inputs[node.first]) - n * n_shared
    if n > 1 and n_shared >= SHORTEST_PREFIX and cost + SHORTEST_PREFIX <= node.cost:
      node.cost, node.parts = cost, [(node.first, node.last, n_shared)]
    return node

  open_nodes, parts = [], []
  for i, prompt in enumerate(prompts):
    node = closed(_Node(len(prompt), i, i, n_inputs[i], [(i, i, 0)]))
    depth = common_length(prompt, prompts[i + 1]) if i + 1 < len(prompts) else -1
    while open_nodes and open_nodes[-1].depth > depth:
      open_nodes[-1].add(node)
      node = closed(open_nodes.pop())
    if open_nodes and open_nodes[-1].depth == depth:
      open_nodes[-1].add(node)
    elif depth < 0:
      parts = node.parts
    else:
      open_nodes.append(_Node(depth, node.first, node.last, node.cost, list(node.parts)))
  return parts


def _groups(encoded: Sequence[EncodedItem]) -> Iterator[_Group]:
  """Yields the rows of all items, gathered by the beginnings that their prompts share."""
  order = sorted(range(len(encoded)), key=lambda i: encoded[i].prompt)
  rows = [_rows(i, encoded[i]) for i in order]
  prompts = [encoded[i].prompt for i in order]
  n_inputs = [sum(len(row.inputs) for row in mine) for mine in rows]
  for first, last, n in _prefixes(prompts, [len(mine) for mine in rows], n_inputs):
    cut = [dataclasses.replace(row, inputs=row.inputs[n:], start=row.start - n)
           for mine in rows[first:last + 1] for row in mine]
    if n:
      yield _Group(prompts[first][:n], cut)
    else:
      yield from (_Group((), [row]) for row in cut)


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


def make_buckets(encoded: Sequence[EncodedItem], *, context_length: int, batch_rows: int,
                 row_multiple: int = 1, pad_id: int = 0) -> list[Bucket]:
  """Returns all rows in as few shapes as padding allows.

  Args:
    encoded: the suite.
    context_length: of the model, in tokens; no padded row exceeds it.
    batch_rows: rows run at a time, at most (but `row_multiple` at least).
    row_multiple: the number of contexts run at a time is a multiple of this.
    pad_id: any valid token.
  """
  shapes: dict[Shape, list[_Group]] = {}
  for group in _groups(encoded):
    for rows in _by_length(group.rows, len(group.prefix), batch_rows):
      part = _Group(group.prefix, rows)
      shapes.setdefault(_shape(part, context_length), []).append(part)
  shapes = _fewer(shapes, context_length, batch_rows)
  return [
      _bucket(shapes[shape], shape, batch_rows, row_multiple, pad_id) for shape in sorted(shapes)]


def _by_length(rows: list[Row], n_prefix: int, batch_rows: int) -> Iterator[list[Row]]:
  """Yields rows of one prefix in parts of at most `batch_rows`, short ones apart from long ones.

  They part where that saves more padding than running the prefix again costs.
  """
  rows = sorted(rows, key=lambda row: len(row.inputs))
  lengths = np.array([len(row.inputs) for row in rows])
  saved = np.arange(len(rows)) * (lengths[-1] - np.roll(lengths, 1))  # by the first k rows
  k = int(np.argmax(saved))
  if saved[k] > n_prefix + SHAPE_TOKENS:
    yield from _by_length(rows[:k], n_prefix, batch_rows)
    yield from _by_length(rows[k:], n_prefix, batch_rows)
    return
  for start in range(0, len(rows), batch_rows):
    yield rows[start:start + batch_rows]


def _shape(group: _Group, context_length: int) -> Shape:
  """Returns the padded (prefix, rows per context, row length, reads, targets per read)."""
  n_prefix = len(group.prefix)
  length = min(_padded(max(len(row.inputs) for row in group.rows)), context_length - n_prefix)
  prefix = min(_padded_prefix(n_prefix), context_length - length)
  n_reads = _padded(max(len(row.targets) for row in group.rows))
  n_targets = max(len(row.slots) for row in group.rows)
  return prefix, _padded(len(group.rows)), length, n_reads, n_targets


def _padded(n: int) -> int:
  """Returns the padded form of a length."""
  if n > LENGTHS[-1]:
    return -(-n // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
  return LENGTHS[bisect.bisect_left(LENGTHS, n)]


def _padded_prefix(n: int) -> int:
  """Returns the padded form of a prefix's length."""
  return -(-n // PREFIX_MULTIPLE) * PREFIX_MULTIPLE


def _fewer(shapes: dict[Shape, list[_Group]], context_length: int, batch_rows: int
           ) -> dict[Shape, list[_Group]]:
  """Returns the groups in fewer shapes: one joins another where that costs few tokens.

  The smallest goes first. Rows with a prefix stay apart from rows without. A read costs as much as
  a token: it meets the vocabulary.
  """
  def tokens(shape: Shape, n_groups: int) -> int:
    return n_groups * (shape[0] + shape[1] * (shape[2] + shape[3]))

  shapes = dict(shapes)
  total = sum(tokens(shape, len(groups)) for shape, groups in shapes.items())
  least = max(SHAPE_TOKENS, SHAPE_SHARE * total)
  for shape in sorted(shapes, key=lambda shape: (tokens(shape, len(shapes[shape])), shape)):
    if shape not in shapes:  # another has joined it
      continue
    added = {}
    for other in shapes:
      both: Shape = tuple(map(max, shape, other))
      if (other != shape and bool(other[0]) == bool(shape[0]) and both[1] <= batch_rows
          and both[0] + both[2] <= context_length):
        added[other] = (tokens(both, len(shapes[shape]) + len(shapes[other]))
                        - tokens(shape, len(shapes[shape])) - tokens(other, len(shapes[other])))
    other = min(added, key=lambda other: (added[other], other), default=None)
    if other is not None and added[other] <= least:
      groups = shapes.pop(shape) + shapes.pop(other)
      both = tuple(map(max, shape, other))
      shapes[both] = shapes.get(both, []) + groups
  return shapes


def _bucket(groups: list[_Group], shape: Shape, batch_rows: int, row_multiple: int, pad_id: int
            ) -> Bucket:
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
  counts_BTR = np.zeros((n_contexts * I, T, R), bool)
  slots_BR = np.full((n_contexts * I, R), -1, np.int64)
  for c, group in enumerate(groups):
    prefix_CP[c, :len(group.prefix)] = group.prefix
    lengths_C[c] = len(group.prefix)
    for b, row in enumerate(group.rows, start=c * I):
      n_reads, n_slots = len(row.targets), len(row.slots)
      tokens_BS[b, :len(row.inputs)] = row.inputs
      places_BT[b, :n_reads] = np.arange(row.start, row.start + n_reads)
      targets_BTR[b, :n_reads, :n_slots] = row.targets
      counts_BTR[b, :n_reads, :n_slots] = row.counts
      slots_BR[b, :n_slots] = row.slots
  chunked = lambda x: x.reshape(n_chunks, -1, *x.shape[1:])
  return Bucket(
      prefix_CP.reshape(n_chunks, C, P), chunked(lengths_C), chunked(tokens_BS),
      chunked(places_BT), chunked(targets_BTR), chunked(counts_BTR), chunked(slots_BR))
