"""A Hugging Face checkpoint as our parameters, read by boxes, and parameters as its tensors."""

import itertools
import pathlib
import re
from typing import Any, Callable, Iterator, Mapping, Optional

import jax
import numpy as np

from models import transformer
from models.config import ModelConfig
from models.interop.configs import family_of, hf_config, model_config
from models.interop.families import Family
from models.interop.files import CONFIG, WeightFiles, read_json
from models.interop.layout import Box, Row, sizes_of, source, tensor_of, tensor_shape

HEAD = 'embedding.output'


def leaf_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shape of every parameter by dotted name, in the order of the tree's leaves."""
  leaves = jax.tree.leaves_with_path(transformer.abstract_params(config))
  return {jax.tree_util.keystr(path, simple=True, separator='.'): leaf.shape
          for path, leaf in leaves}


def chosen_rows(
  family: Family, leaves: Mapping[str, Any], names: Optional[set[str]] = None
) -> dict[str, Row]:
  """Returns the row of each leaf: the first that `names` know, else the first of all."""
  rows: dict[str, list[Row]] = {}
  for row in family.rows:
    rows.setdefault(row.leaf, []).append(row)
  lacking = leaves.keys() - rows.keys()
  if lacking:
    raise ValueError(f'model_type={family.model_type!r} has no tensor for {min(lacking)}')

  def known(row: Row) -> bool:
    return names is not None and row.tensor.format(layer=0, expert=0) in names

  return {leaf: next(filter(known, rows[leaf]), rows[leaf][0]) for leaf in leaves}


def tensors_of(
  row: Row, config: ModelConfig
) -> Iterator[tuple[str, Optional[int], Optional[int]]]:
  """Yields name, layer and expert of every tensor of a row."""
  layers = range(config.n_layers) if row.stacked else [None]
  experts = range(config.moe.n_experts) if row.per_expert else [None]
  for layer, expert in itertools.product(layers, experts):
    yield row.tensor.format(layer=layer, expert=expert), layer, expert


class HfCheckpoint:
  """One folder of config.json and safetensors, checked whole on opening, read lazily.

  config: the model; family: its family; shapes: shape of each parameter by dotted name.
  """

  def __init__(self, folder: str | pathlib.Path):
    """Opens a folder; raises ValueError naming what is missing, surplus or misshapen."""
    self.folder = pathlib.Path(folder)
    if not self.folder.is_dir():
      raise ValueError(f'{self.folder} is not a folder')
    hf = read_json(self.folder / CONFIG)
    try:
      self.config, self.family = model_config(hf), family_of(hf)
    except ValueError as error:
      raise ValueError(f'{self.folder / CONFIG}: {error}') from error
    self.shapes = leaf_shapes(self.config)
    self.files = WeightFiles(self.folder)
    self.rows = chosen_rows(self.family, self.shapes, self.files.names)
    self._sizes = sizes_of(self.config)
    self._dtypes: dict[str, np.dtype] = {}
    self._check()

  def _check(self) -> None:
    """Raises ValueError unless the files hold exactly the model's tensors."""
    held = {leaf: [name for name, _, _ in tensors_of(row, self.config)]
            for leaf, row in self.rows.items()}
    wanted = {name: tensor_shape(self.rows[leaf], self._sizes)
              for leaf, tensors in held.items() for name in tensors}
    names = self.files.names
    if missing := sorted(wanted.keys() - names):
      raise ValueError(f'{self.folder} lacks tensor {missing[0]}'
                       + (f' and {len(missing) - 1} more' if len(missing) > 1 else ''))
    for name, shape in wanted.items():
      if self.files.shape(name) != shape:
        raise ValueError(f'{self.folder}: tensor {name} has shape {self.files.shape(name)}, '
                         f'{CONFIG} says {shape}')
    for leaf, tensors in held.items():
      self._dtypes[leaf] = np.result_type(*{self.files.dtype(name) for name in tensors})
    self._check_others(names - wanted.keys())

  def _check_others(self, names: set[str]) -> None:
    """Raises ValueError for a tensor that is no parameter and unknown, or not as it should be."""
    constants = dict(constants_of(self.family, self.config))
    heads = {row.tensor for row in self.family.rows if row.leaf == HEAD}
    for name in sorted(names):
      if name in constants:
        value = float(self.files.read(name).reshape(()))
        # float16 keeps 1e-6 to 3%
        if abs(value - constants[name]) > 0.05 * abs(constants[name]):
          raise ValueError(
            f'{self.folder}: tensor {name} is {value}; only {constants[name]} is supported')
      elif self.config.tie_embeddings and name in heads:
        self._check_tied(name)
      elif not any(re.fullmatch(pattern, name) for pattern in self.family.ignored):
        raise ValueError(f'{self.folder} has tensor {name}, which model_type='
                         f'{self.family.model_type!r} with this {CONFIG} does not know')

  def _check_tied(self, name: str, rows: int = 1024) -> None:
    """Raises ValueError unless a stored output embedding equals the input one it is tied to."""
    tokens = self.rows['embedding.tokens'].tensor
    same = self.files.shape(name) == self.files.shape(tokens)
    for start in range(0, self.config.vocab_size if same else 0, rows):
      index = slice(start, min(start + rows, self.config.vocab_size)), slice(None)
      head_VD, tokens_VD = self.files.read(name, index), self.files.read(tokens, index)
      same = same and np.array_equal(head_VD, tokens_VD)
    if not same:
      raise ValueError(f'{self.folder}: tie_word_embeddings is true but {name} differs from '
                       f'{tokens}')

  def dtype(self, leaf: str) -> np.dtype:
    """Returns the dtype in which a parameter is stored, the common one of all its tensors."""
    return self._dtypes[leaf]

  def file_of(self, leaf: str, box: Optional[Box] = None) -> pathlib.Path:
    """Returns the file that holds a box of a parameter, the first one where there are several."""
    row = self.rows[leaf]
    box = tuple((0, size) for size in self.shapes[leaf]) if box is None else box
    first = dict(zip('N' * row.stacked + row.axes, (start for start, _ in box), strict=True))
    return self.files.path_of(row.tensor.format(layer=first.get('N'), expert=first.get('X')))

  @property
  def dtypes(self) -> set[str]:
    """Returns the names of all dtypes of parameters."""
    return {dtype.name for dtype in self._dtypes.values()}

  def tensor_bytes(self) -> int:
    """Returns the size of the largest tensor of the files."""
    return max(int(np.prod(self.files.shape(name))) * self.files.dtype(name).itemsize
               for row in self.rows.values() for name, _, _ in tensors_of(row, self.config))

  def read(self, leaf: str, box: Optional[Box] = None) -> np.ndarray:
    """Returns a box of a parameter (all of it without one), in the file's dtype.

    Only the slices of the files that hold it are read. A box is a range per axis, that of the
    layers first.
    """
    row = self.rows[leaf]
    box = tuple((0, size) for size in self.shapes[leaf]) if box is None else box
    shape = [stop - start for start, stop in box]
    letters = 'N' * row.stacked + row.axes
    ranges = dict(zip(letters, box, strict=True))
    inner = tuple(ranges[letter] for letter in row.own_axes)
    index, finish = source(row, self._sizes, inner)
    outer = [letter for letter in letters if letter not in row.own_axes]
    positions = list(itertools.product(*(range(*ranges[letter]) for letter in outer)))
    out = np.empty(shape, self.dtype(leaf)) if len(positions) != 1 else None
    for position in positions:
      at = dict(zip(outer, position))
      name = row.tensor.format(layer=at.get('N'), expert=at.get('X'))
      values = finish(self.files.read(name, index))
      if out is None:  # one tensor holds it all, nothing is put together
        return values.reshape(shape).astype(self.dtype(leaf), copy=False)
      target = tuple(at[letter] - ranges[letter][0] if letter in outer else slice(None)
                     for letter in letters)
      out[target] = values
    return out


def constants_of(family: Family, config: ModelConfig) -> Iterator[tuple[str, float]]:
  """Yields name and value of every tensor of a family that is no parameter."""
  for name, value in family.constants.items():
    for layer in range(config.n_layers):
      yield name.format(layer=layer), value


def export_tensors(
  family: Family, config: ModelConfig, read: Callable[[str, tuple[int, ...]], np.ndarray],
  dtype: np.dtype,
) -> Iterator[tuple[str, np.ndarray]]:
  """Yields every tensor of a file in order of layers, one in memory at a time.

  Args:
    family: whose names and layouts.
    config: the model.
    read: (dotted leaf, indices of its leading axes: layer, expert) -> the values there.
    dtype: of the tensors.
  """
  sizes, shared = sizes_of(config), {}
  for row in chosen_rows(family, leaf_shapes(config)).values():
    shared.setdefault(row.tensor, []).append(row)
  jobs = [(layer, name, expert, rows) for rows in shared.values()
          for name, layer, expert in tensors_of(rows[0], config)]
  for layer, name, expert, rows in sorted(
      jobs, key=lambda job: (-1 if job[0] is None else job[0])):
    at = tuple(i for i in (layer, expert) if i is not None)
    yield name, tensor_of(rows, sizes, [np.asarray(read(row.leaf, at)).astype(dtype)
                                        for row in rows])
  for name, value in constants_of(family, config):
    yield name, np.asarray(value, np.float32).astype(dtype)


def exported(
  config: ModelConfig, read: Callable[[str, tuple[int, ...]], np.ndarray], dtype: np.dtype
) -> tuple[dict[str, Any], Iterator[tuple[str, np.ndarray]]]:
  """Returns config.json and the tensors of a model; arguments as of `export_tensors`.

  Raises ValueError when no family computes what the model computes.
  """
  family, hf = hf_config(config, np.dtype(dtype).name)
  return hf, export_tensors(family, config, read, dtype)
