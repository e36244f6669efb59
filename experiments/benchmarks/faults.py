"""Faults planted in copies of runs and in series: what an audit must find.

Files are damaged as a disk, a copy or a person damages them; `rehash` then makes every hash, list
and chain agree with the damage, as if it had been there when the files were written.
"""

from collections.abc import Callable
import json
import pathlib
import shutil
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from research.dynamics.series import RowSeries, checkpoint_steps
from research.run_dir import RunDir
from research.training import hashes, stored
from research.training.logs import read_rows
from research.training.snapshots import SnapshotReader, commit_line


class Planted(NamedTuple):
  """A fault: the step and the file or folder in which it lies."""

  step: int
  file: pathlib.Path


def _pick(rng: np.random.Generator, values: list) -> Any:
  return values[int(rng.integers(len(values)))]


def _some_snapshot(run_dir: RunDir, rng) -> tuple[SnapshotReader, int, str, pathlib.Path]:
  reader = SnapshotReader(run_dir.snapshots)
  step, name = _pick(rng, reader.steps[2:-2]), _pick(rng, reader.names())
  return reader, step, name, reader.file_of(step, name)


def _some_file(run_dir: RunDir, rng) -> tuple[int, pathlib.Path]:
  """Returns a file with content of some full checkpoint."""
  step = _pick(rng, checkpoint_steps(run_dir.checkpoints))
  # The list of files itself may be missing: a kill between a save and its list leaves it so.
  files = [path for path in sorted((run_dir.checkpoints / str(step)).rglob('*'))
           if path.is_file() and path.stat().st_size > 1 and path.name != stored.INVENTORY]
  return step, _pick(rng, files)


def _flip(path: pathlib.Path, rng) -> None:
  data = bytearray(path.read_bytes())
  data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
  path.write_bytes(bytes(data))


def _truncate(path: pathlib.Path, rng) -> None:
  data = path.read_bytes()
  path.write_bytes(data[:int(rng.integers(len(data)))])


def _drop(path: pathlib.Path, rng) -> None:
  del rng
  path.unlink()


def to_snapshot(damage: Callable) -> Callable:
  """Returns f(run_dir, rng) -> Planted that damages a file of a snapshot."""
  def plant(run_dir: RunDir, rng) -> Planted:
    _, step, _, path = _some_snapshot(run_dir, rng)
    damage(path, rng)
    return Planted(step, path)
  return plant


def to_checkpoint(damage: Callable) -> Callable:
  """Returns f(run_dir, rng) -> Planted that damages a file of a full checkpoint."""
  def plant(run_dir: RunDir, rng) -> Planted:
    step, path = _some_file(run_dir, rng)
    damage(path, rng)
    return Planted(step, path)
  return plant


def swap_in_snapshot(run_dir: RunDir, rng) -> Planted:
  """Exchanges the files of two tensors of one shape."""
  reader, step, _, _ = _some_snapshot(run_dir, rng)
  a, b = same_shapes({name: reader.array(name).shape for name in reader.names()}, rng)
  first, second = reader.file_of(step, a), reader.file_of(step, b)
  data = first.read_bytes()
  first.write_bytes(second.read_bytes())
  second.write_bytes(data)
  return Planted(step, first)


def swap_in_checkpoint(run_dir: RunDir, rng) -> Planted:
  """Exchanges two tensors of one shape."""
  step = _pick(rng, checkpoint_steps(run_dir.checkpoints))
  path = run_dir.checkpoints / str(step)
  checkpoint = stored.StoredCheckpoint(path)
  names = [name for name in checkpoint.names() if name.startswith('params.')]
  a, b = same_shapes({name: tuple(checkpoint.leaf(name).shape) for name in names}, rng)
  x, y = checkpoint.read(a, ''), checkpoint.read(b, '')
  checkpoint.leaf(a).write(y).result()
  checkpoint.leaf(b).write(x).result()
  return Planted(step, path / 'params')


def duplicate_snapshot(run_dir: RunDir, rng) -> Planted:
  """Puts the files of one step in the place of another's."""
  reader, step, name, _ = _some_snapshot(run_dir, rng)
  source = _pick(rng, [other for other in reader.steps if other != step])
  for name in reader.names():
    shutil.copy(reader.file_of(source, name), reader.file_of(step, name))
  return Planted(step, run_dir.snapshots)


def duplicate_checkpoint(run_dir: RunDir, rng) -> Planted:
  """Copies a checkpoint under another number."""
  steps = checkpoint_steps(run_dir.checkpoints)
  source, step = _pick(rng, steps), steps[-1] + int(rng.integers(1, 100))
  shutil.copytree(run_dir.checkpoints / str(source), run_dir.checkpoints / str(step))
  return Planted(step, run_dir.checkpoints / str(step))


def splice_snapshot(run_dir: RunDir, rng) -> Planted:
  """Puts the files of half the tensors of another step in their place."""
  reader, step, _, _ = _some_snapshot(run_dir, rng)
  source = _pick(rng, [other for other in reader.steps if other != step])
  for name in reader.names()[::2]:
    shutil.copy(reader.file_of(source, name), reader.file_of(step, name))
  return Planted(step, run_dir.snapshots)


def splice_checkpoint(run_dir: RunDir, rng) -> Planted:
  """Gives a checkpoint the parameters of another."""
  steps = checkpoint_steps(run_dir.checkpoints)
  step = _pick(rng, steps)
  source = _pick(rng, [other for other in steps if other != step])
  target = run_dir.checkpoints / str(step) / 'params'
  shutil.rmtree(target)
  shutil.copytree(run_dir.checkpoints / str(source) / 'params', target)
  return Planted(step, target)


def stale_dtype_snapshot(run_dir: RunDir, rng) -> Planted:
  """Leaves bfloat16 bytes where float32 belongs: a file of half the length."""
  reader, step, name, path = _some_snapshot(run_dir, rng)
  path.write_bytes(reader.leaf(step, name).read().result().astype(ml_dtypes.bfloat16).tobytes())
  return Planted(step, path)


def rounded_snapshot(run_dir: RunDir, rng) -> Planted:
  """Leaves float32 values that went through bfloat16."""
  reader, step, name, path = _some_snapshot(run_dir, rng)
  x = reader.leaf(step, name).read().result()
  path.write_bytes(x.astype(ml_dtypes.bfloat16).astype(np.float32).tobytes())
  return Planted(step, path)


def partial_checkpoint(run_dir: RunDir, rng) -> Planted:
  """Copies some of a checkpoint's items under a new number."""
  steps = checkpoint_steps(run_dir.checkpoints)
  source, step = _pick(rng, steps), steps[-1] + int(rng.integers(1, 100))
  target = run_dir.checkpoints / str(step)
  shutil.copytree(run_dir.checkpoints / str(source), target)
  shutil.rmtree(target / _pick(rng, ['params', 'optimizer', 'position']))
  return Planted(step, target)


def drop_checkpoint(run_dir: RunDir, rng) -> Planted:
  """Removes a whole checkpoint from the middle."""
  step = _pick(rng, checkpoint_steps(run_dir.checkpoints)[1:-1])
  shutil.rmtree(run_dir.checkpoints / str(step))
  return Planted(step, run_dir.checkpoints / str(step))


def nonfinite_optimizer(run_dir: RunDir, rng) -> Planted:
  """Makes one element of a moment of the optimizer not a number."""
  step = _pick(rng, checkpoint_steps(run_dir.checkpoints))
  path = run_dir.checkpoints / str(step)
  checkpoint = stored.StoredCheckpoint(path)
  sizes = {name: checkpoint.read(name, '') for name in checkpoint.names()
           if name.startswith('optimizer.')}
  name = _pick(rng, [name for name, x in sizes.items() if x.dtype == np.float32 and x.ndim])
  sizes[name].reshape(-1)[int(rng.integers(sizes[name].size))] = np.nan
  checkpoint.leaf(name).write(sizes[name]).result()
  return Planted(step, path / 'optimizer')


FILE_FAULTS: dict[str, Callable[[RunDir, np.random.Generator], Planted]] = {
    'truncate, snapshot': to_snapshot(_truncate),
    'truncate, checkpoint': to_checkpoint(_truncate),
    'flip one bit, snapshot': to_snapshot(_flip),
    'flip one bit, checkpoint': to_checkpoint(_flip),
    'swap two tensors, snapshot': swap_in_snapshot,
    'swap two tensors, checkpoint': swap_in_checkpoint,
    'duplicate a step, snapshot': duplicate_snapshot,
    'duplicate a step, checkpoint': duplicate_checkpoint,
    'splice two checkpoints, snapshot': splice_snapshot,
    'splice two checkpoints, checkpoint': splice_checkpoint,
    'stale dtype, snapshot': stale_dtype_snapshot,
    'values through bfloat16, snapshot': rounded_snapshot,
    'drop a file, snapshot': to_snapshot(_drop),
    'drop a file, checkpoint': to_checkpoint(_drop),
    'partial directory, checkpoint': partial_checkpoint,
    'drop a whole checkpoint': drop_checkpoint,
    'not a number in the optimizer, checkpoint': nonfinite_optimizer,
}


def same_shapes(shapes: dict[str, tuple], rng) -> tuple[str, str]:
  """Returns two names of tensors that have one shape."""
  pairs = [(a, b) for a in shapes for b in shapes if a < b and shapes[a] == shapes[b]]
  return _pick(rng, pairs)


def rehash(run_dir: RunDir) -> None:
  """Makes all hashes, lists and chains of a run agree with what now lies on the disk."""
  reader, parent, lines = SnapshotReader(run_dir.snapshots), '', []
  for line in read_rows(run_dir.snapshots / 'commits.jsonl'):
    found = {name: hashes.digest(reader.leaf(line['step'], name).read().result())
             for name in reader.names()}
    lines.append(commit_line(line['step'], line['row'], line['dtype'], found, parent))
    parent = lines[-1]['hash']
  (run_dir.snapshots / 'commits.jsonl').write_text(
      ''.join(json.dumps(line) + '\n' for line in lines), encoding='utf-8')
  before = None
  for step in checkpoint_steps(run_dir.checkpoints):
    before = _rehash_checkpoint(run_dir.checkpoints / str(step), step, before)


def _rehash_checkpoint(path: pathlib.Path, step: int, parent: dict[str, Any] | None
                       ) -> dict[str, Any] | None:
  """Rewrites a checkpoint's record after its parent; returns what the next one names."""
  checkpoint = stored.StoredCheckpoint(path)
  kept = json.loads((path / stored.RECORD).read_text(encoding='utf-8'))
  found = {name: hashes.digest(checkpoint.read(name, '')) for name in checkpoint.names()}
  record = {**kept['custom_metadata'], 'step': step, 'tensors': found, 'parent': parent,
            'window': {'from': parent['step'] if parent else 0, 'to': step, 'hash': '0' * 32}}
  record['hash'] = hashes.record_hash(record)
  (path / stored.RECORD).write_text(json.dumps({**kept, 'custom_metadata': record}))
  (path / stored.INVENTORY).unlink(missing_ok=True)
  stored.write_inventory(path)
  return {'run_dir': '', 'step': step, 'hash': record['hash']}


# Content faults of a series without hashes: f(rows by name, i, rng, donor) changes checkpoint i.
Rows = dict[str, np.ndarray]


def flip_bits(low: int, high: int) -> Callable:
  """Returns a fault that flips one of the bits [low, high) of one element of float32."""
  def plant(rows: Rows, i: int, rng, donor: Rows) -> None:
    del donor
    name = _pick(rng, sorted(rows))
    bits = rows[name][i].reshape(-1).view(np.uint32)
    bits[int(rng.integers(bits.size))] ^= np.uint32(1 << int(rng.integers(low, high)))
  return plant


def swap(rows: Rows, i: int, rng, donor: Rows) -> None:
  """Exchanges two tensors of one shape."""
  del donor
  a, b = same_shapes({name: x.shape for name, x in rows.items()}, rng)
  rows[a][i], rows[b][i] = rows[b][i].copy(), rows[a][i].copy()


def duplicate(rows: Rows, i: int, rng, donor: Rows) -> None:
  """Puts another checkpoint of the series in the place of checkpoint i."""
  del donor
  n = len(next(iter(rows.values())))
  other = _pick(rng, [j for j in range(n) if j != i])
  for x in rows.values():
    x[i] = x[other]


def splice(rows: Rows, i: int, rng, donor: Rows) -> None:
  """Takes half of the tensors from another checkpoint of the series."""
  del donor
  n = len(next(iter(rows.values())))
  other = _pick(rng, [j for j in range(n) if j != i])
  for name in sorted(rows)[::2]:
    rows[name][i] = rows[name][other]


def splice_donor(rows: Rows, i: int, rng, donor: Rows) -> None:
  """Takes half of the tensors from a checkpoint that is not in the series."""
  del rng
  for name in sorted(rows)[::2]:
    rows[name][i] = donor[name]


def _layers(rows: Rows) -> list[str]:
  """Returns the tensors that are stacked over several layers."""
  return [name for name in sorted(rows) if name.startswith('blocks.') and rows[name].shape[1] > 1]


def swap_layers(rows: Rows, i: int, rng, donor: Rows) -> None:
  """Exchanges one tensor of two layers, as public series store each on its own."""
  del donor
  x = rows[_pick(rng, _layers(rows))][i]
  a, b = rng.choice(len(x), 2, replace=False)
  x[[a, b]] = x[[b, a]]


def splice_layers(rows: Rows, i: int, rng, donor: Rows) -> None:
  """Takes all tensors of one layer from another checkpoint of the series, as a shard holds them."""
  del donor
  names = _layers(rows)
  other = _pick(rng, [j for j in range(len(rows[names[0]])) if j != i])
  layer = int(rng.integers(rows[names[0]].shape[1]))
  for name in names:
    rows[name][i, layer] = rows[name][other, layer]


def splice_donor_layers(rows: Rows, i: int, rng, donor: Rows) -> None:
  """Takes all tensors of one layer from a checkpoint that is not in the series."""
  names = _layers(rows)
  layer = int(rng.integers(rows[names[0]].shape[1]))
  for name in names:
    rows[name][i, layer] = donor[name][layer]


def through_bfloat16(rows: Rows, i: int, rng, donor: Rows) -> None:
  """Sends all tensors of a checkpoint through bfloat16 and back."""
  del rng, donor
  for x in rows.values():
    x[i] = x[i].astype(ml_dtypes.bfloat16).astype(np.float32)


def nonfinite(rows: Rows, i: int, rng, donor: Rows) -> None:
  """Makes one element not a number."""
  del donor
  flat = rows[_pick(rng, sorted(rows))][i].reshape(-1)
  flat[int(rng.integers(flat.size))] = np.nan


def zeroed(rows: Rows, i: int, rng, donor: Rows) -> None:
  """Makes one tensor all zero, as a missing chunk reads that nothing guards."""
  del donor
  rows[_pick(rng, sorted(rows))][i] = 0


CONTENT_FAULTS: dict[str, Callable[[Rows, int, np.random.Generator, Rows], None]] = {
    'flip the sign': flip_bits(31, 32),
    'flip a bit of the exponent': flip_bits(23, 31),
    'flip one of the 7 high bits of the mantissa': flip_bits(16, 23),
    'flip one of the 16 low bits of the mantissa': flip_bits(0, 16),
    'swap two tensors': swap,
    'duplicate a step': duplicate,
    'splice, other half in the series': splice,
    'splice, other half not in the series': splice_donor,
    'swap one tensor of two layers': swap_layers,
    'splice one layer, other in the series': splice_layers,
    'splice one layer, other not in the series': splice_donor_layers,
    'values through bfloat16': through_bfloat16,
    'one element not a number': nonfinite,
    'one tensor zero': zeroed,
}


def in_memory(series, steps: list[int]) -> RowSeries:
  """Returns some checkpoints of a series as one in memory, whose arrays can be changed."""
  return RowSeries(steps, {name: np.stack([series.leaf(step, name) for step in steps])
                           for name in series.names})
