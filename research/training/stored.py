"""A full checkpoint as it lies on disk, read without a mesh: its record, its files, its tensors."""

from collections.abc import Callable, Iterator
import hashlib
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from research.errors import UserError
from research.run_dir import write_whole
from research.training import hashes

INVENTORY = 'files.json'
RECORD = '_CHECKPOINT_METADATA'
HASHED_BYTES = 2**24  # Longer files are in the inventory by length; tensors have their own hashes.
_ITEMS = ('params', 'optimizer', 'ema', 'position', 'guard')


class DamagedError(UserError):
  """What is on disk is not what was written."""


class Damage(NamedTuple):
  """One thing that is wrong: where (tensor '' where it is not about one) and what."""

  file: pathlib.Path
  tensor: str
  problem: str

  def __str__(self) -> str:
    return f'{self.file}: {self.tensor and self.tensor + " "}{self.problem}'


def read_record(path: pathlib.Path) -> dict[str, Any]:
  """Returns what the checkpoint in a directory says about itself; {} if it has no hashes.

  Raises:
    DamagedError: the record cannot be read or is not what its own hash says.
  """
  try:
    record = json.loads((path / RECORD).read_text(encoding='utf-8'))['custom_metadata']
  except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
    # Other OSErrors say nothing of the file.
    raise DamagedError(f'its record cannot be read ({error})') from error
  if not isinstance(record, dict) or 'tensors' not in record:
    return {}
  if record.get('hash') != hashes.record_hash(record):
    raise DamagedError('its record does not have its own hash')
  return record


def _content(path: pathlib.Path) -> list[Any]:
  """Returns length and hash of a file, '' for one too long to be hashed as a file."""
  size = path.stat().st_size
  if size > HASHED_BYTES:
    return [size, '']
  return [size, hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()]


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns all files but the list itself, by name; raises OSError for a folder that hides them."""
  def unlisted(error: OSError):  # pathlib takes a folder that cannot be listed for an empty one.
    if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
      raise error
  files = [pathlib.Path(folder) / name for folder, _, names in os.walk(path, onerror=unlisted)
           for name in names]
  found = {str(file.relative_to(path)): file for file in sorted(files) if file.is_file()}
  for name in (INVENTORY, f'{INVENTORY}.tmp'):
    found.pop(name, None)
  return found


def _check_readable(path: pathlib.Path) -> None:
  """Raises OSError where a file cannot be opened, which says nothing of what is in it."""
  for file in _files(path).values():
    file.open('rb').close()


def write_inventory(path: pathlib.Path) -> None:
  """Lists the files of a whole checkpoint with their lengths and hashes in `files.json`."""
  files = {name: _content(file) for name, file in _files(path).items()}
  write_whole(path / INVENTORY, json.dumps(files, indent=1) + '\n')


def inventory_damage(path: pathlib.Path) -> Iterator[Damage]:
  """Yields files that are missing, too many or not as they were listed; none without a list."""
  if not (path / INVENTORY).exists():
    return
  try:
    text = (path / INVENTORY).read_text(encoding='utf-8')
    listed = {name: (size, content) for name, (size, content) in json.loads(text).items()}
  except (ValueError, TypeError, AttributeError) as error:
    yield Damage(path / INVENTORY, '', f'cannot be read ({error})')
    return
  found = _files(path)
  for name, (size, content) in listed.items():
    if name not in found:
      yield Damage(path / name, '', 'is missing')
    elif (now := _content(found[name])) != [size, content]:
      changed = f'{now[0]} bytes, was {size}' if now[0] != size else 'its bytes have changed'
      yield Damage(path / name, '', changed)
  for name in sorted(found.keys() - listed.keys()):
    yield Damage(path / name, '', 'is not a file of this checkpoint')


class StoredCheckpoint:
  """Lazy access to the tensors of one checkpoint, named as in its record: `params.<leaf>`."""

  def __init__(self, path: pathlib.Path):
    self.path = path

  def names(self) -> list[str]:
    """Returns the names of all tensors on disk."""
    names = []
    for item in _ITEMS:
      if (self.path / item).is_dir():
        keys = ts.KvStore.open(_item(self.path, item)).result().list().result()
        ends = [key.decode().removesuffix('/zarr.json') for key in keys
                if key.endswith(b'/zarr.json')]
        names += [f'{item}.{name}' for name in sorted(ends)]
    return names

  def leaf(self, name: str) -> ts.TensorStore:
    """Returns one tensor as a lazy TensorStore view."""
    item, _, leaf = name.partition('.')
    store = {**_item(self.path, item), 'path': f'{leaf}/'}
    return ts.open({'driver': 'zarr3', 'kvstore': store}).result()

  def read(self, name: str, hashed: str) -> np.ndarray:
    """Returns one tensor; `hashed` is what its hash must be, '' where it is not known.

    Raises:
      DamagedError: it cannot be read or has another hash.
      OSError: a file cannot be opened.
    """
    try:
      x = self.leaf(name).read().result()
    except ValueError as error:  # Of TensorStore, missing files and those it may not open included.
      _check_readable(self.path / name.partition('.')[0])
      raise DamagedError(f'cannot be read ({first_line(error)})') from error
    if hashed and hashes.digest(x) != hashed:
      raise DamagedError('does not have the content that was saved')
    return x


def first_line(error: Exception) -> str:
  """Returns the first line of an error, without where in the library it arose."""
  return str(error).splitlines()[0].split(' [')[0]


def _item(path: pathlib.Path, item: str) -> dict[str, Any]:
  return {'driver': 'ocdbt', 'base': {'driver': 'file', 'path': f'{path / item}/'}}


Look = Callable[[str, np.ndarray], None]


def damage(path: pathlib.Path, step: int, look: Look | None = None) -> Iterator[Damage]:
  """Yields what is wrong with a checkpoint: its record, its files, every tensor against its hash.

  Args:
    path: the checkpoint's directory.
    step: the number that it stands under.
    look: called with name and content of each tensor that is sound.

  Raises:
    UserError: a file cannot be opened or read, or a folder not be listed: that is no damage.
  """
  try:
    yield from _damage(path, step, look)
  except OSError as error:
    raise UserError(f'checkpoint {path} cannot be read ({error}), so whether it is sound is not '
                    'known; make it readable and repeat the command') from error


def _damage(path: pathlib.Path, step: int, look: Look | None) -> Iterator[Damage]:
  """Yields what `damage` does; raises OSError for a failed read."""
  yield from inventory_damage(path)
  try:
    record = read_record(path)
  except DamagedError as error:
    yield Damage(path / RECORD, '', str(error))
    return
  if record and record['step'] != step:
    yield Damage(path, '', f'says that it is of step {record["step"]}')
  stored = StoredCheckpoint(path)
  try:
    names = stored.names()
  except ValueError as error:
    _check_readable(path)
    yield Damage(path, '', f'cannot be listed ({first_line(error)})')
    return
  hashed = record.get('tensors', dict.fromkeys(names, ''))
  for name in sorted(hashed.keys() | set(names)):
    where = path / name.partition('.')[0]
    if name not in hashed:
      yield Damage(where, name, 'is not in the record')
    elif name not in names:
      yield Damage(where, name, 'is missing')
    else:
      try:
        x = stored.read(name, hashed[name])
      except DamagedError as error:
        yield Damage(where, name, str(error))
        continue
      if look:
        look(name, x)
