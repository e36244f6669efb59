"""Conversations with long and short prompts and responses, as texts and as bytes written out."""

import json
import pathlib

from research.data.config import DataConfig, SftConfig

EOS = 257  # of the byte tokenizer
LENGTH = 56
WORDS = ('sun', 'moon', 'ox', 'raven', 'salt', 'river', 'tin', 'oak')


def conversations(n: int = 60) -> list[list[dict[str, str]]]:
  """Messages of examples 0 to n - 1: one or two exchanges, some after a system message."""
  found = []
  for i in range(n):
    word = lambda k: WORDS[(i * 5 + k) % len(WORDS)]
    asked = ' '.join(word(k) for k in range(1 + i % 3))
    messages = [{'role': 'user', 'content': asked},
                {'role': 'assistant', 'content': ' '.join([word(1)] * (1 + i % 4))}]
    if i % 4 == 1:
      messages.insert(0, {'role': 'system', 'content': 'be'})
    if i % 5 == 2:
      messages += [{'role': 'user', 'content': 'é?'}, {'role': 'assistant', 'content': 'ok'}]
    found.append(messages)
  return found


def write(path: pathlib.Path, examples: list) -> None:
  path.write_text(''.join(json.dumps(e) + '\n' for e in examples), encoding='utf-8')


def config_for(path: pathlib.Path, batch_size: int, **sft) -> DataConfig:
  """The data config of a file of conversations, with short role texts."""
  settings = {'heldout_fraction': 0.0, 'system_text': 's:', 'user_text': 'u:',
              'assistant_text': 'a:', **sft}
  return DataConfig(kind='sft', sequence_length=LENGTH, batch_size=batch_size,
                    sft=SftConfig(paths=(str(path),), **settings))


def tokens_of(messages: list[dict[str, str]]) -> list[tuple[int, bool]]:
  """(byte or end token, whether it is supervised) of one conversation, written out."""
  found = [(EOS, False)]
  for message in messages:
    text = message['content'].encode()
    if message['role'] == 'assistant':
      found += [(byte, False) for byte in b'a:'] + [(byte, True) for byte in b' ' + text]
      found.append((EOS, True))
    else:
      found += [(byte, False) for byte in message['role'][:1].encode() + b':' + text + b'\n']
  return found
