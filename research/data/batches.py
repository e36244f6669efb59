"""The data that the training loop sees: a source chosen by config, and batches by step number."""

import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from research.data.config import DataConfig
from research.data.errors import DataError
from research.data.microworld import MicroworldSource
from research.data.packing import Row, stack_rows
from research.data.sft import open_sft
from research.data.text_corpus import open_text, open_tokens
from research.data.tokenizers import Tokenizer

Batch = dict[str, np.ndarray]


class Source(Protocol):
  """Row j of an endless order, a pure function of (config, j); batch k is rows kB .. kB + B - 1."""

  tokenizer: Tokenizer
  hash: str  # of the content, hex
  n_rows: int | None  # in one epoch; None: rows never repeat
  start_id: int | None  # token before the first of a document; None: there is none

  def row(self, j: int) -> Row:
    """tokens_L, targets_L, segment_ids_L, positions_L (int32) and loss_mask_L (float32)."""

  def documents(self, j: int) -> list[dict[str, Any]]:
    """What row j contains, document by document.

    id, kind (family, or entry of the mixture), source (file), text, and the position in the row
    and number of its tokens; more where the source knows more.
    """

  def heldout_rows(self) -> Sequence[Row]:
    """Rows that training never sees, by random access."""

  def facts(self) -> dict[str, Any]:
    """What the manifest records."""


def make_source(config: DataConfig, n_steps: int, cache_dir: str | pathlib.Path) -> Source:
  """The source that `config` describes.

  Args:
    config: what to read and how to mix it.
    n_steps: of the whole run; rows do not depend on it, but a window of weights that would start
      after the run is refused.
    cache_dir: where tokenized text is kept unless config.cache_dir names a folder.

  Raises DataError when data is missing, empty, broken or made with another tokenizer.
  """
  cache_dir = pathlib.Path(config.cache_dir or cache_dir)
  return _SOURCES[config.kind](config, n_steps, cache_dir)


def _microworld(config: DataConfig, n_steps: int, cache_dir: pathlib.Path) -> Source:
  del n_steps, cache_dir  # generated, endless
  return MicroworldSource(config.microworld, sequence_length=config.sequence_length,
                          batch_size=config.batch_size, seed=config.seed)


def _text(config: DataConfig, n_steps: int, cache_dir: pathlib.Path) -> Source:
  _check_schedule(config.text.schedule, 'data.text.schedule', n_steps)
  return open_text(config, cache_dir)


def _tokens(config: DataConfig, n_steps: int, cache_dir: pathlib.Path) -> Source:
  _check_schedule(config.tokens.schedule, 'data.tokens.schedule', n_steps)
  return open_tokens(config, cache_dir)


def _sft(config: DataConfig, n_steps: int, cache_dir: pathlib.Path) -> Source:
  del n_steps, cache_dir  # rows repeat by epochs; conversations are tokenized at every start
  return open_sft(config)


_SOURCES = {'microworld': _microworld, 'text': _text, 'tokens': _tokens, 'sft': _sft}


def _check_schedule(schedule, field: str, n_steps: int) -> None:
  for i, (start, *_) in enumerate(schedule):
    if start >= n_steps:
      raise DataError(f'{field}[{i}] starts at step {start:g}, after the last of {n_steps} steps')


def batch_at(source: Source, batch_size: int, step: int,
             rows: Sequence[int] | None = None) -> Batch:
  """Batch of one step: tokens, targets, segment_ids, positions, loss_mask, each [B, L].

  `rows` says which rows of the batch are wanted, in order (a host asks for its own); None: all.
  """
  wanted = range(batch_size) if rows is None else rows
  return stack_rows([source.row(step * batch_size + int(r)) for r in wanted])


def batches(source: Source, batch_size: int, start_step: int, rows: Sequence[int] | None = None,
            prefetch: int = 2) -> Iterator[Batch]:
  """Endless batches from `start_step` on, each equal to `batch_at` of its step.

  Args:
    source: where rows come from.
    batch_size: rows per step over all hosts.
    start_step: the first step wanted.
    rows: rows of each batch that this host needs; None: all.
    prefetch: batches made ahead by a thread of their own; 0: made when asked for.
  """
  steps = grain.MapDataset.range(start_step, np.iinfo(np.int64).max)
  dataset = steps.map(lambda step: batch_at(source, batch_size, int(step), rows))
  options = grain.ReadOptions(num_threads=int(prefetch > 0), prefetch_buffer_size=prefetch)
  return iter(dataset.to_iter_dataset(options))


def heldout_batches(source: Source, batch_size: int, n_batches: int,
                    rows: Sequence[int] | None = None) -> list[Batch]:
  """At most n_batches batches of held-out rows, evenly spaced over all of them.

  The last batch is filled up with rows of padding, which no loss counts. `rows` as in `batch_at`.
  """
  heldout = source.heldout_rows()
  n_wanted = min(n_batches * batch_size, len(heldout))
  chosen = [heldout[i * len(heldout) // n_wanted] for i in range(n_wanted)]
  if chosen:
    padding = {name: np.zeros_like(values) for name, values in chosen[0].items()}
    chosen += [padding] * (-n_wanted % batch_size)
  wanted = range(batch_size) if rows is None else rows
  return [stack_rows([chosen[first + int(r)] for r in wanted])
          for first in range(0, len(chosen), batch_size)]


def window_documents(source: Source, batch_size: int, first_step: int,
                     last_step: int) -> Iterator[dict[str, Any]]:
  """Every document of steps [first_step, last_step) in order, with step and row of the batch."""
  for step in range(first_step, last_step):
    for r in range(batch_size):
      for document in source.documents(step * batch_size + r):
        yield {'step': step, 'row': r, **document}
