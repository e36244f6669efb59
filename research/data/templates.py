"""From conversations to token ids with exact boundaries between prompts and responses."""

import dataclasses
import itertools

import numpy as np

from research.data.config import SftConfig
from research.data.conversations import Conversation
from research.data.errors import DataError
from research.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Example:
  """One conversation in tokens, the token before it and those that end responses included.

  Attributes:
    where: file#record.
    ids: int32 [n].
    supervised: bool [n]: the tokens of responses and the end token after each.
  """

  where: str
  ids: np.ndarray
  supervised: np.ndarray


def exchanges(conversation: Conversation, template: SftConfig) -> list[tuple[str, str]]:
  """Returns (prompt, response) texts in order; every response is followed by the end token."""
  before = {'system': template.system_text, 'user': template.user_text}
  found, prompt = [], ''
  for message in conversation.messages:
    if message.role == 'assistant':
      found.append((prompt + template.assistant_text, template.response_lead + message.text))
      prompt = ''
    else:
      prompt += before[message.role] + message.text + template.turn_end
  return found


def encode_exchange(tokenizer: Tokenizer, prompt: str, response: str
                    ) -> tuple[list[int], list[int]]:
  """Returns the ids of a prompt and of the response to it.

  They are tokenized apart, as they are where the model is asked, so no token spans both. Where
  that does not give the text back (a tokenizer that puts a space before every text, or splits at
  white space), they are tokenized as one text; a token that begins in the prompt belongs to it.
  """
  apart = tokenizer.encode(prompt), tokenizer.encode(response)
  if tokenizer.decode(apart[0] + apart[1]) == prompt + response:
    return apart
  ids, offsets = tokenizer.encode_with_offsets(prompt + response)
  n = sum(1 for _ in itertools.takewhile(lambda offset: offset[0] < len(prompt), offsets))
  return ids[:n], ids[n:]


def start_token(tokenizer: Tokenizer, begins_with: str) -> int | None:
  """Returns the id of the token before every conversation; DataError where there is no such."""
  if begins_with == 'none':
    return None
  found = tokenizer.bos_id if begins_with == 'bos' else tokenizer.eos_id
  if found is None:
    raise DataError(f"data.sft.begins_with='{begins_with}': the tokenizer has no such token; "
                    "'none' puts none")
  return found


def encode(conversation: Conversation, template: SftConfig, tokenizer: Tokenizer) -> Example:
  """Returns a conversation in tokens.

  Raises DataError where its first token would have a loss, or the tokenizer cannot write a word.
  """
  start = start_token(tokenizer, template.begins_with)
  ids, supervised = ([], []) if start is None else ([start], [False])
  for prompt, response in exchanges(conversation, template):
    try:
      asked, answered = encode_exchange(tokenizer, prompt, response)
    except DataError as error:
      raise DataError(f'{conversation.where}: {error}') from error
    ids += [*asked, *answered, tokenizer.eos_id]
    supervised += [False] * len(asked) + [True] * (len(answered) + 1)
  if supervised[0]:
    raise DataError(f'{conversation.where}: nothing stands before the first response; set '
                    'data.sft.begins_with or a role text')
  return Example(conversation.where, np.asarray(ids, np.int32), np.asarray(supervised))
