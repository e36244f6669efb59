"""The source for supervised fine-tuning: examples packed into rows, with a loss on responses only.

Examples are packed once, best fit first by falling length; an epoch is every row once, shuffled.
So row j is a pure function of the data, the config and j.
"""

import dataclasses
import pathlib
from typing import Any

import grain

from research.data import text_files, tokenizers
from research.data.config import DataConfig, SftConfig
from research.data.conversations import SUFFIXES, Conversation, read_conversations
from research.data.errors import DataError
from research.data.packing import Row
from research.data.sft_rows import fitted, make_row, packed
from research.data.templates import Example, encode, exchanges, start_token
from research.data.token_store import content_key
from research.data.tokenizers import Tokenizer

_TEMPLATE = (
  'system_text', 'user_text', 'assistant_text', 'turn_end', 'response_lead', 'begins_with')
_SAID = 5  # overlong examples that are named on the screen; the manifest has all


@dataclasses.dataclass(frozen=True)
class Part:
  """Training or held-out examples, and the indices of those that each row holds, in order."""

  examples: tuple[Example, ...]
  rows: tuple[tuple[int, ...], ...]

  def facts(self) -> dict[str, int]:
    """Numbers of examples, rows, tokens and supervised tokens."""
    return {'examples': len(self.examples), 'rows': len(self.rows),
            'tokens': sum(len(e.ids) for e in self.examples),
            'supervised_tokens': int(sum(e.supervised.sum() for e in self.examples))}


def open_sft(config: DataConfig) -> 'SftSource':
  """Reads, checks, tokenizes and packs all conversations that `config.sft` names.

  Raises DataError for bad records, a tokenizer without an end token, or nothing left to train on.
  """
  sft, length = config.sft, config.sequence_length
  tokenizer = _tokenizer(sft.tokenizer)
  files = [(entry, path) for i, entry in enumerate(sft.paths)
           for path in text_files.list_files(entry, SUFFIXES, f'data.sft.paths[{i}]')]
  cut = [_cut(read_conversations(path), sft, path) for _, path in files]
  encoded = [[encode(one, sft, tokenizer) for part in side for one in part]
             for side in zip(*cut, strict=True)]
  kept, overlong = zip(*(fitted(side, length, sft.overlong) for side in encoded), strict=True)
  overlong = [*overlong[0], *overlong[1]]
  if overlong:
    print(_said(overlong, sft.overlong, length), flush=True)
  if not kept[0]:
    raise DataError(f'data.sft: none of the examples fits into data.sequence_length={length}; the '
                    f'shortest needs {min(n for _, n in overlong)}')
  described = [{'path': str(path), 'entry': entry, 'sha256': text_files.file_sha256(path)}
               for entry, path in files]
  content = content_key(hashes=[file['sha256'] for file in described], tokenizer=tokenizer.hash,
                        begins_with=start_token(tokenizer, sft.begins_with), end=tokenizer.eos_id,
                        heldout_fraction=sft.heldout_fraction)
  facts = {'template': {name: getattr(sft, name) for name in _TEMPLATE},
           'first_example': _rendered(cut[0][0][0], sft), 'files': described,
           'overlong': {'rule': sft.overlong, 'examples': overlong}}
  parts = (Part(tuple(side), packed(side, length, sft.pack)) for side in kept)
  return SftSource(config, tokenizer, *parts, content, facts)


def _tokenizer(name: str) -> Tokenizer:
  """Returns the tokenizer; raises DataError for one without an end token."""
  tokenizer = tokenizers.byte_tokenizer() if name == 'bytes' else tokenizers.load(name)
  if tokenizer.eos_id is None:
    raise DataError(f'data.sft.tokenizer={name} has no end-of-text token, which ends responses; '
                    'name it as eos_token in a tokenizer_config.json beside it')
  return tokenizer


def _cut(read: list[Conversation], sft: SftConfig, path: pathlib.Path
         ) -> tuple[list[Conversation], ...]:
  """Returns the training part of a file, and the held-out part where there is one."""
  if not sft.heldout_fraction:
    return read, []
  at = len(read) - max(round(len(read) * sft.heldout_fraction), 1)
  if at == 0:
    raise DataError(f'{path} has one example, too few to hold out data.sft.heldout_fraction='
                    f'{sft.heldout_fraction}; 0 holds out none')
  return read[:at], read[at:]


def _rendered(conversation: Conversation, sft: SftConfig) -> str:
  """Returns the text of a conversation, supervised parts in double angle quotes."""
  return ''.join(f'{asked}«{answered}<end>»' for asked, answered in exchanges(conversation, sft))


def _said(overlong: list[tuple[str, int]], rule: str, length: int) -> str:
  named = ', '.join(f'{where} ({n})' for where, n in overlong[:_SAID])
  more = f' and {len(overlong) - _SAID} more' if len(overlong) > _SAID else ''
  done = {'leave_out': 'left out', 'truncate': 'cut (left out where no response is left)'}[rule]
  return (f'examples of more than data.sequence_length={length} tokens are {done}: {named}{more}; '
          'manifest.json lists all')


class SftSource:
  """Row j of the endless order over packed examples, a pure function of (data, config, j).

  Attributes:
    tokenizer, hash: of the data.
    n_rows: rows in one epoch.
    start_id: the token before every conversation, None for none.
  """

  def __init__(self, config: DataConfig, tokenizer: Tokenizer, train: Part, heldout: Part,
               content_hash: str, facts: dict[str, Any]):
    self.tokenizer, self.hash, self.n_rows = tokenizer, content_hash, len(train.rows)
    self.start_id = start_token(tokenizer, config.sft.begins_with)
    self._length, self._train, self._heldout = config.sequence_length, train, heldout
    self._facts, self._entries = facts, {f['path']: f['entry'] for f in facts['files']}
    self._order = grain.MapDataset.range(self.n_rows).seed(config.seed).shuffle().repeat()

  def row(self, j: int) -> Row:
    """Row j: tokens_L, targets_L, segment_ids_L, positions_L (int32), loss_mask_L (float32)."""
    return self._row(self._train, self._place(j))

  def documents(self, j: int) -> list[dict[str, Any]]:
    """The examples of row j: id, kind (entry of `paths`), source (file), text, position, n_tokens.

    `supervised` is the number of their tokens that have a loss.
    """
    described, first = [], 0
    for i in self._train.rows[self._place(j)]:
      example = self._train.examples[i]
      n_tokens, file = len(example.ids) - 1, example.where.rpartition('#')[0]
      described.append({
        'id': example.where, 'kind': self._entries[file], 'source': file, 'position': first,
        'n_tokens': n_tokens, 'supervised': int(example.supervised.sum()),
        'epoch': j // self.n_rows, 'text': self.tokenizer.decode(example.ids)})
      first += n_tokens
    return described

  def heldout_rows(self) -> list[Row]:
    """Rows of the held-out examples, each once."""
    return [self._row(self._heldout, at) for at in range(len(self._heldout.rows))]

  def facts(self) -> dict[str, Any]:
    """What the manifest records of the data; the template and the overlong examples too."""
    return {'kind': 'sft', 'hash': self.hash, 'tokenizer_hash': self.tokenizer.hash,
            'vocab_size': self.tokenizer.vocab_size, 'rows_per_epoch': self.n_rows,
            'train': self._train.facts(), 'heldout': self._heldout.facts(), **self._facts}

  def _place(self, j: int) -> int:
    """Which of the packed rows stands at row j."""
    if j < 0:
      raise DataError(f'row {j} does not exist; rows count from 0')
    return int(self._order[j])

  def _row(self, part: Part, at: int) -> Row:
    pad_id = 0 if self.tokenizer.pad_id is None else self.tokenizer.pad_id
    return make_row([part.examples[i] for i in part.rows[at]], self._length, pad_id)
