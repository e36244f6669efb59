"""What a run trains on, as typed fields: the kind of data, its shapes and its mixture."""

import dataclasses
import math
from typing import Annotated as A
from typing import ClassVar

from research.data.errors import DataError
from research.data.microworld import MicroworldConfig


def _check_mixture(field: str, paths, weights, schedule) -> None:
  """Raises DataError unless weights and schedule fit the paths of `field` ('data.text', say)."""
  if weights and schedule:
    raise DataError(f'{field}.weights and {field}.schedule are both set; give one of them')
  rows = [(f'{field}.weights', weights)] if weights else []
  for i, (start, *shares) in enumerate(schedule):
    rows.append((f'{field}.schedule[{i}] after its start step', tuple(shares)))
    previous = schedule[i - 1][0] if i else -1
    if start != int(start) or (i == 0 and start != 0) or start <= previous:
      raise DataError(
        f'{field}.schedule[{i}] starts at step {start:g}; start steps are whole numbers that begin '
        'with 0 and rise')
  for name, shares in rows:
    if len(shares) != len(paths):
      raise DataError(f'{name} has {len(shares)} weights for {len(paths)} entries of {field}.paths')
    if any(not math.isfinite(w) or w < 0 for w in shares) or sum(shares) <= 0:
      raise DataError(f'{name}={shares} must be finite, none negative and not all zero')


def _check_fraction(field: str, fraction: float) -> None:
  if not 0 <= fraction < 1:
    raise DataError(f'{field}.heldout_fraction={fraction} is outside [0, 1)')


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Text files: .txt and .jsonl (plain, .gz or .zst) and .parquet."""

  KIND: ClassVar[str] = 'identity'
  paths: A[tuple[str, ...], 'files, folders or globs; each entry is one source of the mixture'] = ()
  weights: A[tuple[float, ...], 'share of rows by path; empty: by number of tokens'] = ()
  schedule: A[
    tuple[tuple[float, ...], ...],
    'windows of weights: (start step, share of rows by path...), the first starting at step 0',
  ] = ()
  heldout_fraction: A[float, 'contiguous last part of each file that is never trained on'] = 0.1
  tokenizer: A[str, "'bytes', 'bpe' (trained on the training part) or path of a tokenizer.json"] = (
    'bytes')
  bpe_vocab_size: A[int, "tokens, specials included; used by tokenizer='bpe'"] = 2048
  text_field: A[str, 'field of a .jsonl object or column of a .parquet file'] = 'text'

  def __post_init__(self):
    _check_mixture('data.text', self.paths, self.weights, self.schedule)
    _check_fraction('data.text', self.heldout_fraction)
    if self.tokenizer == 'bpe' and self.bpe_vocab_size < 259:
      raise DataError(
        f'data.text.bpe_vocab_size={self.bpe_vocab_size} is below 259 (256 bytes and 3 specials)')


@dataclasses.dataclass(frozen=True)
class TokensConfig:
  """Pre-tokenized shards: .npy, .bin (with <file>.json beside them) and .arrayrecord."""

  KIND: ClassVar[str] = 'identity'
  paths: A[tuple[str, ...], 'files, folders or globs; each entry is one source of the mixture'] = ()
  weights: A[tuple[float, ...], 'share of rows by path; empty: by number of tokens'] = ()
  schedule: A[
    tuple[tuple[float, ...], ...],
    'windows of weights: (start step, share of rows by path...), the first starting at step 0',
  ] = ()
  heldout_fraction: A[float, 'contiguous last part of each file that is never trained on'] = 0.0
  tokenizer: A[str, "'bytes' or path of the tokenizer.json that made the shards"] = 'bytes'

  def __post_init__(self):
    _check_mixture('data.tokens', self.paths, self.weights, self.schedule)
    _check_fraction('data.tokens', self.heldout_fraction)
    if self.tokenizer == 'bpe':
      raise DataError(
        "data.tokens.tokenizer='bpe' cannot be trained on tokens; name a tokenizer.json")


@dataclasses.dataclass(frozen=True)
class SftConfig:
  """Conversations (.jsonl, plain or .gz or .zst, and .parquet) whose responses alone have a loss.

  The template is text: role texts before messages, turn_end after those that are not of the
  assistant, response_lead before a response. The lead, the response and the end-of-text token
  after it are supervised.
  """

  KIND: ClassVar[str] = 'identity'
  paths: A[tuple[str, ...], 'files, folders or globs of conversations'] = ()
  heldout_fraction: A[float, 'last part of each file that is never trained on'] = 0.1
  tokenizer: A[str, "'bytes' or path of a tokenizer.json, that of the checkpoint trained from"] = (
    'bytes')
  system_text: A[str, 'before a system message'] = 'System: '
  user_text: A[str, 'before a user message'] = 'User: '
  assistant_text: A[str, 'before a response'] = 'Assistant:'
  turn_end: A[str, 'after a system or user message'] = '\n'
  response_lead: A[str, 'first characters of every response, supervised'] = ' '
  begins_with: A[str, "special token before every conversation: 'eos' (as in our packed text), "
                 "'bos' or 'none'"] = 'eos'
  pack: A[bool, 'whether a row holds several examples, which do not see one another'] = True
  overlong: A[str, "examples longer than a row: 'leave_out', 'truncate' (the end is lost) or "
              "'refuse'; all are listed in the manifest"] = 'leave_out'

  def __post_init__(self):
    _check_fraction('data.sft', self.heldout_fraction)
    for name, allowed in (('begins_with', ('eos', 'bos', 'none')),
                          ('overlong', ('leave_out', 'truncate', 'refuse'))):
      if getattr(self, name) not in allowed:
        raise DataError(f'data.sft.{name}={getattr(self, name)!r} is none of {", ".join(allowed)}')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """What each step is fed: batch k is a pure function of these fields and k."""

  KIND: ClassVar[str] = 'identity'
  kind: A[str, "'microworld', 'text', 'tokens' or 'sft'"] = 'microworld'
  sequence_length: A[int, 'tokens per row'] = 64
  batch_size: A[int, 'rows per step, over all devices and hosts'] = 48
  seed: A[int, 'seed of order, mixture and generation'] = 0
  microworld: A[MicroworldConfig, "used by kind='microworld'"] = MicroworldConfig()
  text: A[TextConfig, "used by kind='text'"] = TextConfig()
  tokens: A[TokensConfig, "used by kind='tokens'"] = TokensConfig()
  sft: A[SftConfig, "used by kind='sft'"] = SftConfig()
  cache_dir: A[str, 'folder of tokenized text; empty: the one the caller names', 'placement'] = ''

  def __post_init__(self):
    if self.kind not in ('microworld', 'text', 'tokens', 'sft'):
      raise DataError(f"data.kind={self.kind!r} is none of 'microworld', 'text', 'tokens', 'sft'")
    for name in ('sequence_length', 'batch_size'):
      if getattr(self, name) < 1:
        raise DataError(f'data.{name}={getattr(self, name)} must be at least 1')
    if self.seed < 0:
      raise DataError(f'data.seed={self.seed} must not be negative')
    if self.kind != 'microworld' and not getattr(self, self.kind).paths:
      raise DataError(f'data.{self.kind}.paths is empty; name at least one file, folder or glob')
