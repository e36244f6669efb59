"""From item text to tokens: exact answer boundaries, and what cannot be scored."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from research.data.errors import DataError
from research.data.tokenizers import Tokenizer
from research.errors import UserError
from research.monitors.items import LeftOut, MonitorItem, UnusableItem, check_items, refusal

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
  def texts(self) -> tuple[Tokens, Tokens]:
    return self.generalizing, self.shortcut


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

  Raises UnusableItem when nothing precedes the first scored token, an answer adds no token, or both
  add the same.
  """
  end = len(item.prompt)
  texts = []
  for answer in (item.generalizing, item.shortcut):
    ids, offsets = tokenizer.encode_with_offsets(item.prompt + answer)
    n_inside = sum(1 for _ in itertools.takewhile(lambda offset: offset[1] <= end, offsets))
    texts.append((tuple(ids), n_inside))
  (good, good_inside), (short, short_inside) = texts
  if good == short:
    raise UnusableItem(item.item_id, 'both answers are the same tokens')
  n_prompt = min(common_length(good, short), good_inside, short_inside)
  if n_prompt in (len(good), len(short)):
    raise UnusableItem(item.item_id, 'an answer adds no token to its prompt')
  straddles = tuple(tokenizer.encode(item.prompt)) != good[:n_prompt]
  start = () if start_id is None else (start_id,)
  if not start and n_prompt == 0:
    raise UnusableItem(item.item_id, 'no whole token comes before the answers; lengthen the prompt '
                       'or give a start token')
  return EncodedItem(start + good, start + short, len(start) + n_prompt, straddles)


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
  """Returns the length of the longest common beginning."""
  return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


def read_together(texts: Sequence[Tokens]) -> list[list[int]]:
  """Returns texts by number: those of one list can be scored by reading the longest of them.

  What is read to score one of them, all but its last token, begins what is read to score another.
  So it is where an answer has one token, and where answers differ in their last token alone.
  """
  rows, longest = [], None
  # What begins another comes right after it, or after what begins with both.
  for i in sorted(range(len(texts)), key=lambda i: texts[i][:-1], reverse=True):
    inputs = texts[i][:-1]
    if longest is not None and longest[:len(inputs)] == inputs:
      rows[-1].append(i)
    else:
      longest = inputs
      rows.append([i])
  return sorted(map(sorted, rows))


Encode = Callable[[MonitorItem, Tokenizer, int | None], EncodedItem]


def try_items(items: Sequence[MonitorItem], tokenizer: Tokenizer, context_length: int,
              start_id: int | None, encode: Encode = encode_item) -> list[EncodedItem | LeftOut]:
  """Returns every item in tokens, or why it cannot be scored within the context."""
  tried = []
  for item in items:
    try:
      tokens = encode(item, tokenizer, start_id)
      n_context = max(len(tokens.generalizing), len(tokens.shortcut)) - 1
      if n_context > context_length:
        raise UnusableItem(item.item_id, 'prompt and answer are longer than '
                           f'model.context_length={context_length}')
      tried.append(tokens)
    except UnusableItem as error:
      tried.append(LeftOut(item.item_id, error.reason))
    except DataError as error:
      tried.append(LeftOut(item.item_id, str(error)))
  return tried


def encode_items(items: Sequence[MonitorItem], tokenizer: Tokenizer, context_length: int,
                 start_id: int | None = None, encode: Encode = encode_item) -> list[EncodedItem]:
  """Returns all items in tokens; raises UserError listing those that cannot be scored."""
  check_items(items)
  tried = try_items(items, tokenizer, context_length, start_id, encode)
  if left_out := [tokens for tokens in tried if isinstance(tokens, LeftOut)]:
    raise UserError(refusal(left_out, len(items)))
  return tried
