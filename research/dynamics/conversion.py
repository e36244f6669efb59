"""Public checkpoints as run directories, and runs as checkpoints that transformers loads."""

import json
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import ml_dtypes
import numpy as np

from models import transformer
from models.config import ModelConfig
from models.interop.checkpoint import HfCheckpoint, exported
from models.interop.files import CONFIG, write_folder
from research import config as config_lib
from research.config import ExperimentConfig
from research.data import tokenizers
from research.data.tokenizers import Tokenizer
from research.dynamics.imports import (
    Imported, Progress, check_settings, describe, imported_config, prepared)
from research.dynamics.public import TOKENIZER, open_checkpoint
from research.dynamics.revisions import FILES, Repository, parse, place_of
from research.errors import UserError
from research.monitors import table
from research.run_dir import RunDir, write_whole
from research.training import hashes
from research.training import manifest as manifest_lib
from research.training import snapshots as snapshots_lib
from research.training.checkpoints import Checkpoints
from research.training.provenance import Chain, Window
from research.training.snapshots import SnapshotReader, SnapshotWriter
from research.training.streaming import place_streamed

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}


class Source(NamedTuple):
  """A public checkpoint in a folder, and what it is called."""

  folder: pathlib.Path
  name: str
  step: int


def find_source(location: str, revision: str = '') -> Source:
  """Returns the checkpoint of a location, fetched if need be.

  Args:
    location: a folder with a config.json, a folder of such revisions, or a repository.
    revision: which; a repository's default is main.

  Raises:
    UserError: there is no such checkpoint.
  """
  path = pathlib.Path(location).expanduser()
  if (path / CONFIG).is_file():
    if revision:
      raise UserError(f'--revision={revision}: {location} is one checkpoint, it has a {CONFIG}')
    return Source(path, location, _step(path.name))
  place = place_of(location)
  if isinstance(place, Repository):
    revision = revision or 'main'
  elif revision not in place.names():
    raise UserError(f'--revision={revision!r}: {location} has {", ".join(place.names()) or "none"}')
  return Source(place.folder(revision, FILES), f'{location}@{revision}', _step(revision))


def _step(name: str) -> int:
  revision = parse(name)
  return revision.step if revision else 0


def import_run(source: Source, run_dir: RunDir, overrides: Sequence[tuple[str, str]] = (),
               say: Callable[[str], None] = print) -> None:
  """Writes a public checkpoint as a run directory: one checkpoint, one snapshot, its scores.

  The config is the model's; of the rest only mesh, monitors and snapshot dtype mean something.
  Repeating an import that was interrupted does it again; a finished one is said to be, or scored
  where the monitor items are new.

  Raises:
    UserError: the checkpoint, its tokenizer or a setting cannot be used, or the directory has a
      run of another origin or made with other settings.
  """
  checkpoint = open_checkpoint(source.folder)
  stored = 'bfloat16' if checkpoint.dtypes == {'bfloat16'} else 'float32'
  config = imported_config(checkpoint.config, source.name, source.step, stored, overrides)
  imported = prepared(config, checkpoint.config, source.folder)
  known = manifest_lib.read(run_dir)
  if known is not None and known.get('imported', {}).get('source') != source.name:
    raise UserError(f'--run_dir={run_dir.path} holds another run; choose another directory')
  run_dir.lock()
  try:
    if run_dir.config_json.exists():
      check_settings(run_dir, config)
    if run_dir.done.exists() and _is_scored(run_dir, imported, source.step):
      say(f'imported already: {run_dir.path}')
      return
    describe(run_dir, imported, source.step, {'imported': {
        'source': source.name, 'folder': str(source.folder.resolve()),
        'model_type': checkpoint.family.model_type, 'dtypes': sorted(checkpoint.dtypes)}})
    if run_dir.done.exists():
      imported.watch(run_dir, source.step)
      say(f'imported already, scored now: {run_dir.path}')
      return
    _write(run_dir, imported, checkpoint, source.step, say)
    write_whole(run_dir.done, json.dumps({'step': source.step}) + '\n')
    say(f'step {source.step} of {source.name} is in {run_dir.path}')
  finally:
    run_dir.unlock()


def _is_scored(run_dir: RunDir, imported: Imported, step: int) -> bool:
  """Returns whether nothing is left to score."""
  return not imported.items or (
      run_dir.monitor_items.exists() and step in table.score_steps(run_dir.monitor_scores)
      and table.read_item_table(run_dir.monitor_items) == imported.items)


def _write(run_dir: RunDir, imported: Imported, checkpoint: HfCheckpoint, step: int,
           say: Callable[[str], None]) -> None:
  """Writes checkpoint, snapshot and scores of the parameters."""
  config, built = imported.config, imported.built
  params = place_streamed(checkpoint.read, built.params, Progress(checkpoint, say))
  checkpoints = Checkpoints(run_dir.checkpoints)
  position = {'step': step, 'tokens': 0}
  if step not in checkpoints.steps:
    origin = {'data': '', 'tokenizer': imported.tokenizer.hash}
    chain = Chain(config, origin, None, Window(step, (), ()))
    checkpoints.save_params(step, params, position,
                            chain.record(step, hashes.digests({'params': params}), position))
  else:
    checkpoints.take_inventory(step)  # An import may have been killed before it.
  checkpoints.close()
  dtype = config.checkpoints.snapshot_dtype
  snapshots = SnapshotWriter(run_dir.snapshots, built.params, dtype, step - 1)
  stored = snapshots_lib.cast(params, dtype)
  snapshots.write(step, stored, hashes.digests(stored))
  snapshots.close()
  imported.watch(run_dir, step)  # scores the snapshot


def export_run(run_dir: RunDir, out: pathlib.Path, step: int = -1, dtype: str = '') -> int:
  """Writes a snapshot or checkpoint of a run as a folder that transformers loads; returns its step.

  It is written beside its place and renamed, so an export that was interrupted can be repeated.

  Args:
    run_dir: of the run.
    out: an empty or new folder, for safetensors, config.json and tokenizer.
    step: of a snapshot, else of a checkpoint; -1 is the newest of either.
    dtype: of the tensors, float32 or bfloat16; '' is that of the snapshot (checkpoints: float32).

  Raises:
    UserError: there is no such run or step, what is stored is not what was saved, no family of
      transformers computes the model, or `out` has content.
  """
  if not run_dir.config_json.exists():
    raise UserError(f'--run_dir={run_dir.whole} is not a run directory: it has no config.json')
  config = config_lib.from_json(run_dir.config_json.read_text(encoding='utf-8'))
  if dtype not in ('', *DTYPES):
    raise UserError(f'--dtype={dtype} is none of {", ".join(DTYPES)}')
  if out.exists() and (not out.is_dir() or any(out.iterdir())):
    raise UserError(f'{out} is not empty; give a folder that is, or a new one')
  step, read, stored = _reader(run_dir, config, step)
  out = out.absolute()
  beside = out.with_name(f'.{out.name}.unfinished')
  if beside.exists():
    shutil.rmtree(beside)
  try:
    hf, tensors = exported(config.model, read, DTYPES[dtype or stored])
    tokenizer = tokenizers.load(run_dir.tokenizer_json)
    hf |= {f'{role}_token_id': getattr(tokenizer, f'{role}_id') for role in ('bos', 'eos', 'pad')}
    write_folder(beside, hf, tensors)
  except ValueError as error:
    raise UserError(str(error)) from error
  tokenizer.save(beside / TOKENIZER[0])
  write_whole(beside / TOKENIZER[1],
              json.dumps(_tokenizer_config(tokenizer, config.model), indent=2))
  beside.rename(out)
  return step


def _tokenizer_config(tokenizer: Tokenizer, model: ModelConfig) -> dict[str, Any]:
  """Returns what AutoTokenizer needs beside tokenizer.json."""
  names = {f'{role}_token': getattr(tokenizer, f'{role}_id') for role in ('bos', 'eos', 'pad')}
  return {'tokenizer_class': 'PreTrainedTokenizerFast', 'model_max_length': model.context_length,
          **{name: tokenizer.backend.id_to_token(i) for name, i in names.items() if i is not None}}


def _reader(run_dir: RunDir, config: ExperimentConfig, step: int
            ) -> tuple[int, Callable[[str, tuple[int, ...]], np.ndarray], str]:
  """Returns the step, what reads one layer of a parameter of it, and the dtype it is stored in."""
  snapshots = SnapshotReader(run_dir.snapshots)
  checkpoints = Checkpoints(run_dir.checkpoints) if run_dir.checkpoints.exists() else None
  full = checkpoints.steps if checkpoints else []
  if not snapshots.steps and not full:
    raise UserError(f'{run_dir.whole} has neither snapshots nor checkpoints')
  step = max([*snapshots.steps, *full]) if step == -1 else step
  if step in snapshots.steps:
    for leaf in snapshots.names():
      snapshots.read([step], leaf)  # Compares hashes, which reading layers cannot.
    dtype = config.checkpoints.snapshot_dtype
    return step, lambda leaf, at: np.asarray(snapshots.leaf(step, leaf)[at].read().result()), dtype
  if step not in full:
    raise UserError(f'--step={step}: {run_dir.whole} has snapshots of steps {snapshots.steps} and '
                    f'checkpoints of steps {full}')
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  params = checkpoints.restore_params(step, jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
      transformer.abstract_params(config.model)))
  checkpoints.close()
  leaves = dict(zip(snapshots_lib.leaf_names(params), jax.tree.leaves(params), strict=True))
  return step, lambda leaf, at: np.asarray(leaves[leaf][at]), 'float32'
