"""A suite of monitor items: what a model can score of it, what is left out and what is said."""

import collections
import json
import pathlib
from collections.abc import Iterator
from typing import NamedTuple

from research.data.tokenizers import Tokenizer
from research.errors import UserError
from research.monitors.encoding import Encode, encode_item, try_items
from research.monitors.items import LeftOut, MonitorItem, listed, refusal
from research.run_dir import write_whole


class Suite(NamedTuple):
  """What a suite holds.

  Attributes:
    items: that can be scored.
    left_out: what cannot, and why.
    notes: what else is to be said: absent datasets, too few demonstrations.
  """

  items: list[MonitorItem]
  left_out: list[LeftOut]
  notes: list[str]

  @property
  def n_all(self) -> int:
    """Items, those that are left out too."""
    return len(self.items) + len(self.left_out)


def scorable(suite: Suite, tokenizer: Tokenizer, context_length: int, start_id: int | None,
             encode: Encode = encode_item) -> Suite:
  """Returns the suite without the items that this model cannot score, which are left out by id.

  Their answers have tokens, something comes before them, and prompt and answer fit into the
  context; all by `encode`.
  """
  tried = try_items(suite.items, tokenizer, context_length, start_id, encode)
  left_out = [tokens for tokens in tried if isinstance(tokens, LeftOut)]
  items = [item for item, tokens in zip(suite.items, tried, strict=True)
           if not isinstance(tokens, LeftOut)]
  return Suite(items, [*suite.left_out, *left_out], suite.notes)


def settled(suite: Suite, bad_items: str) -> Suite:
  """Returns the suite where all that it leaves out may be left out (monitors.bad_items).

  Raises UserError listing what cannot be scored where that is to be refused, or is everything.
  """
  if suite.left_out and (bad_items == 'refuse' or not suite.items):
    raise UserError(refusal(suite.left_out, suite.n_all))
  return suite


def described(suite: Suite) -> Iterator[str]:
  """Yields lines: what is scored, what is left out by reason with ids, and what differs."""
  counts = collections.Counter((item.family, item.dataset) for item in suite.items)
  yield (f'monitors: {len(suite.items)} of {suite.n_all} items are scored: '
         + ', '.join(f'{family}/{dataset} {n}' for (family, dataset), n in counts.items()))
  for line in listed(suite.left_out):
    yield f'monitors: left out, {line}'
  for note in suite.notes:
    yield f'monitors: {note}'


def write_left_out(suite: Suite, path: pathlib.Path) -> None:
  """Writes what is left out and why as JSON lines; removes the file where nothing is."""
  if not suite.left_out:
    path.unlink(missing_ok=True)
    return
  rows = [json.dumps(out._asdict(), ensure_ascii=False) for out in suite.left_out]
  write_whole(path, '\n'.join(rows) + '\n')
  print(f'monitors: what is left out, with reasons: {path}', flush=True)
