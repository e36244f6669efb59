"""Dense parameter snapshots: one TensorStore array per leaf with a leading row axis.

A snapshot is there once its line stands in `commits.jsonl`, which is written after all arrays. The
line carries the hash of every leaf and of the line before. Rows are reused when a resumed run passes
the same steps again.
"""

from collections.abc import Sequence
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils

from parallelism.sharding import path_name
from research.training import hashes
from research.training.logs import JsonLines, read_rows
from research.training.stored import DamagedError, first_line

_FIRST_ROWS = 8  # Arrays grow by doubling.


def leaf_names(params: Any) -> list[str]:
  """Returns the dotted names of a parameter tree's leaves, in leaf order."""
  return [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]


def cast(params: Any, dtype: str) -> Any:
  """Returns the values that a snapshot of this dtype stores, as arrays of that dtype."""
  return jax.tree.map(lambda x: x.astype(dtype), params)


class SnapshotReader:
  """Read access to the committed snapshots of one run, leaf by leaf, lazily.

  Attributes:
    path: directory of the snapshots.
    commits: line of commits.jsonl of each step; `tensors` has hashes by leaf, where it is there.
  """

  def __init__(self, path: pathlib.Path):
    self.path = path
    self.commits = {row['step']: row for row in read_rows(path / 'commits.jsonl')}
    # Arrays written before there were hashes leave out what is all zero.
    self._complete = all('tensors' in row for row in self.commits.values())
    self._arrays: dict[str, ts.TensorStore] = {}

  @property
  def steps(self) -> list[int]:
    """Steps with a committed snapshot, ascending."""
    return sorted(self.commits)

  def names(self) -> list[str]:
    """Returns the names of the leaves that lie in the directory, sorted."""
    return sorted(path.parent.name for path in self.path.glob('*/zarr.json'))

  def array(self, name: str) -> ts.TensorStore:
    """Returns all rows of one leaf as a lazy TensorStore.

    Raises:
      DamagedError: it cannot be opened.
    """
    if name not in self._arrays:
      more = {'fill_missing_data_reads': False} if self._complete else {}
      try:
        self._arrays[name] = ts.open({**_spec(self.path, name), **more}).result()
      except ValueError as error:
        raise DamagedError(f'{self.path / name / "zarr.json"}: cannot be read '
                           f'({first_line(error)})') from error
    return self._arrays[name]

  def leaf(self, step: int, name: str) -> ts.TensorStore:
    """Returns one leaf of one snapshot as a lazy TensorStore view, which nothing checks."""
    return self.array(name)[self._row(step)]

  def file_of(self, step: int, name: str) -> pathlib.Path:
    """Returns the file that holds a leaf of a snapshot; zarr.json where that is damaged."""
    metadata = self.path / name / 'zarr.json'
    try:
      if self._row(step) >= self.array(name).shape[0]:
        return metadata
    except DamagedError:
      return metadata
    key = self.array(name).spec().to_json()['metadata']['chunk_key_encoding']
    separator = key.get('configuration', {}).get('separator', '/')
    place = ['c', str(self._row(step)), *['0'] * (self.array(name).ndim - 1)]
    return self.path / name / separator.join(place)

  def read(self, steps: Sequence[int], name: str) -> np.ndarray:
    """Returns one leaf of several snapshots, [steps, ...], in one call, compared with its hashes.

    Raises:
      DamagedError: it cannot be read or has another hash; the file is named.
    """
    rows = [self._row(step) for step in steps]
    n_rows = self.array(name).shape[0]
    if max(rows, default=-1) >= n_rows:
      raise DamagedError(f'{self.path / name / "zarr.json"}: has {n_rows} rows, a snapshot is row '
                         f'{max(rows)}')
    try:
      x = self.array(name)[rows].read().result()
    except (ValueError, IndexError) as error:
      raise DamagedError(f'{self.path / name}: cannot be read ({first_line(error)})') from error
    for step, found in zip(steps, hashes.row_digests(x), strict=True):
      said = self.commits[step].get('tensors', {name: found}).get(name)
      if said != found:
        raise DamagedError(f'{self.file_of(step, name)}: {name} of step {step} does not have the '
                           'content that was saved')
    return x

  def params(self, step: int, abstract: Any) -> Any:
    """Returns the snapshot as a tree of NumPy arrays shaped like `abstract`, hashes compared."""
    leaves = [self.read([step], name)[0] for name in leaf_names(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), leaves)

  def _row(self, step: int) -> int:
    if step not in self.commits:
      raise KeyError(f'{self.path} has no snapshot of step {step}; it has {self.steps}')
    return self.commits[step]['row']


def _spec(path: pathlib.Path, name: str) -> dict[str, Any]:
  return {'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': f'{path / name}/'}}


def commit_line(step: int, row: int, dtype: str, tensors: dict[str, str], parent: str
                ) -> dict[str, Any]:
  """Returns the line that commits a snapshot; `parent` is the hash of the line before, '' first."""
  line = {'step': step, 'row': row, 'dtype': dtype, 'tensors': tensors, 'parent': parent}
  return {**line, 'hash': hashes.record_hash(line)}


class SnapshotWriter:
  """Writes snapshots while training goes on; `wait` (or the next write) commits the last one."""

  def __init__(self, path: pathlib.Path, abstract: Any, dtype: str, last_step: int):
    """Opens or creates the arrays and drops the commits of steps after last_step.

    Args:
      path: directory of the snapshots.
      abstract: parameter tree of arrays or ShapeDtypeStruct (global shapes).
      dtype: stored dtype, float32 or bfloat16.
      last_step: the step that the run resumes from.
    """
    self._names = leaf_names(abstract)
    self._dtype = dtype
    self._commits = None
    if jax.process_index() == 0:  # The files are shared; one process makes them.
      path.mkdir(parents=True, exist_ok=True)
      self._commits = JsonLines(path / 'commits.jsonl', last_step)
      self._create_missing(path, [leaf.shape for leaf in jax.tree.leaves(abstract)])
    self._barrier('created')
    committed = read_rows(path / 'commits.jsonl')
    self._next_row = len(committed)
    self._parent = committed[-1].get('hash', '') if committed else ''
    opening = [ts.open({**_spec(path, name), 'store_data_equal_to_fill_value': True}, open=True)
               for name in self._names]
    self._arrays = [future.result() for future in opening]
    self._pending: tuple[int, dict[str, str], list] | None = None

  def _create_missing(self, path: pathlib.Path, shapes: list[tuple[int, ...]]) -> None:
    for name, shape in zip(self._names, shapes, strict=True):
      if not (path / name / 'zarr.json').exists():
        # Names without folders: a folder per row and axis would be three times as many files.
        flat = {'chunk_key_encoding': {'name': 'default', 'configuration': {'separator': '.'}}}
        ts.open({**_spec(path, name), 'metadata': flat}, create=True, dtype=jnp.dtype(self._dtype).name,
                shape=(_FIRST_ROWS, *shape), chunk_layout=ts.ChunkLayout(
                    chunk_shape=(1, *(max(1, size) for size in shape)))).result()

  def _barrier(self, what: str) -> None:
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'snapshot {what}')

  def write(self, step: int, stored: Any, tensors: dict[str, str]) -> None:
    """Starts writing a snapshot.

    Args:
      step: steps done.
      stored: the tree of arrays, already cast.
      tensors: their hashes by leaf.
    """
    self.wait()
    row = self._next_row
    growing = [array.resize(exclusive_max=(2 * row, *array.shape[1:]))
               if row >= array.shape[0] else None for array in self._arrays]
    # A kill may have left some of them grown.
    self._arrays = [array if grown is None else grown.result()
                    for array, grown in zip(self._arrays, growing, strict=True)]
    writes = []
    for array, leaf in zip(self._arrays, jax.tree.leaves(stored), strict=True):
      for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
          target = array[row][shard.index] if shard.index else array[row]
          writes.append(target.write(np.array(shard.data)))
    self._pending = (step, tensors, writes)

  def wait(self) -> None:
    """Waits for the snapshot under way and commits it; raises what writing raised."""
    if self._pending is None:
      return
    step, tensors, writes = self._pending
    self._pending = None
    for write in writes:
      write.result()
    self._barrier('written')
    if self._commits:
      line = commit_line(step, self._next_row, self._dtype, tensors, self._parent)
      self._commits.append(line)
      self._parent = line['hash']
    self._next_row += 1

  def sync(self) -> None:
    """Commits what is under way and brings all commits to the disk."""
    self.wait()
    if self._commits:
      self._commits.sync()

  def close(self) -> None:
    """Commits what is under way and closes."""
    self.wait()
    if self._commits:
      self._commits.close()
