"""A sweep as users type it: members that are stopped, fail, go on and are skipped."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from research.errors import PREEMPTED

ROOT = pathlib.Path(__file__).resolve().parents[2]
STOPPED, WHOLE = 'quickstart-seed11', 'quickstart-seed12'
TINY = ['--config.n_steps=400', '--config.model.n_layers=1', '--config.model.d_model=32',
        '--config.data.batch_size=8', '--config.checkpoints.snapshot_every=200',
        '--config.checkpoints.every=200', '--config.evals.every=0',
        '--config.logging.tensorboard=false']


def sweep(folder: pathlib.Path, *arguments: str) -> subprocess.Popen:
  return subprocess.Popen(
      [sys.executable, '-m', 'launchers.sweep', '--experiment=hop_seeds', f'--root={folder}',
       f'--only={STOPPED},{WHOLE}', *TINY, *arguments], cwd=ROOT, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONUNBUFFERED': '1',
           'JAX_COMPILATION_CACHE_DIR': str(folder / 'xla'),
           'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'})


def only_child(process: subprocess.Popen) -> int:
  """Returns the process number of the member that a sweep runs."""
  children = [child for task in pathlib.Path(f'/proc/{process.pid}/task').iterdir()
              for child in (task / 'children').read_text().split()]
  assert len(children) == 1
  return int(children[0])


@pytest.mark.slow
def test_a_stopped_member_has_not_failed_and_goes_on(tmp_path):
  first = sweep(tmp_path)
  rows = tmp_path / 'hop_seeds' / STOPPED / 'metrics.jsonl'
  while not rows.exists() or not rows.stat().st_size:
    assert first.poll() is None, first.stdout.read()
    time.sleep(0.01)
  os.kill(only_child(first), signal.SIGTERM)
  said = first.communicate()[0]
  assert first.returncode == PREEMPTED, said
  assert f'[1/2] {STOPPED} stopped' in said and f'[2/2] {WHOLE} done' in said
  assert f'{STOPPED} stopped, saved; repeat the command' in said

  again = sweep(tmp_path)
  said = again.communicate()[0]
  assert again.returncode == 0, said
  assert 'resuming' in said and 'finished already' in said
  assert f'[1/2] {STOPPED} done' in said and f'[2/2] {WHOLE} done' in said
  members = tmp_path / 'hop_seeds'
  assert all((members / name / 'DONE').exists() for name in (STOPPED, WHOLE))

  failed = sweep(tmp_path, '--config.seed=5')
  said = failed.communicate()[0]
  assert failed.returncode == 2, said
  assert f'[1/2] {STOPPED} FAILED' in said and 'mend it and repeat the command' in said
