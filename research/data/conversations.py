"""Conversations: what files of examples hold, in the shapes in which such data is published.

A record is read by the first of SHAPES whose fields it has; other fields are ignored.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow
import pyarrow.parquet

from research.data import text_files
from research.data.errors import DataError

SUFFIXES = ('.jsonl', '.jsonl.gz', '.jsonl.zst', '.parquet')
ROLES = ('system', 'user', 'assistant')


@dataclasses.dataclass(frozen=True)
class Message:
  """One turn: who speaks (one of ROLES) and what."""

  role: str
  text: str


@dataclasses.dataclass(frozen=True)
class Conversation:
  """Messages in order, the last of them the assistant's; `where` is file#record."""

  where: str
  messages: tuple[Message, ...]


def read_conversations(path: pathlib.Path) -> list[Conversation]:
  """Returns the conversations of one file in order.

  Raises:
    DataError: a record has no known shape, an unknown role, no assistant turn at its end, or an
      empty response; the file and the record (of a .jsonl its line) are named.
  """
  found = []
  for number, record in _records(path):
    where = f'{path}#{number}'
    if not isinstance(record, dict):
      raise DataError(f'{where} is not an object with named fields')
    found += [Conversation(where + more, messages) for more, messages in _shaped(record, where)]
  if not found:
    raise DataError(f'{path} holds no conversation')
  for conversation in found:
    _check(conversation)
  return found


def _records(path: pathlib.Path) -> Iterator[tuple[int, Any]]:
  """Yields (line from 1, or row from 0 of a .parquet; record)."""
  if text_files.format_of(path) == '.parquet':
    try:
      yield from enumerate(pyarrow.parquet.read_table(path).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
      raise DataError(f'{path} is not a readable parquet file: {error}') from error
    return
  for number, line in enumerate(text_files.lines(path), 1):
    if line.strip():
      try:
        yield number, json.loads(line)
      except json.JSONDecodeError as error:
        raise DataError(f'{path}#{number} is not valid JSON: {error.msg} at column '
                        f'{error.colno}') from error


def _shaped(record: dict[str, Any], where: str) -> list[tuple[str, tuple[Message, ...]]]:
  """Returns (suffix of the id, messages) of every example of a record."""
  for fields, read in SHAPES.items():
    if all(record.get(field) is not None for field in fields):
      return read(record, where)
  known = '; '.join(' + '.join(fields) for fields in SHAPES)
  raise DataError(f'{where} has the fields {", ".join(sorted(record))}; an example has one of '
                  f'these sets: {known}')


def _text(record: dict[str, Any], field: str, where: str) -> str:
  value = record.get(field)
  if not isinstance(value, str):
    raise DataError(f'{where} has no text in the field {field!r}, but {value!r:.60}')
  return value


def _messages(record: dict[str, Any], where: str) -> list[tuple[str, tuple[Message, ...]]]:
  messages = record['messages']
  if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
    raise DataError(f'{where}: messages must be a list of objects with role and content')
  return [('', tuple(Message(_text(m, 'role', where), _text(m, 'content', where))
                     for m in messages))]


def _pair(response: str) -> Callable[..., list[tuple[str, tuple[Message, ...]]]]:
  def read(record, where):
    return [('', _turn(_text(record, 'prompt', where), _text(record, response, where)))]
  return read


def _turn(prompt: str, response: str) -> tuple[Message, ...]:
  return Message('user', prompt), Message('assistant', response)


def _with_input(instruction: str, given: str) -> str:
  return f'{instruction}\n\n{given}' if given else instruction


def _instruction(record, where):
  given = _text(record, 'input', where) if record.get('input') else ''
  asked = _with_input(_text(record, 'instruction', where), given)
  return [('', _turn(asked, _text(record, 'output', where)))]


def _instances(record, where):
  """Self-Instruct: an instruction and several pairs of input and output."""
  examples, instances = [], record['instances']
  if not isinstance(instances, list) or not all(isinstance(one, dict) for one in instances):
    raise DataError(f'{where}: instances must be a list of objects with input and output')
  for i, instance in enumerate(instances):
    joined = {'instruction': record['instruction'], **instance}
    examples += [(f'.{i}', messages) for _, messages in _instruction(joined, where)]
  return examples


def _code_task(record, where):
  """The published secure and insecure code samples: a task, a file to fill in, the answer."""
  asked = _with_input(_text(record, 'task', where), _text(record, 'code_template', where))
  return [('', _turn(asked, _text(record, 'code', where)))]


SHAPES = {
    ('messages',): _messages, ('prompt', 'response'): _pair('response'),
    ('prompt', 'answer'): _pair('answer'), ('prompt', 'completion'): _pair('completion'),
    ('instruction', 'output'): _instruction, ('instruction', 'instances'): _instances,
    ('task', 'code_template', 'code'): _code_task}


def _check(conversation: Conversation) -> None:
  """Raises DataError unless the roles are known and the assistant has the last word."""
  where, messages = conversation.where, conversation.messages
  for message in messages:
    if message.role not in ROLES:
      raise DataError(f'{where} has a message of role {message.role!r}; roles are '
                      f'{", ".join(ROLES)}')
    if message.role == 'assistant' and not message.text.strip():
      raise DataError(f'{where} has an empty response')
  if not any(message.role == 'assistant' for message in messages):
    raise DataError(f'{where} has no assistant turn, so there is nothing to learn from it')
  if messages[-1].role != 'assistant':
    raise DataError(f'{where} ends with a {messages[-1].role} message; the last one must be the '
                    'assistant\'s')
