"""Tensors of a folder of safetensors: one file or shards, read by slices, written in shards."""

import json
import pathlib
from typing import Any, Iterable, Optional

import ml_dtypes  # before safetensors reads: NumPy then knows bfloat16
import numpy as np
import safetensors
from safetensors.numpy import save_file

INDEX, SINGLE, CONFIG = 'model.safetensors.index.json', 'model.safetensors', 'config.json'
DTYPES = {'F32': np.dtype(np.float32), 'BF16': np.dtype(ml_dtypes.bfloat16),
          'F16': np.dtype(np.float16)}
SHARD_BYTES = 1 << 30


class WeightFileError(ValueError):
  """A file of weights is missing or damaged; `path` is that file."""

  def __init__(self, message: str, path: pathlib.Path):
    super().__init__(message)
    self.path = path


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Returns a JSON object of a file; raises ValueError when it is missing or none."""
  if not path.is_file():
    raise ValueError(f'{path.parent} has no {path.name}')
  try:
    value = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise ValueError(f'{path} is not valid JSON: {error}') from error
  if not isinstance(value, dict):
    raise ValueError(f'{path} is not a JSON object')
  return value


def _shards(folder: pathlib.Path) -> list[pathlib.Path]:
  """Returns the files that hold the weights; raises ValueError when one is not there."""
  if (folder / SINGLE).is_file():  # transformers takes it where there is an index too
    shards = [folder / SINGLE]
  elif (folder / INDEX).is_file():
    index = read_json(folder / INDEX).get('weight_map')
    if not isinstance(index, dict) or not index:
      raise ValueError(f'{folder / INDEX} has no weight_map')
    shards = [folder / name for name in sorted(set(index.values()))]
  else:
    shards = sorted(folder.glob('*.safetensors'))
    pickled = sorted(path.name for path in folder.glob('*.bin'))
    if not shards:
      there = f'only {pickled[0]}, which may run code when read; convert it to safetensors' if (
        pickled) else f'no weights; {SINGLE} or {INDEX} is needed'
      raise ValueError(f'{folder} has {there}')
  for path in shards:
    if not path.is_file():
      raise WeightFileError(f'{folder} lacks {path.name}, a shard that {INDEX} names', path)
  return shards


class WeightFiles:
  """The tensors of a folder by name; nothing is read before it is asked for."""

  def __init__(self, folder: pathlib.Path):
    """Opens the files; raises ValueError naming the file that is missing or damaged."""
    self.folder = folder
    self._file_of: dict[str, Any] = {}
    self._slices: dict[str, Any] = {}
    self._paths: dict[str, pathlib.Path] = {}
    for path in _shards(folder):
      try:
        file = safetensors.safe_open(path, framework='np')
      except (safetensors.SafetensorError, OSError) as error:
        raise WeightFileError(f'{path} is not a whole safetensors file: {error}', path) from error
      for name in file.keys():
        if name in self._file_of:
          raise ValueError(f'{folder}: tensor {name} is in two files, one of them {path.name}')
        self._file_of[name], self._paths[name] = file, path
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
      absent = read_json(folder / INDEX)['weight_map'].keys() - self._file_of.keys()
      if absent:
        raise ValueError(
          f'{folder}: tensor {min(absent)} is in {INDEX} but in none of its shards')

  @property
  def names(self) -> set[str]:
    """Returns the names of all tensors."""
    return set(self._file_of)

  def path_of(self, name: str) -> pathlib.Path:
    """Returns the file that holds a tensor."""
    return self._paths[name]

  def _slice(self, name: str) -> Any:
    """Returns the lazy tensor."""
    if name not in self._slices:
      self._slices[name] = self._file_of[name].get_slice(name)
    return self._slices[name]

  def shape(self, name: str) -> tuple[int, ...]:
    """Returns the shape of a tensor."""
    return tuple(self._slice(name).get_shape())

  def dtype(self, name: str) -> np.dtype:
    """Returns the dtype of a tensor; raises ValueError unless it is one of `DTYPES`."""
    kind = self._slice(name).get_dtype()
    if kind not in DTYPES:
      raise ValueError(
        f'{self.folder}: tensor {name} has dtype {kind}; {", ".join(DTYPES)} are supported'
      )
    return DTYPES[kind]

  def read(self, name: str, index: Optional[tuple[slice, ...]] = None) -> np.ndarray:
    """Returns a part of a tensor, the whole of it without an index."""
    if not self.shape(name):
      return self._file_of[name].get_tensor(name)
    whole = tuple(slice(None) for _ in self.shape(name))
    return self._slice(name)[whole if index is None else index]


class _Shards:
  """Collects tensors into files of limited size."""

  def __init__(self, folder: pathlib.Path, limit: int):
    self._folder, self._limit = folder, limit
    self._tensors: dict[str, np.ndarray] = {}
    self.written: list[tuple[pathlib.Path, list[str]]] = []
    self.n_bytes = 0

  def add(self, name: str, values: np.ndarray) -> None:
    """Takes a tensor; writes what was collected when it no longer fits."""
    held = sum(tensor.nbytes for tensor in self._tensors.values())
    if self._tensors and held + values.nbytes > self._limit:
      self.flush()
    self._tensors[name] = values
    self.n_bytes += values.nbytes

  def flush(self) -> None:
    """Writes what was collected."""
    path = self._folder / f'part-{len(self.written):05d}.safetensors'
    save_file(self._tensors, path, metadata={'format': 'pt'})
    self.written.append((path, list(self._tensors)))
    self._tensors = {}


def write_folder(
  folder: pathlib.Path, config: dict[str, Any], tensors: Iterable[tuple[str, np.ndarray]],
  shard_bytes: int = SHARD_BYTES,
) -> None:
  """Writes config.json and the tensors, in one file or in shards of at most `shard_bytes`.

  Only one shard is in memory at a time. Raises ValueError when the folder has content already.
  """
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(f'{folder} is not empty; give a folder that is, or a new one')
  folder.mkdir(parents=True, exist_ok=True)
  shards = _Shards(folder, shard_bytes)
  for name, values in tensors:
    shards.add(name, values)
  shards.flush()
  n, weight_map = len(shards.written), {}
  for i, (path, names) in enumerate(shards.written, start=1):
    final = SINGLE if n == 1 else f'model-{i:05d}-of-{n:05d}.safetensors'
    path.rename(folder / final)
    weight_map |= dict.fromkeys(names, final)
  if n > 1:
    index = {'metadata': {'total_size': shards.n_bytes}, 'weight_map': weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + '\n', encoding='utf-8')
  # config.json comes last: a folder with one is whole.
  (folder / CONFIG).write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
