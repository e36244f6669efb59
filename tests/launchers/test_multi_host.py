"""Two real processes, two devices each, against one process with four: the same run."""

import os
import pathlib
import socket
import subprocess
import sys

import pytest

from research.run_dir import RunDir
from research.training import logs
from research.training.snapshots import SnapshotReader

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = ['--config.n_steps=12', '--config.checkpoints.every=6', '--config.evals.every=6',
            '--config.checkpoints.snapshot_every=6', '--config.mesh.fsdp=2', '--config.mesh.tensor=1',
            '--config.mesh.data=2', '--config.logging.tensorboard=false']


def start(run_dir: pathlib.Path, n_devices: int, *more: str) -> subprocess.Popen:
  flags = f'--xla_force_host_platform_device_count={n_devices}'
  return subprocess.Popen(
      [sys.executable, '-m', 'launchers.pretrain', f'--run_dir={run_dir}', *SETTINGS, *more],
      cwd=ROOT, env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def free_port() -> int:
  with socket.socket() as listener:
    listener.bind(('127.0.0.1', 0))
    return listener.getsockname()[1]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
  coordinator = f'--coordinator=127.0.0.1:{free_port()}'
  processes = [start(tmp_path / 'two', 2, coordinator, '--n_processes=2', f'--process_id={i}')
               for i in (0, 1)]
  outputs = [process.communicate(timeout=600) for process in processes]
  for process, (_, errors) in zip(processes, outputs, strict=True):
    assert process.returncode == 0, errors
  one = start(tmp_path / 'one', 4)
  _, errors = one.communicate(timeout=600)
  assert one.returncode == 0, errors
  rows, others = (logs.read_rows(RunDir(tmp_path / name).metrics_jsonl) for name in ('one', 'two'))
  assert [row['step'] for row in others] == list(range(1, 13))
  for row, other in zip(rows, others, strict=True):
    assert row['tokens'] == other['tokens']  # The same documents.
    assert abs(row['loss'] - other['loss']) <= 1e-5 * max(1, row['loss'])
  # The second process keeps a record of its own, which agrees.
  assert logs.read_rows(RunDir(tmp_path / 'two', process=1).metrics_jsonl) == others
  assert SnapshotReader(RunDir(tmp_path / 'two').snapshots).steps == [0, 6, 12]
  assert sorted(path.name for path in (tmp_path / 'two' / 'checkpoints').iterdir()) == ['12', '6']
