"""What one public checkpoint and a series of them share on their way into a run directory."""

import dataclasses
import json
import pathlib
import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from models.config import ModelConfig
from models.interop.checkpoint import HfCheckpoint, leaf_shapes
from parallelism.mesh import make_mesh
from research import build as build_lib
from research import config as config_lib
from research import overrides as overrides_lib
from research.config import ExperimentConfig
from research.data.tokenizers import Tokenizer
from research.dynamics.public import TOKENIZER, open_tokenizer
from research.dynamics.public_trajectory import config_of
from research.errors import UserError
from research.monitors.items import MonitorItem
from research.monitors.suite import Suite
from research.monitors.watch import Watch, read_suite
from research.run_dir import RunDir, write_whole
from research.training import manifest as manifest_lib
from research.training.logs import duration


class Imported(NamedTuple):
  """A public model on a mesh, and what it is asked.

  `folder` has the tokenizer; `start_id` is the token before every text, None for none.
  """

  config: ExperimentConfig
  numerics: dict[str, Any]
  built: build_lib.Build
  folder: pathlib.Path
  tokenizer: Tokenizer
  start_id: int | None
  suite: Suite

  @property
  def items(self) -> list[MonitorItem]:
    """Those that are scored."""
    return self.suite.items

  def watch(self, run_dir: RunDir, kept: int) -> Watch:
    """Returns the monitors of the model; scores after step `kept` are removed."""
    return Watch(self.config, self.suite, self.tokenizer, self.start_id, self.built, run_dir, kept)


def imported_config(model: ModelConfig, name: str, step: int, stored: str,
                    overrides: Sequence[tuple[str, str]] = ()) -> ExperimentConfig:
  """Returns the config of an imported run.

  Args:
    model: of the checkpoint.
    name: of the run.
    step: of the (last) checkpoint.
    stored: dtype of snapshots.
    overrides: (path, text) of settings; of the model only those that keep its shapes.

  Raises:
    UserError: an override changes the shape of a parameter, or settings contradict each other.
  """
  config = config_of(model, name, step)
  config = dataclasses.replace(config, checkpoints=dataclasses.replace(
      config.checkpoints, snapshot_dtype=stored))
  try:
    config = overrides_lib.apply(config, overrides)
  except UserError:
    raise
  except ValueError as error:
    raise UserError(str(error)) from error
  ours, theirs = leaf_shapes(config.model), leaf_shapes(model)
  for leaf in sorted(ours.keys() | theirs.keys()):
    if ours.get(leaf) != theirs.get(leaf):
      raise UserError(f'--config.model: parameter {leaf} is {theirs.get(leaf)} in {name} and '
                      f'{ours.get(leaf)} with these settings')
  return config


def prepared(config: ExperimentConfig, model: ModelConfig, folder: pathlib.Path) -> Imported:
  """Returns a model ready to take parameters, with its tokenizer, from a folder, and its items.

  Raises:
    UserError: tokenizer, monitor items, mesh or model cannot be used; no weights are read before.
  """
  tokenizer = open_tokenizer(folder, model)
  start_id = _start_id(tokenizer)
  suite = read_suite(config, tokenizer, start_id)
  try:
    mesh = make_mesh(config.mesh)
    numerics = build_lib.resolve_numerics(config, mesh)
    built = build_lib.build(config, mesh, numerics)
  except ValueError as error:
    raise UserError(str(error)) from error
  return Imported(config, numerics, built, folder, tokenizer, start_id, suite)


def _start_id(tokenizer: Tokenizer) -> int | None:
  """Returns the token that the tokenizer itself puts before a text, None where it puts none."""
  ids = tokenizer.backend.encode('', add_special_tokens=True).ids
  return ids[0] if ids and ids[0] == tokenizer.bos_id else None


def describe(run_dir: RunDir, imported: Imported, step: int, origin: dict[str, Any]) -> None:
  """Writes what describes the run, its tokenizer too.

  Args:
    run_dir: where.
    imported: the model.
    step: from which this start goes on.
    origin: what else the manifest holds: where the parameters are from.
  """
  config, earlier = imported.config, manifest_lib.read(run_dir) or {'starts': []}
  manifest_lib.write(run_dir, {
      'experiment': config.name, 'numerics': imported.numerics,
      'mesh': dict(imported.built.mesh.shape), 'parent': None,
      'starts': [*earlier['starts'], manifest_lib.start_facts(step, {})],
      'start_id': imported.start_id, 'data': {},
      'hashes': {'data': '', 'tokenizer': imported.tokenizer.hash}, **origin})
  write_whole(run_dir.config_json, config_lib.as_json(config))
  write_whole(run_dir.config_txt, config_lib.as_text(config))
  imported.tokenizer.save(run_dir.tokenizer_json)
  beside = imported.folder / TOKENIZER[1]
  if beside.is_file():  # it names the special tokens
    shutil.copyfile(beside, run_dir.tokenizer_json.with_name(TOKENIZER[1]))


def check_settings(run_dir: RunDir, config: ExperimentConfig) -> None:
  """Raises UserError where a directory was made with another setting of what its content is."""
  saved = json.loads(run_dir.config_json.read_text(encoding='utf-8'))
  for setting, old in config_lib.differences(saved, config):
    if setting.kind == 'identity' and setting.path != 'n_steps':
      raise UserError(f'{run_dir.path} was made with {setting.path}={old!r}, now it is '
                      f'{setting.value!r}; choose another --run_dir or set it back')


class Progress:
  """Says every few seconds how much of a checkpoint was read and how long the rest takes."""

  SECONDS = 5.0

  def __init__(self, checkpoint: HfCheckpoint, say: Callable[[str], None]):
    self._sizes = {leaf: int(np.prod(shape)) for leaf, shape in checkpoint.shapes.items()}
    self._all, self._say = sum(self._sizes.values()), say
    self._read, self._began, self._said = 0, time.perf_counter(), 0.0

  def __call__(self, leaf: str) -> None:
    self._read += self._sizes[leaf]
    took = time.perf_counter() - self._began
    if took - self._said > self.SECONDS:
      self._said = took
      left = took * (self._all - self._read) / self._read
      self._say(f'read {self._read:,} of {self._all:,} parameters, {duration(left)} left')
