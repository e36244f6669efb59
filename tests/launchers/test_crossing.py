"""A run that is continued on another mesh or by other processes, and stopped on all at once.

The stated bound across meshes: the same batches bit for bit, and losses within 1e-5 of one another
(float32, relative where above 1), as between any two meshes; on the same mesh the same bits.
"""

import hashlib
import pathlib
import shutil
import signal
import time

import numpy as np
import pytest

from experiments import quickstart
from experiments.benchmarks import storms
from research import build as build_lib
from research import overrides
from research.config import ExperimentConfig
from research.errors import PREEMPTED
from research.run_dir import RunDir
from research.training.checkpoints import Checkpoints
from research.training.loop import train
from tests.launchers.test_multi_host import finish, launch, outputs, rows_of

N_STEPS, CROSSED, BOUND = 12, 4, 1e-5
SETTINGS = {
    'n_steps': N_STEPS, 'checkpoints.every': CROSSED, 'checkpoints.keep': 0,
    'checkpoints.snapshot_every': 0, 'evals.every': 0, 'monitors.suite': 'none',
    'model.n_layers': 1, 'model.d_ff': 64, 'model.dropout': 0.1, 'optimizer.warmup_steps': 0,
    'logging.tensorboard': 'false'}
MESHES = [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'data': 4}, {'data': 1}]


def experiment(mesh: dict[str, int]) -> ExperimentConfig:
  settings = {**SETTINGS, **{f'mesh.{axis}': n for axis, n in mesh.items()}}
  return overrides.apply(quickstart.get_config(), [(k, str(v)) for k, v in settings.items()])


@pytest.fixture(scope='module')
def begun(tmp_path_factory, quick_compilation) -> pathlib.Path:
  """A finished run on (data 8)."""
  run_dir = tmp_path_factory.mktemp('crossing') / 'run'
  train(experiment({'data': 8}), RunDir(run_dir))
  return run_dir


def cut_back(run_dir: pathlib.Path, target: pathlib.Path) -> RunDir:
  """Returns a copy of the run as it was when it had its first checkpoint."""
  shutil.copytree(run_dir, target)
  (target / 'DONE').unlink()
  for step in range(2 * CROSSED, N_STEPS + 1, CROSSED):
    shutil.rmtree(target / 'checkpoints' / str(step))
  return RunDir(target)


def assert_same_losses(run_dir: pathlib.Path, other: pathlib.Path) -> None:
  rows, others = rows_of(run_dir), rows_of(other)
  assert [row['step'] for row in rows] == list(range(1, N_STEPS + 1))
  for row, want in zip(rows, others, strict=True):
    assert row['tokens'] == want['tokens'] and not row['skipped']
    for name in ('loss', 'grad_norm'):
      assert abs(row[name] - want[name]) <= BOUND * max(1, want[name]), (row['step'], name)


def continued(begun: pathlib.Path, run_dir: pathlib.Path, mesh: dict[str, int]) -> list[str]:
  """Goes on from the first checkpoint on a mesh; returns hashes of all batches that it was fed.

  A hash is that of the whole batch as it lies on the mesh.
  """
  seen, place = [], build_lib.Build.place_batch

  def placed(self, local):
    batch = place(self, local)
    content = b''.join(np.asarray(batch[name]).tobytes() for name in sorted(batch))
    seen.append(hashlib.sha256(content).hexdigest())
    return batch
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(build_lib.Build, 'place_batch', placed)
    train(experiment(mesh), cut_back(begun, run_dir))
  return seen


@pytest.fixture(scope='module')
def on_the_same(begun) -> tuple[pathlib.Path, list[str]]:
  """(the run continued on its own mesh, the batches it was fed)."""
  run_dir = begun.with_name('same')
  return run_dir, continued(begun, run_dir, {'data': 8})


@pytest.mark.slow
def test_on_the_same_mesh_the_bits_are_the_same(begun, on_the_same):
  assert storms.differences(RunDir(begun), RunDir(on_the_same[0])) == []


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES, ids=str)
def test_on_another_mesh_the_batches_are_the_same_and_losses_within_the_bound(
    begun, on_the_same, tmp_path, mesh):
  fed = continued(begun, tmp_path / 'other', mesh)
  assert fed == on_the_same[1]
  assert len(set(fed)) == len(fed) == 1 + N_STEPS - CROSSED  # One is held out.
  assert_same_losses(tmp_path / 'other', begun)


def arguments(**more: object) -> list[str]:
  return [f'--config.{name}={value}' for name, value in {**SETTINGS, **more}.items()]


@pytest.mark.slow
def test_by_two_processes_losses_are_within_the_bound(begun, tmp_path):
  copy = cut_back(begun, tmp_path / 'copy')
  said = finish(copy.path, 2, *arguments(**{'mesh.data': 8, 'mesh.fsdp': 1}))
  assert all(f'at step {CROSSED} of {N_STEPS}' in text for text in said)
  assert_same_losses(copy.path, begun)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_all_processes_stop_at_the_same_step_whichever_was_asked(tmp_path, number):
  run_dir = tmp_path / 'run'
  endless = arguments(**{'n_steps': 10**6, 'mesh.data': 8, 'mesh.fsdp': 1,
                         'checkpoints.every': 10**6})
  processes = launch(run_dir, 2, *endless)
  asked = processes[1 if number == signal.SIGTERM else 0]
  while len(rows_of(run_dir)) < 5:
    assert all(process.poll() is None for process in processes)
    time.sleep(0.05)
  for _ in range(2 if number == signal.SIGTERM else 1):
    asked.send_signal(number)
    time.sleep(0.1)
  ended = outputs(processes)
  assert [code for code, _, _ in ended] == [PREEMPTED] * 2, ended
  step = rows_of(run_dir)[-1]['step']
  assert rows_of(run_dir, process=1) == rows_of(run_dir)
  for _, _, errors in ended:
    assert f'and saved at step {step} of 1000000 in ' in errors.strip().splitlines()[-1]
  checkpoints = Checkpoints(RunDir(run_dir).checkpoints)
  assert checkpoints.steps == [step]
  checkpoints.close()
