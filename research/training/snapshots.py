"""Dense parameter snapshots: one TensorStore array per leaf with a leading row axis.

A snapshot is there once its line stands in `commits.jsonl`, which is written after all arrays.
Rows are reused when a resumed run passes the same steps again.
"""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils

from parallelism.sharding import path_name
from research.training.logs import JsonLines, read_rows

_FIRST_ROWS = 8  # Arrays grow by doubling.


def leaf_names(params: Any) -> list[str]:
  """Returns the dotted names of a parameter tree's leaves, in leaf order."""
  return [path_name(path) for path, _ in jax.tree.leaves_with_path(params)]


def cast(params: Any, dtype: str) -> Any:
  """Returns the values that a snapshot of this dtype stores, as arrays of that dtype."""
  return jax.tree.map(lambda x: x.astype(dtype), params)


class SnapshotReader:
  """Read access to the committed snapshots of one run, leaf by leaf, lazily."""

  def __init__(self, path: pathlib.Path):
    self._path = path
    self._rows = {row['step']: row for row in read_rows(path / 'commits.jsonl')}
    self._arrays: dict[str, ts.TensorStore] = {}

  @property
  def steps(self) -> list[int]:
    """Steps with a committed snapshot, ascending."""
    return sorted(self._rows)

  def leaf(self, step: int, name: str) -> ts.TensorStore:
    """Returns one leaf of one snapshot as a lazy TensorStore view."""
    if step not in self._rows:
      raise KeyError(f'{self._path} has no snapshot of step {step}; it has {self.steps}')
    if name not in self._arrays:
      self._arrays[name] = ts.open(_spec(self._path, name)).result()
    return self._arrays[name][self._rows[step]['row']]

  def params(self, step: int, abstract: Any) -> Any:
    """Returns the snapshot as a tree of NumPy arrays shaped like `abstract`."""
    reads = [self.leaf(step, name).read() for name in leaf_names(abstract)]
    return jax.tree.unflatten(jax.tree.structure(abstract), [read.result() for read in reads])


def _spec(path: pathlib.Path, name: str) -> dict[str, Any]:
  return {'driver': 'zarr3', 'kvstore': {'driver': 'file', 'path': f'{path / name}/'}}


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
    self._next_row = len(read_rows(path / 'commits.jsonl'))
    opening = [ts.open(_spec(path, name), open=True) for name in self._names]
    self._arrays = [future.result() for future in opening]
    self._pending: tuple[int, list] | None = None

  def _create_missing(self, path: pathlib.Path, shapes: list[tuple[int, ...]]) -> None:
    for name, shape in zip(self._names, shapes, strict=True):
      if not (path / name / 'zarr.json').exists():
        ts.open(_spec(path, name), create=True, dtype=jnp.dtype(self._dtype).name,
                shape=(_FIRST_ROWS, *shape), chunk_layout=ts.ChunkLayout(
                    chunk_shape=(1, *(max(1, size) for size in shape)))).result()

  def _barrier(self, what: str) -> None:
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'snapshot {what}')

  def write(self, step: int, stored: Any) -> None:
    """Starts writing the tree of arrays `stored` (already cast) as the snapshot of `step`."""
    self.wait()
    row = self._next_row
    self._arrays = [
        array if row < array.shape[0] else
        array.resize(exclusive_max=(2 * row, *array.shape[1:])).result() for array in self._arrays]
    writes = []
    for array, leaf in zip(self._arrays, jax.tree.leaves(stored), strict=True):
      for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
          target = array[row][shard.index] if shard.index else array[row]
          writes.append(target.write(np.array(shard.data)))
    self._pending = (step, writes)

  def wait(self) -> None:
    """Waits for the snapshot under way and commits it; raises what writing raised."""
    if self._pending is None:
      return
    step, writes = self._pending
    self._pending = None
    for write in writes:
      write.result()
    self._barrier('written')
    if self._commits:
      self._commits.append({'step': step, 'row': self._next_row, 'dtype': self._dtype})
    self._next_row += 1

  def close(self) -> None:
    """Commits what is under way and closes."""
    self.wait()
    if self._commits:
      self._commits.close()
