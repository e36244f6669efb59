"""A run whose newest checkpoint is damaged goes on from the one before, and loses nothing."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest

from parallelism.mesh import make_mesh
from research import build as build_lib
from research.errors import UserError
from research.run_dir import RunDir
from research.training import stored
from research.training.checkpoints import Checkpoints
from research.training.loop import train
from research.training.snapshots import SnapshotReader
from tests.research.conftest import short_config


def damage_tensor(path):
  """Changes one number and recomputes the list of files, so that only its hash tells."""
  array = stored.StoredCheckpoint(path).leaf('optimizer.1.0.mu.embedding.tokens')
  array[0, 0].write(np.float32(3.0)).result()
  (path / stored.INVENTORY).unlink()
  stored.write_inventory(path)


def truncate_file(path):
  longest = max((path / 'params').rglob('*'), key=lambda file: file.stat().st_size)
  longest.write_bytes(longest.read_bytes()[:1000])


def drop_record(path):
  (path / stored.RECORD).unlink()


def change_parameter(path):
  array = stored.StoredCheckpoint(path).leaf('params.final_norm.scale')
  array[0].write(np.float32(9.0)).result()


@pytest.mark.parametrize('damage, words', [
    (damage_tensor, 'optimizer.1.0.mu.embedding.tokens does not have the content that was saved'),
    (truncate_file, 'params'), (drop_record, 'record cannot be read')])
def test_the_checkpoint_before_is_used_and_the_end_is_the_same(short_run, trained, capsys, damage, words,
                                                               quick_compilation):
  short_run.done.unlink()
  damage(short_run.checkpoints / '30')
  train(short_config(), RunDir(short_run.path))
  said = [line for line in capsys.readouterr().out.splitlines() if 'set aside' in line]
  assert len(said) == 1 and words in said[0] and 'set_aside/30-0' in said[0]
  assert [path.name for path in short_run.set_aside.iterdir()] == ['30-0']
  start = json.loads(short_run.manifest_json.read_text())['starts'][-1]
  assert start['from_step'] == 20
  assert short_run.metrics_jsonl.read_text() == trained.metrics_jsonl.read_text()
  ours, theirs = (SnapshotReader(run.snapshots) for run in (short_run, trained))
  assert ours.commits == theirs.commits  # So all tensors are bit for bit the same.
  records = [stored.read_record(run.checkpoints / '30') for run in (short_run, trained)]
  assert records[0] == records[1] and records[0]['window']['from'] == 20


def test_when_none_is_sound_nothing_is_begun_anew_unasked(short_run, quick_compilation):
  short_run.done.unlink()
  for step in (10, 20, 30):
    change_parameter(short_run.checkpoints / str(step))
  rows = short_run.metrics_jsonl.read_text()
  for _ in range(2):  # Repeating the command does not begin anew either.
    with pytest.raises(UserError, match='no checkpoint of .* is sound; all are in .*set_aside'):
      train(short_config(), RunDir(short_run.path))
  assert short_run.metrics_jsonl.read_text() == rows
  assert sorted(path.name for path in short_run.set_aside.iterdir()) == ['10-0', '20-0', '30-0']


def test_a_failure_that_is_not_the_checkpoints_fault_sets_nothing_aside(short_run):
  checkpoints = Checkpoints(short_run.checkpoints)
  with pytest.raises(Exception) as error:
    checkpoints.restore_newest(
        jax.ShapeDtypeStruct((3,), np.float32), short_run.set_aside)  # No state at all.
  checkpoints.close()
  assert not isinstance(error.value, UserError)
  assert not short_run.set_aside.exists() and checkpoints.steps == [10, 20, 30]


@contextlib.contextmanager
def without_privileges():
  """Root may read what modes forbid; inside, all threads of this process are nobody's."""
  is_root = os.geteuid() == 0
  if is_root:
    os.seteuid(65534)
  try:
    yield
  finally:
    if is_root:
      os.seteuid(0)


@pytest.fixture
def public_run(trained):
  """A copy of the short run where everybody may read it."""
  with tempfile.TemporaryDirectory() as folder:
    os.chmod(folder, 0o755)
    run_dir = RunDir(shutil.copytree(trained.path, pathlib.Path(folder) / 'run'))
    for path in (run_dir.path, *run_dir.path.rglob('*')):
      path.chmod(0o755 if path.is_dir() else 0o644)
    yield run_dir


def longest_file(path):
  return max((path / 'params').rglob('*'), key=lambda file: file.stat().st_size)


def unlisted(path):
  """As where it was killed after saving: the tensors alone say what is in the files."""
  (path / stored.INVENTORY).unlink()
  return longest_file(path)


@pytest.mark.parametrize('forbidden', [
    longest_file, unlisted, lambda path: path / 'params', lambda path: longest_file(path).parent,
    lambda path: path / stored.RECORD], ids=['file', 'unlisted', 'item', 'folder', 'record'])
def test_a_checkpoint_that_cannot_be_read_is_not_set_aside(
    public_run, forbidden, quick_compilation):
  config = short_config()
  mesh = make_mesh(config.mesh)
  built = build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))
  path = forbidden(public_run.checkpoints / '30')
  mode = path.stat().st_mode
  checkpoints = Checkpoints(public_run.checkpoints)
  restored = lambda: checkpoints.restore_newest(built.abstract_state, public_run.set_aside)[0]
  with without_privileges():
    assert restored() == 30  # All that is needed may be read.
  path.chmod(0)
  with without_privileges(), pytest.raises(UserError) as refused:
    restored()
  assert str(path) in str(refused.value) and 'Permission denied' in str(refused.value)
  assert 'whether it is sound is not known' in str(refused.value)
  path.chmod(mode)
  assert not public_run.set_aside.exists() and checkpoints.steps == [10, 20, 30]
  assert restored() == 30
  checkpoints.close()


def test_a_parent_that_is_damaged_is_refused_by_name(short_run, tmp_path, quick_compilation):
  change_parameter(short_run.checkpoints / '30')
  config = short_config(**{'start.run_dir': str(short_run.path)})
  with pytest.raises(UserError, match='checkpoints/30/params: params.final_norm.scale does not have'):
    train(config, RunDir(tmp_path / 'child'))
