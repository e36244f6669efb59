"""The source of rows over token streams: mixture, shuffling by epoch, held-out rows, documents."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from research.data.errors import DataError
from research.data.mixture import Mixture, WeightSchedule
from research.data.packing import Row, make_row
from research.data.token_store import TokenShard
from research.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Component:
  """One source of a mixture: the streams that one entry of `paths` names."""

  name: str
  train: tuple[TokenShard, ...]
  heldout: tuple[TokenShard, ...]
  facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Order:
  """How rows are cut, mixed and shuffled."""

  sequence_length: int
  batch_size: int
  seed: int
  schedule: WeightSchedule | None  # None: by number of rows


@dataclasses.dataclass(frozen=True)
class HeldoutDocument:
  """One held-out document: token ids without EOS, and the bytes of text that they stand for."""

  file: str
  number: int
  ids: np.ndarray
  n_bytes: int


class CorpusSource:
  """Row j of the endless order over a corpus, a pure function of (data, config, j).

  Attributes:
    tokenizer: of every component.
    hash: content hash of the data, hex.
    n_rows: rows in one epoch of every component.
  """

  def __init__(self, components: Sequence[Component], tokenizer: Tokenizer, order: Order, *,
               content_hash: str, facts: dict[str, Any], field: str):
    """`field` ('data.text', say) is named in errors; `facts` joins what `facts()` returns."""
    self.tokenizer, self.hash = tokenizer, content_hash
    self._components, self._order, self._facts = tuple(components), order, facts
    self._rows = [self._row_ends(c.train) for c in components]
    for i, (component, ends) in enumerate(zip(components, self._rows, strict=True)):
      if ends[-1] == 0:
        n_tokens = sum(len(shard) for shard in component.train)
        raise DataError(f'{field}.paths[{i}]={component.name} has {n_tokens} training tokens, '
                        f'fewer than the {order.sequence_length + 1} of one row')
    self.n_rows = int(sum(ends[-1] for ends in self._rows))
    schedule = order.schedule or WeightSchedule([(0, tuple(float(e[-1]) for e in self._rows))])
    self._mixture = Mixture(schedule, order.batch_size, order.seed)
    self._shuffled = [
      grain.MapDataset.range(int(ends[-1])).seed(_seed_of(order.seed, i)).shuffle().repeat()
      for i, ends in enumerate(self._rows)]

  @property
  def start_id(self) -> int:
    """Token that stands before the first of a document."""
    return self.tokenizer.eos_id

  def row(self, j: int) -> Row:
    """Row j: tokens_L, targets_L, segment_ids_L, positions_L (int32), loss_mask_L (float32)."""
    shard, first = self._chunk(j)
    length = self._order.sequence_length
    return make_row(shard.tokens[first:first + length + 1], shard.eos_id, length, self._pad_id)

  def documents(self, j: int) -> list[dict[str, Any]]:
    """What row j contains: id, file, document, tokens [start, end) within it, path, epoch, text.

    `kind` is the entry of `paths`, `position` where in the row the text begins.
    """
    source, index = self._mixture.place(j)
    shard, first = self._chunk(j)
    name = self._components[source].name
    more = {'kind': name, 'path': name, 'epoch': index // int(self._rows[source][-1])}
    described = []
    for d in shard.describe(first, first + self._order.sequence_length):
      at, n_tokens = first + d['position'], d['tokens'][1] - d['tokens'][0]
      text = self.tokenizer.decode(shard.tokens[at:at + n_tokens])
      described.append({**d, **more, 'source': d['file'], 'n_tokens': n_tokens, 'text': text})
    return described

  def heldout_rows(self) -> 'HeldoutRows':
    """Rows in which every held-out token is a target once; the end of a stream is padded."""
    shards = [shard for component in self._components for shard in component.heldout]
    return HeldoutRows(shards, self._order.sequence_length, self._pad_id)

  def heldout_documents(self) -> list[HeldoutDocument]:
    """The held-out documents one by one; raises DataError where their bytes are unknown."""
    found = []
    for component in self._components:
      for shard in component.heldout:
        if shard.documents is None or (shard.documents[:, 2] < 0).any():
          raise DataError(f'{component.name}: the held-out text is unknown or not restored exactly '
                          "by its tokenizer; bits per byte need data.kind='text' and a lossless "
                          'tokenizer')
        for d, (file, number, n_bytes) in enumerate(shard.documents):
          start, end = shard.span(d)
          ids = np.asarray(shard.tokens[start:end])
          found.append(HeldoutDocument(shard.files[file], int(number), ids, int(n_bytes)))
    return found

  def facts(self) -> dict[str, Any]:
    """What the manifest records of the data."""
    heldout = [sum(len(shard) for shard in c.heldout) for c in self._components]
    components = [
      {'path': c.name, 'train_tokens': sum(len(shard) for shard in c.train), 'heldout_tokens': n,
       'rows': int(ends[-1]), **c.facts}
      for c, n, ends in zip(self._components, heldout, self._rows, strict=True)]
    return {**self._facts, 'hash': self.hash, 'tokenizer_hash': self.tokenizer.hash,
            'vocab_size': self.tokenizer.vocab_size, 'rows_per_epoch': self.n_rows,
            'components': components}

  def epochs(self, n_rows: int) -> dict[str, float]:
    """How often each component has been gone through in the first n_rows rows."""
    counts = self._mixture.counts(n_rows)
    return {c.name: float(n / ends[-1])
            for c, n, ends in zip(self._components, counts, self._rows, strict=True)}

  @property
  def _pad_id(self) -> int:
    return 0 if self.tokenizer.pad_id is None else self.tokenizer.pad_id

  def _row_ends(self, shards: Sequence[TokenShard]) -> np.ndarray:
    """int64 [n_shards]: rows in the shards up to and with each; a row needs L + 1 tokens."""
    length = self._order.sequence_length
    return np.cumsum([max(len(shard) - 1, 0) // length for shard in shards])

  def _chunk(self, j: int) -> tuple[TokenShard, int]:
    """The stream that row j is cut from, and where in it the row begins."""
    if j < 0:
      raise DataError(f'row {j} does not exist; rows count from 0')
    source, index = self._mixture.place(j)
    ends = self._rows[source]
    at = int(self._shuffled[source][index])
    s = int(np.searchsorted(ends, at, 'right'))
    within = at - (int(ends[s - 1]) if s else 0)
    return self._components[source].train[s], within * self._order.sequence_length


class HeldoutRows(Sequence):
  """Consecutive rows over held-out streams; random access."""

  def __init__(self, shards: Sequence[TokenShard], length: int, pad_id: int):
    self._shards, self._length, self._pad_id = shards, length, pad_id
    self._ends = np.cumsum([-(-max(len(shard) - 1, 0) // length) for shard in shards], dtype=int)

  def __len__(self) -> int:
    return int(self._ends[-1]) if len(self._ends) else 0

  def __getitem__(self, i: int) -> Row:
    if not 0 <= i < len(self):
      raise IndexError(f'held-out row {i} of {len(self)}')
    s = int(np.searchsorted(self._ends, i, 'right'))
    first = (i - (int(self._ends[s - 1]) if s else 0)) * self._length
    shard = self._shards[s]
    return make_row(
      shard.tokens[first:first + self._length + 1], shard.eos_id, self._length, self._pad_id)


def _seed_of(seed: int, component: int) -> int:
  """A seed for each component's shuffling, so that equal files are not shuffled alike."""
  return int(np.random.SeedSequence((seed, component)).generate_state(1)[0])
