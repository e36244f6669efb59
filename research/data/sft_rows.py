"""Rows of examples: which of them fit, how they are packed, and what a row then is."""

import bisect
from collections.abc import Sequence

import numpy as np

from research.data.errors import DataError
from research.data.packing import Row
from research.data.templates import Example


def fitted(examples: Sequence[Example], length: int, rule: str
           ) -> tuple[list[Example], list[tuple[str, int]]]:
  """Returns the examples that a row holds, and (where, tokens) of those that are too long.

  Args:
    examples: in tokens; one of n tokens needs n - 1 places, as its last token is only a target.
    length: of a row.
    rule: 'leave_out'; 'truncate' keeps the beginning, where a supervised token is left;
      'refuse' raises DataError.
  """
  kept, overlong = [], []
  for example in examples:
    n = len(example.ids)
    if n - 1 <= length:
      kept.append(example)
      continue
    if rule == 'refuse':
      raise DataError(f'{example.where} has {n - 1} tokens, data.sequence_length={length}; raise '
                      "it, or set data.sft.overlong to 'leave_out' or 'truncate'")
    overlong.append((example.where, n - 1))
    if rule == 'truncate' and example.supervised[:length + 1].any():
      kept.append(Example(example.where, example.ids[:length + 1], example.supervised[:length + 1]))
  return kept, overlong


def packed(examples: Sequence[Example], length: int, pack: bool) -> tuple[tuple[int, ...], ...]:
  """Returns which examples each row holds: one each, or best fit by falling length.

  Ties go to the earlier example and the earlier row.
  """
  if not pack:
    return tuple((i,) for i in range(len(examples)))
  sizes = [len(example.ids) - 1 for example in examples]
  rows: list[list[int]] = []
  room: list[tuple[int, int]] = []  # (places left, row), ascending
  for i in sorted(range(len(examples)), key=lambda i: (-sizes[i], i)):
    at = bisect.bisect_left(room, (sizes[i], -1))
    left, row = room.pop(at) if at < len(room) else (length, len(rows))
    if row == len(rows):
      rows.append([])
    rows[row].append(i)
    bisect.insort(room, (left - sizes[i], row))
  return tuple(map(tuple, rows))


def make_row(examples: Sequence[Example], length: int, pad_id: int) -> Row:
  """Row of whole examples, each a segment of its own with positions from 0.

  Returns:
    tokens_L, targets_L int32; segment_ids_L int32, from 1, 0 where padded; positions_L int32;
    loss_mask_L float32, 1 where the target is supervised.
  """
  row = {name: np.zeros(length, np.int32) for name in ('segment_ids_L', 'positions_L')}
  row |= {name: np.full(length, pad_id, np.int32) for name in ('tokens_L', 'targets_L')}
  row['loss_mask_L'] = np.zeros(length, np.float32)
  first = 0
  for segment, example in enumerate(examples, 1):
    span = slice(first, first + len(example.ids) - 1)
    row['tokens_L'][span] = example.ids[:-1]
    row['targets_L'][span] = example.ids[1:]
    row['loss_mask_L'][span] = example.supervised[1:]
    row['segment_ids_L'][span] = segment
    row['positions_L'][span] = np.arange(len(example.ids) - 1)
    first = span.stop
  return row
