"""Command lines as users type them: help, bad input in one sentence, a full disk."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

from research.run_dir import RunDir
from tests.models import hf_cases

ROOT = pathlib.Path(__file__).resolve().parents[2]
# All of them: a launcher that is not here has no --help that a test reads.
LAUNCHERS = tuple(sorted(path.stem for path in (ROOT / 'launchers').glob('*.py')
                         if "__name__ == '__main__'" in path.read_text(encoding='utf-8')))


def launch(launcher: str, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, '-m', f'launchers.{launcher}', *arguments], cwd=ROOT,
                        text=True, capture_output=True, check=False,
                        env={**os.environ, 'JAX_PLATFORMS': 'cpu'})


@pytest.mark.parametrize('launcher', LAUNCHERS)
def test_help_teaches(launcher):
  result = launch(launcher, '--help')
  assert result.returncode == 0, result.stderr
  assert f'python -m launchers.{launcher}' in result.stdout
  if launcher == 'pretrain':
    assert 'optimizer.peak_lr=' in result.stdout and 'learning rate after warm-up' in result.stdout


TEXT = ('--experiment=text', '--config.monitors.suite=none')


@pytest.mark.parametrize('arguments, words', [
    (['--experiment=quikstart'], 'the nearest is quickstart'),
    (['--config.optimizer.peek_lr=1'], 'the nearest is --config.optimizer.peak_lr'),
    (['--config.n_steps=many'], '--config.n_steps=many: expected int'),
    (['--config.mesh.data=5'], 'needs 5 devices'),
    (['--config.data.sequence_length=128'], 'is longer than model.context_length=64'),
    (['--config.model.n_kv_heads=3'], 'is not a multiple of model.n_kv_heads=3'),
    (['--config.monitors.suite={tmp}/none.jsonl'], 'none.jsonl'),
    ([*TEXT, '--config.data.text.paths={tmp}/absent.txt'], 'absent.txt'),
    ([*TEXT, '--config.data.text.paths={tmp}/empty.txt'], 'empty.txt'),
    ([*TEXT, '--config.data.text.paths={tmp}/broken.jsonl'], 'broken.jsonl, line 2'),
    ([*TEXT, '--config.data.text.paths={tmp}/latin1.txt'], 'latin1.txt'),
    ([*TEXT, '--config.data.text.paths={tmp}/fine.txt', '--config.data.text.tokenizer=bytes',
      '--config.model.vocab_size=100'], 'model.vocab_size=100 is smaller'),
    (['--config.data.kind=tokens', '--config.data.tokens.paths={tmp}/shard.bin'], 'tokenizer'),
    (['stray'], "unexpected argument 'stray'"),
])
def test_bad_input_is_one_sentence_before_anything_is_written(tmp_path, arguments, words):
  (tmp_path / 'empty.txt').write_bytes(b'')
  (tmp_path / 'broken.jsonl').write_text('{"text": "fine"}\n{"text": \n')
  (tmp_path / 'latin1.txt').write_bytes('caf\xe9 '.encode('latin-1') * 400)
  (tmp_path / 'fine.txt').write_text('the quick brown fox ' * 2000)
  (tmp_path / 'shard.bin').write_bytes(bytes(4096))
  (tmp_path / 'shard.bin.json').write_text(
      json.dumps({'tokenizer_hash': '0' * 64, 'dtype': 'uint16'}))
  run_dir = tmp_path / 'run'
  result = launch('pretrain', f'--run_dir={run_dir}', f'--config.data.cache_dir={tmp_path}/cache',
                  *[argument.format(tmp=tmp_path) for argument in arguments])
  assert result.returncode == 2, (result.returncode, result.stderr)
  lines = result.stderr.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: '), result.stderr
  assert words in lines[0]
  assert not (run_dir / 'manifest.json').exists()


@pytest.mark.parametrize('arguments, words', [
    (['audit'], 'the location is missing'),
    (['audit', '{tmp}'], 'is no trajectory'),
    (['look', '{tmp}'], "'look' is no command; choose one of list, audit"),
    (['audit', '{tmp}', 'more'], "unexpected argument 'more'"),
    (['average', '{tmp}'], '--to is missing')])
def test_trajectory_refuses_in_one_sentence(tmp_path, arguments, words):
  result = launch('trajectory', *[argument.format(tmp=tmp_path) for argument in arguments])
  assert result.returncode == 2, (result.returncode, result.stderr)
  assert result.stderr.startswith('error: ') and words in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize('arguments', [('list', '{folder}'), ('--help',)])
def test_a_reader_that_has_enough_ends_it_quietly(tmp_path, arguments):
  """As `| head` does, and a pager that is left; the exit code is what shells give for SIGPIPE."""
  hf_cases.write(tmp_path / 'step100', hf_cases.config_json('llama-default-untied'))
  command = [sys.executable, '-m', 'launchers.trajectory',
             *[argument.format(folder=tmp_path) for argument in arguments]]
  with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                        text=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'}) as process:
    process.stdout.close()  # before anything is written
    said = process.stderr.read()
  assert (process.returncode, said) == (128 + signal.SIGPIPE, '')


def test_batch_that_the_mesh_does_not_divide():
  result = subprocess.run(
      [sys.executable, '-m', 'launchers.pretrain', '--config.data.batch_size=6'], cwd=ROOT,
      text=True, capture_output=True, check=False, env={
          **os.environ, 'JAX_PLATFORMS': 'cpu',
          'XLA_FLAGS': '--xla_force_host_platform_device_count=4'})
  assert result.returncode == 2
  assert 'data.batch_size=6 is not divided by mesh.data=4' in result.stderr


def test_a_directory_in_use_is_refused(tmp_path):
  run_dir = RunDir(tmp_path / 'run')
  run_dir.lock()
  result = launch('pretrain', f'--run_dir={tmp_path / "run"}', '--config.n_steps=2')
  run_dir.unlock()
  assert result.returncode == 2
  assert f'is in use by process {os.getpid()}' in result.stderr


SMALL = '--config.n_steps=60 --config.checkpoints.every=5 --config.checkpoints.snapshot_every=5 ' \
        '--config.monitors.suite=none --config.evals.every=0 --config.logging.tensorboard=false'


@pytest.mark.slow
def test_full_disk_stops_cleanly_and_the_run_goes_on_after_it(tmp_path):
  """A real file system that fills up: a small tmpfs in a mount namespace of the test's own."""
  command = f'{sys.executable} -m launchers.pretrain --run_dir={tmp_path}/run {SMALL}'
  script = f'''
    mount -t tmpfs -o size=7m tmpfs {tmp_path} || exit 99
    {command} > /dev/null; echo "first $?"
    ls {tmp_path}/run/checkpoints
    mount -o remount,size=400m {tmp_path} || exit 98
    {command}; echo "second $?"
  '''
  unshare = shutil.which('unshare')
  assert unshare, 'unshare (util-linux) is needed'
  user = [] if os.geteuid() == 0 else ['--map-root-user']
  result = subprocess.run([unshare, '--mount', *user, 'sh', '-c', script], cwd=ROOT, text=True,
                          capture_output=True, check=False,
                          env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  assert result.returncode == 0, result.stderr
  assert 'first 2' in result.stdout and 'error: no space left on the disk' in result.stderr
  assert 'Traceback' not in result.stderr, result.stderr
  assert 'resuming' in result.stdout and 'second 0' in result.stdout, result.stdout
