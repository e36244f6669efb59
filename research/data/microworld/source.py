"""Rows of the micro-world: an endless, index-addressable source of packed documents."""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import random
from typing import Any, Iterator, Sequence

import numpy as np

from research.data import tokenizers
from research.data.errors import DataError
from research.data.microworld import documents as grammar
from research.data.microworld.config import FAMILIES, MicroworldConfig
from research.data.microworld.words import WORDS
from research.data.microworld.world import World

Row = dict[str, np.ndarray]

# any document of one problem, person or rumor fits into so many words
SHORTEST_ROW = 32
_N_HASHED_ROWS = 32


class MicroworldSource:
  """Row j of the endless global order, a pure function of (settings, j); batch k = rows kB...

  Args:
    config: shares, drift and world.
    sequence_length: tokens per row (L).
    batch_size: rows per optimizer step, from which a row knows its drift window.
    seed: seed of the documents and of the drift.

  Raises DataError when no document fits into a row.
  """

  n_rows = None
  start_id = None  # documents begin with their first word

  def __init__(
      self, config: MicroworldConfig, *, sequence_length: int, batch_size: int, seed: int):
    if sequence_length < SHORTEST_ROW:
      raise DataError(f'data.sequence_length={sequence_length} is too short for the micro-world; '
                      f'it needs at least {SHORTEST_ROW}')
    self.config = config
    self.sequence_length = sequence_length
    self.batch_size = batch_size
    self.seed = seed
    self.world = World(config.world_seed)
    self.tokenizer = tokenizers.word_tokenizer(WORDS)
    self._ids = dict(zip(WORDS, self.tokenizer.encode(' '.join(WORDS)), strict=True))
    self._cumulative = functools.lru_cache(maxsize=8)(self._cumulative_shares)

  @functools.cached_property
  def hash(self) -> str:
    """Hex hash of the settings, of the tokenizer and of some rows (so of the grammar too)."""
    settings = dict(
        dataclasses.asdict(self.config), sequence_length=self.sequence_length,
        batch_size=self.batch_size, seed=self.seed, tokenizer=self.tokenizer.hash)
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    samples = [self.page(j) for j in range(_N_HASHED_ROWS)] + [self._heldout_page(0)]
    digest.update(json.dumps(samples).encode())
    return digest.hexdigest()

  def window_shares(self, window: int) -> dict[str, float]:
    """Returns every family's share of the rows in one drift window; they sum to 1."""
    shares = self.config.shares()
    for family in self.config.drift_families if self.config.drift_sd > 0 else ():
      rng = random.Random(f'drift {self.seed} {family} {window}')
      shares[family] *= math.exp(self.config.drift_sd * rng.gauss(0.0, 1.0))
    total = sum(shares.values())
    return {family: share / total for family, share in shares.items()}

  def window(self, j: int) -> int:
    """Returns the drift window that row j lies in."""
    return j // self.batch_size // self.config.drift_window

  def page(self, j: int) -> tuple[str, list[grammar.Document]]:
    """Returns the family of row j and its documents, as words."""
    rng = random.Random(f'row {self.seed} {j}')
    return self._page(rng, self._cumulative(self.window(j)))

  def row(self, j: int) -> Row:
    """Returns row j: tokens_L, targets_L, segment_ids_L, positions_L (int32), loss_mask_L (f32).

    The target of a document's last word is the end token, which is never an input. Rows end in
    padding: segment 0, no loss.
    """
    return self._pack(self.page(j)[1])

  def documents(self, j: int) -> list[dict[str, Any]]:
    """Returns id, family (also as `kind`), place in the row and text of every document of row j."""
    family, pages = self.page(j)
    ends = list(itertools.accumulate(len(document) for document in pages))
    return [
        {'id': f'{j}.{i}', 'family': family, 'kind': family, 'source': 'microworld',
         'window': self.window(j), 'position': end - len(document), 'n_tokens': len(document),
         'text': ' '.join(document)}
        for i, (document, end) in enumerate(zip(pages, ends, strict=True))]

  def heldout_rows(self) -> Sequence[Row]:
    """Returns the held-out rows: drawn from a seed of their own, with undrifted shares."""
    return _HeldoutRows(self)

  def heldout_row(self, i: int) -> Row:
    """Returns held-out row i in the form of `row`."""
    return self._pack(self._heldout_page(i)[1])

  def facts(self) -> dict[str, Any]:
    """Returns what the manifest records."""
    return {
        'kind': 'microworld', 'hash': self.hash, 'tokenizer_hash': self.tokenizer.hash,
        'vocab_size': self.tokenizer.vocab_size, 'sequence_length': self.sequence_length,
        'batch_size': self.batch_size, 'seed': self.seed,
        'heldout_rows': self.config.heldout_rows}

  def _cumulative_shares(self, window: int) -> tuple[float, ...]:
    return tuple(itertools.accumulate(self.window_shares(window).values()))

  def _page(self, rng: random.Random, cumulative) -> tuple[str, list[grammar.Document]]:
    family, = rng.choices(FAMILIES, cum_weights=cumulative)
    return family, grammar.page(family, self.world, rng, self.sequence_length)

  def _heldout_page(self, i: int) -> tuple[str, list[grammar.Document]]:
    # the stream doesn't depend on self.seed, so runs with different seeds share their held-out set
    rng = random.Random(f'held out {self.config.world_seed} {i}')
    return self._page(rng, tuple(itertools.accumulate(self.config.shares().values())))

  def _pack(self, pages: list[grammar.Document]) -> Row:
    """Returns documents side by side as one padded row."""
    length, pad, end = self.sequence_length, self.tokenizer.pad_id, self.tokenizer.eos_id
    tokens, targets, segments, positions = [], [], [], []
    for i, document in enumerate(pages):
      ids = [self._ids[word] for word in document]
      tokens += ids
      targets += ids[1:]
      targets.append(end)
      segments += [i + 1] * len(ids)
      positions += range(len(ids))
    n_tokens = len(tokens)
    padding = [0] * (length - n_tokens)
    return {
        'tokens_L': np.array(tokens + [pad] * len(padding), np.int32),
        'targets_L': np.array(targets + [pad] * len(padding), np.int32),
        'segment_ids_L': np.array(segments + padding, np.int32),
        'positions_L': np.array(positions + padding, np.int32),
        'loss_mask_L': np.array([1.0] * n_tokens + padding, np.float32)}


class _HeldoutRows(Sequence):
  """The held-out rows of a source, made when asked for."""

  def __init__(self, source: MicroworldSource):
    self._source = source

  def __len__(self) -> int:
    return self._source.config.heldout_rows

  def __getitem__(self, i: int) -> Row:
    if not 0 <= i < len(self):
      raise IndexError(f'held-out row {i} of {len(self)}')
    return self._source.heldout_row(i)

  def __iter__(self) -> Iterator[Row]:
    return (self[i] for i in range(len(self)))
