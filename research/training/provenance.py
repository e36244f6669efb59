"""What a checkpoint says about itself: hashes of its tensors, its parent, its data, its makers."""

import hashlib
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from research.config import ExperimentConfig, settings
from research.training import hashes, manifest

_MODULUS = 2**128


def config_hash(config: ExperimentConfig) -> str:
  """Returns the hash of all identity settings, 32 hex digits."""
  lines = [f'{row.path} = {row.value!r}\n' for row in settings(config) if row.kind == 'identity']
  return hashlib.blake2b(''.join(lines).encode(), digest_size=16).hexdigest()


class Window:
  """A running hash over the batches consumed, the same for any number of processes.

  It is the sum of the hashes of all rows with their places, so hashes of adjoining windows add up.
  """

  def __init__(self, first: int, rows: Sequence[int], owned: Sequence[int]):
    """Begins after step `first`.

    Args:
      first: steps done before the window.
      rows: places in the batch of the rows that this process feeds.
      owned: those of them that no other process counts.
    """
    self._mine = [(i, row) for i, row in enumerate(rows) if row in set(owned)]
    self._first, self._last, self._sum = first, first, 0

  def add(self, step: int, local: dict[str, np.ndarray]) -> None:
    """Adds the batch that gave `step`: its arrays [R, L] by name, rows of this process."""
    self._last = step
    x_RL = np.concatenate([local[name].view(np.uint32) for name in sorted(local)], axis=1)
    for i, row in self._mine:
      hashed = hashlib.blake2b(x_RL[i], digest_size=16, salt=step.to_bytes(8, 'little'),
                               person=row.to_bytes(8, 'little'))
      self._sum += int.from_bytes(hashed.digest(), 'little')

  def close(self) -> dict[str, Any]:
    """Returns the window's steps (from, to] and hash, and begins the next; every process calls."""
    parts = np.frombuffer((self._sum % _MODULUS).to_bytes(16, 'little'), np.uint32)
    if jax.process_count() > 1:
      parts = multihost_utils.process_allgather(parts)
    total = sum(int.from_bytes(row.tobytes(), 'little') for row in np.atleast_2d(parts))
    window = {'from': self._first, 'to': self._last, 'hash': f'{total % _MODULUS:032x}'}
    self._first, self._sum = self._last, 0
    return window


class Chain:
  """Writes the record of each full checkpoint, which names the one before it."""

  def __init__(self, config: ExperimentConfig, sources: dict[str, str],
               parent: dict[str, Any] | None, window: Window):
    """Begins after a checkpoint.

    Args:
      config: of the run.
      sources: hashes of the data and the tokenizer.
      parent: run directory (of another run, else ''), step and hash of the checkpoint before.
      window: of the batches consumed since.
    """
    self._parent, self.window = parent, window
    self._makers = {
        'config': config_hash(config), **sources, 'code': manifest.code_version(),
        'packages': {name: importlib.metadata.version(name) for name in manifest.PACKAGES}}

  def record(self, step: int, tensors: dict[str, str], position: dict[str, int]) -> dict[str, Any]:
    """Returns the record of a checkpoint; the next one will name it as its parent."""
    record = {'step': step, 'tensors': tensors, 'position': position, 'parent': self._parent,
              'window': self.window.close(), **self._makers}
    record['hash'] = hashes.record_hash(record)
    self._parent = {'run_dir': '', 'step': step, 'hash': record['hash']}
    return record
