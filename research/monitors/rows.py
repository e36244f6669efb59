"""From texts in tokens to rows that are run, and the beginnings that these share."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from research.monitors.encoding import Tokens, common_length, read_together

PREFIX_MULTIPLE = 16  # shared beginnings are padded up to multiples of this (tokens)
# contexts shorter than this are not worth running apart from their rows; each has to save as many
SHORTEST_PREFIX = 8


class Item(Protocol):
  """Texts in tokens that all begin with `prompt`; of each, what follows its start is scored.

  Starts are counted from the text's beginning; none is before the prompt's end.
  """

  @property
  def prompt(self) -> Tokens: ...

  @property
  def texts(self) -> tuple[Tokens, ...]: ...

  @property
  def starts(self) -> tuple[int, ...]: ...


class Span(NamedTuple):
  """Tokens that are scored for `slot`, predicted at input position `place` and those after it."""

  slot: int
  place: int
  targets: Tokens


@dataclasses.dataclass(frozen=True)
class Row:
  """One sequence to run, and what is read from it.

  Slots number the texts of all items in order, so 2 i and 2 i + 1 are the generalizing and the
  shortcut answer of monitor item i.
  """

  inputs: Tokens
  spans: tuple[Span, ...]

  @property
  def place(self) -> int:
    """The first input position that is read."""
    return min(span.place for span in self.spans)

  @property
  def n_reads(self) -> int:
    return max(span.place + len(span.targets) for span in self.spans) - self.place

  def behind(self, n: int) -> 'Row':
    """Returns the row without its first n inputs."""
    return Row(self.inputs[n:], tuple(
        span._replace(place=span.place - n) for span in self.spans))

  def after(self, prefix: Tokens) -> 'Row':
    """Returns the row with more inputs before its own."""
    return Row(prefix + self.inputs, tuple(
        span._replace(place=span.place + len(prefix)) for span in self.spans))


def _rows(item: Item, slot: int) -> list[Row]:
  """Returns the row or rows that score an item, of which the first text has a slot."""
  return [
      Row(max((item.texts[i] for i in together), key=len)[:-1], tuple(
          Span(slot + i, item.starts[i] - 1, item.texts[i][item.starts[i]:]) for i in together))
      for together in read_together(item.texts)]


@dataclasses.dataclass(frozen=True)
class Group:
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
    cost = padded_prefix(n_shared) + int(inputs[node.last + 1] - inputs[node.first]) - n * n_shared
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


def grouped(items: Sequence[Item]) -> Iterator[Group]:
  """Yields the rows of all items, gathered by the beginnings that their prompts share."""
  slots = np.cumsum([0, *(len(item.texts) for item in items)]).tolist()
  order = sorted(range(len(items)), key=lambda i: items[i].prompt)
  rows = [_rows(items[i], slots[i]) for i in order]
  prompts = [items[i].prompt for i in order]
  n_inputs = [sum(len(row.inputs) for row in mine) for mine in rows]
  for first, last, n in _prefixes(prompts, [len(mine) for mine in rows], n_inputs):
    cut = [row.behind(n) for mine in rows[first:last + 1] for row in mine]
    if n:
      yield Group(prompts[first][:n], cut)
    else:
      yield from (Group((), [row]) for row in cut)


def padded_prefix(n: int) -> int:
  """Returns the padded form of a prefix's length."""
  return -(-n // PREFIX_MULTIPLE) * PREFIX_MULTIPLE
