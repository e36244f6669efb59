"""Runs of several real processes: equal to one, restored by any number, their ends explained."""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest

from parallelism import distributed
from parallelism.distributed import HostsConfig
from parallelism.roll_call import EXIT_CODE
from research.run_dir import RunDir
from research.training import logs
from research.training.snapshots import SnapshotReader

ROOT = pathlib.Path(__file__).resolve().parents[2]
HOST = socket.gethostname()
N_DEVICES = 8  # of a run, over all its processes
SETTINGS = ['--config.checkpoints.every=3', '--config.evals.every=3',
            '--config.checkpoints.snapshot_every=3', '--config.mesh.data=4',
            '--config.mesh.fsdp=2', '--config.logging.tensorboard=false',
            '--config.model.n_layers=1', '--config.model.d_ff=64', '--config.monitors.suite=none']
CAPTURED = ['--config.monitors.suite=microworld', '--config.monitors.captures=1']


def free_port(first: int = 0, last: int = 0) -> int:
  for port in range(first, last + 1):
    with socket.socket() as listener:
      try:
        listener.bind(('127.0.0.1', port))
      except OSError:
        continue
      return listener.getsockname()[1]
  raise OSError(f'no free port in {first}..{last}')


def launch(run_dir: pathlib.Path, n_processes: int, *more: str, missing: tuple[int, ...] = ()
           ) -> list[subprocess.Popen]:
  """Starts the processes of a run, each with its share of the devices."""
  flags = f'--xla_force_host_platform_device_count={N_DEVICES // n_processes}'
  address, processes = f'127.0.0.1:{free_port()}', []
  for rank in set(range(n_processes)) - set(missing):
    hosts = [f'--coordinator={address}', f'--n_processes={n_processes}', f'--process_id={rank}']
    processes.append(subprocess.Popen(
        [sys.executable, '-m', 'launchers.pretrain', f'--run_dir={run_dir}', *SETTINGS, *more,
         *(hosts if n_processes > 1 else [])],
        cwd=ROOT, text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags,
                                  'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE))
  return processes


def outputs(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
  """Returns (exit code, stdout, stderr) of each."""
  texts = [process.communicate(timeout=600) for process in processes]
  return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def finish(run_dir: pathlib.Path, n_processes: int, *more: str) -> list[str]:
  """Runs to the end; returns what the processes said."""
  ended = outputs(launch(run_dir, n_processes, *more))
  for code, _, errors in ended:
    assert code == 0, errors
  return [out for _, out, _ in ended]


def rows_of(run_dir: pathlib.Path, process: int = 0) -> list[dict]:
  return logs.read_rows(RunDir(run_dir, process).metrics_jsonl)


def assert_same_training(run_dir: pathlib.Path, other: pathlib.Path) -> None:
  rows, others = rows_of(run_dir), rows_of(other)
  assert [row['step'] for row in rows] == [row['step'] for row in others] == list(range(1, 7))
  for row, against in zip(rows, others, strict=True):
    assert row['tokens'] == against['tokens']  # The same documents.
    assert abs(row['loss'] - against['loss']) <= 1e-5 * max(1, against['loss'])


@pytest.fixture(scope='module')
def two(tmp_path_factory) -> pathlib.Path:
  """A finished run of two processes, four devices each."""
  run_dir = tmp_path_factory.mktemp('runs') / 'two'
  said = finish(run_dir, 2, '--config.n_steps=6', *CAPTURED)
  assert all('captures are made by one process' in text for text in said)
  return run_dir


@pytest.mark.slow
@pytest.mark.parametrize('n_processes', [1, 4])
def test_two_processes_equal_one_and_four(two, tmp_path, n_processes):
  finish(tmp_path / 'run', n_processes, '--config.n_steps=6')
  assert_same_training(two, tmp_path / 'run')


@pytest.mark.slow
def test_every_process_keeps_a_record_and_arrays_are_written_together(two):
  assert rows_of(two, process=1) == rows_of(two)
  scores = [sorted(path.name for path in RunDir(two, i).monitor_scores.iterdir()) for i in (0, 1)]
  assert scores[0] == scores[1] and len(scores[0]) == 3
  assert SnapshotReader(RunDir(two).snapshots).steps == [0, 3, 6]
  assert sorted(path.name for path in (two / 'checkpoints').iterdir()) == ['3', '6']


@pytest.mark.slow
def test_what_two_processes_made_is_searched_for_captures_by_one(two, tmp_path):
  shutil.copytree(two, tmp_path / 'run')
  (said,) = finish(tmp_path / 'run', 1, '--config.n_steps=6', *CAPTURED)
  assert 'finished already' in said and '0 of at most 1 captures' in said


@pytest.mark.slow
@pytest.mark.parametrize('n_processes', [1, 4])
def test_a_checkpoint_of_two_processes_is_continued_by_one_and_by_four(two, tmp_path, n_processes):
  run_dir = tmp_path / 'run'
  shutil.copytree(two, run_dir)
  (run_dir / 'DONE').unlink()
  shutil.rmtree(run_dir / 'checkpoints' / '6')
  away = RunDir(run_dir, process=1).metrics_jsonl  # Process 1 had been away since step 1.
  away.write_text(away.read_text(encoding='utf-8').splitlines(keepends=True)[0], encoding='utf-8')
  said = finish(run_dir, n_processes, '--config.n_steps=6')
  assert all('at step 3 of 6' in text for text in said)
  assert_same_training(run_dir, two)
  for process in range(1, n_processes):  # They took over what they had not seen.
    assert rows_of(run_dir, process) == rows_of(run_dir)


@pytest.mark.slow
def test_when_one_process_dies_the_other_says_so_and_the_run_can_be_resumed(tmp_path):
  run_dir, n_steps = tmp_path / 'run', 60
  settings = [f'--config.n_steps={n_steps}']
  processes = launch(run_dir, 2, *settings)
  while len(rows_of(run_dir)) < 8:
    assert all(process.poll() is None for process in processes)
    time.sleep(0.05)
  processes[1].send_signal(signal.SIGKILL)
  killed = time.monotonic()
  (code, _, errors), (gone, _, _) = outputs(processes)
  assert gone == -signal.SIGKILL and code == EXIT_CODE
  assert time.monotonic() - killed < 20
  assert f'error: process 1 ({HOST}) of 2 ended without a word' in errors
  assert not RunDir(run_dir).done.exists()
  said = finish(run_dir, 2, *settings)
  assert all(f'resuming {RunDir(run_dir, process).path} at step ' in text
             for process, text in enumerate(said))
  assert 'at step 0 ' not in said[0]
  assert [row['step'] for row in rows_of(run_dir)] == list(range(1, n_steps + 1))
  assert rows_of(run_dir, process=1) == rows_of(run_dir)


@pytest.mark.slow
def test_a_missing_process_is_named_and_nothing_is_written(tmp_path):
  ended = outputs(launch(tmp_path / 'run', 4, '--config.hosts.startup_seconds=6', missing=(1, 3)))
  for code, out, errors in ended:
    assert (code, out) == (2, '')
    assert errors.count('\n') == 1
    assert errors.startswith('error: processes 1, 3 of 4 did not call within 6 s')
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('place, words', [
    (('127.0.0.1:1', 2, 2), '--process_id=2 must lie in 0..1 (--n_processes=2)'),
    (('auto', 1, 0), '--coordinator=auto: this is no Cloud TPU, SLURM or Open MPI job'),
    (('here', 2, 0), "'here' is not host:port of process 0"),
])
def test_a_place_that_cannot_be_is_refused(place, words):
  with pytest.raises(ValueError) as error:
    distributed.start(HostsConfig(), *place)
  assert words in str(error.value)


@pytest.mark.parametrize('field', ['startup_seconds', 'heartbeat_seconds'])
def test_patience_below_a_second_is_refused(field):
  with pytest.raises(ValueError, match=f'hosts.{field}=0 must be at least 1'):
    HostsConfig(**{field: 0})


STARTED = """
import jax
from parallelism.distributed import HostsConfig, finish, start
start(HostsConfig({config}), {coordinator})
print(jax.process_index(), jax.process_count(), jax.device_count(), flush=True)
"""


def run_program(program: str, environment: dict[str, str]) -> subprocess.Popen:
  return subprocess.Popen(
      [sys.executable, '-c', program], cwd=ROOT, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT),
           'XLA_FLAGS': '--xla_force_host_platform_device_count=2', **environment})


def test_two_tasks_of_a_slurm_job_find_one_another():
  """The variables that srun sets for its tasks; the port follows from the job's number."""
  program = STARTED.format(config='startup_seconds=60', coordinator="'auto', 1, 0") + 'finish()'
  job = free_port(61440, 65535) - 61440
  tasks = [run_program(program, {
      'SLURM_JOB_ID': str(job), 'SLURM_STEP_NODELIST': 'localhost', 'SLURM_NTASKS': '2',
      'SLURM_PROCID': str(rank), 'SLURM_LOCALID': str(rank)}) for rank in (0, 1)]
  for rank, (code, out, errors) in enumerate(outputs(tasks)):
    assert code == 0, errors
    assert out == f'{rank} 2 4\n'


@pytest.mark.slow
def test_a_process_that_falls_silent_is_named_after_the_heartbeat_timeout():
  """It is not dead, so its line stays open: JAX's heartbeats find it."""
  address = f'127.0.0.1:{free_port()}'
  programs = [STARTED.format(config='heartbeat_seconds=6', coordinator=f"'{address}', 3, {rank}")
              + 'import time\ntime.sleep(100)' for rank in range(3)]
  processes = [run_program(program, {}) for program in programs]
  for process in processes:
    assert process.stdout.readline().endswith(' 3 6\n')
  processes[1].send_signal(signal.SIGSTOP)
  began = time.monotonic()
  ended = outputs([processes[0], processes[2]])
  assert time.monotonic() - began < 20
  processes[1].kill()
  processes[1].communicate()
  for code, _, errors in ended:
    assert code != 0
  assert 'unhealthy (stopped sending heartbeats):\n1\n' in ended[0][2]
