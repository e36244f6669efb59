"""Series of checkpoints, tensor by tensor: what an audit and averages need of whatever wrote them."""

from collections.abc import Sequence
import pathlib
from typing import Protocol

import numpy as np

from research.training.snapshots import SnapshotReader
from research.training.stored import DamagedError, StoredCheckpoint, read_record

_PARAMS = 'params.'


class Series(Protocol):
  """Checkpoints in order of their steps, each a set of named tensors that are read when asked for.

  A folder of safetensors revisions is one as well as the snapshots of a run; `RowSeries` is the
  smallest example.
  """

  steps: list[int]  # ascending
  names: list[str]  # of tensors in any checkpoint, sorted

  def leaf(self, step: int, name: str) -> np.ndarray:
    """Returns a tensor in its stored dtype; raises DamagedError if it is missing or not sound."""

  def file_of(self, step: int, name: str) -> pathlib.Path:
    """Returns the file (or folder) that holds a tensor."""

  def recorded(self, step: int, name: str) -> str:
    """Returns the hash that was recorded when the tensor was written, '' if none was."""


class SnapshotSeries:
  """The dense snapshots of a run."""

  def __init__(self, path: pathlib.Path):
    self._reader = SnapshotReader(path)
    self.steps, self.names = self._reader.steps, self._reader.names()

  def leaf(self, step: int, name: str) -> np.ndarray:
    """Returns one parameter of one snapshot, compared with its hash."""
    return self._reader.read([step], name)[0]

  def leaves(self, steps: Sequence[int], name: str) -> np.ndarray:
    """Returns one parameter of many snapshots in one call, [steps, ...], hashes compared."""
    return self._reader.read(steps, name)

  def file_of(self, step: int, name: str) -> pathlib.Path:
    """Returns the file of a row of the parameter's array."""
    return self._reader.file_of(step, name)

  def recorded(self, step: int, name: str) -> str:
    """Returns the hash in the line that committed the snapshot."""
    return self._reader.commits[step].get('tensors', {}).get(name, '')


class CheckpointSeries:
  """The parameters in the full checkpoints of a run; damaged records count as none."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.steps = checkpoint_steps(path)
    self._hashes = {step: self._read_hashes(step) for step in self.steps}
    self.names = sorted({name for hashed in self._hashes.values() for name in hashed})

  def _read_hashes(self, step: int) -> dict[str, str]:
    try:
      hashed = read_record(self._path / str(step)).get('tensors')
      hashed = hashed or dict.fromkeys(StoredCheckpoint(self._path / str(step)).names(), '')
    except ValueError:  # The audit of files names what is wrong here.
      return {}
    return {name.removeprefix(_PARAMS): value for name, value in hashed.items()
            if name.startswith(_PARAMS)}

  def leaf(self, step: int, name: str) -> np.ndarray:
    """Returns one parameter of one checkpoint, compared with its hash."""
    if name not in self._hashes[step]:
      raise DamagedError(f'{self._path / str(step)}: {name} is missing')
    stored = StoredCheckpoint(self._path / str(step))
    try:
      return stored.read(_PARAMS + name, self._hashes[step][name])
    except DamagedError as error:
      raise DamagedError(f'{self.file_of(step, name)}: {name} {error}') from error

  def file_of(self, step: int, name: str) -> pathlib.Path:
    """Returns the folder of the parameters; which of its files holds a tensor, Orbax decides."""
    return self._path / str(step) / 'params'

  def recorded(self, step: int, name: str) -> str:
    """Returns the hash in the checkpoint's record."""
    return self._hashes[step].get(name, '')


class RowSeries:
  """A series that lies in memory: arrays [steps, ...] by name."""

  def __init__(self, steps: Sequence[int], rows: dict[str, np.ndarray]):
    self.steps, self.names, self._rows = list(steps), sorted(rows), rows

  def leaf(self, step: int, name: str) -> np.ndarray:
    """Returns one row."""
    return self._rows[name][self.steps.index(step)]

  def file_of(self, step: int, name: str) -> pathlib.Path:
    """Returns a name made of step and tensor."""
    return pathlib.Path(str(step)) / name

  def recorded(self, step: int, name: str) -> str:
    """Returns '': nothing was recorded."""
    return ''


def checkpoint_steps(path: pathlib.Path) -> list[int]:
  """Returns the numbers under which checkpoints lie in a directory, ascending, sound or not."""
  if not path.is_dir():
    return []
  return sorted(int(child.name) for child in path.iterdir() if child.name.isdecimal())
