"""A run that is asked to stop, and one that hangs: what they save, say and where they say it."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from models.config import ModelConfig
from parallelism.mesh import MeshConfig
from parallelism.roll_call import EXIT_CODE
from research.config import ExperimentConfig
from research.data.config import DataConfig
from research.data.microworld import WORDS, MicroworldSource
from research.errors import PREEMPTED, Stopped
from research.run_dir import RunDir
from research.training import logs
from research.training.checkpoints import Checkpoints
from research.training.config import CheckpointConfig, EvalConfig, WatchdogConfig
from research.training.loop import train
from research.training.watchdog import Watchdog

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures('quick_compilation')


def experiment(n_steps: int, **watchdog) -> ExperimentConfig:
  """A tiny run on the micro-world."""
  return ExperimentConfig(
      name='tiny', n_steps=n_steps, mesh=MeshConfig(data=1),
      model=ModelConfig(vocab_size=64 * -(-(len(WORDS) + 8) // 64), context_length=32, n_layers=1,
                        d_model=32, n_heads=2, n_kv_heads=2, d_head=16, d_ff=64),
      data=DataConfig(kind='microworld', sequence_length=32, batch_size=4),
      checkpoints=CheckpointConfig(every=10**6, snapshot_every=10), evals=EvalConfig(every=0),
      watchdog=WatchdogConfig(**watchdog),
      logging=dataclasses.replace(ExperimentConfig().logging, tensorboard=False))


def signal_after(run_dir: RunDir, n_rows: int, *numbers: int) -> threading.Thread:
  """Starts a thread that sends this process signals once the run has written so many rows."""
  def send():
    while len(logs.read_rows(run_dir.metrics_jsonl)) < n_rows:
      time.sleep(0.001)
    for number in numbers:
      os.kill(os.getpid(), number)
      time.sleep(0.005)
  thread = threading.Thread(target=send)
  thread.start()
  return thread


@pytest.fixture
def harmless():
  """Signals that come after the run has ended do not end the tests."""
  ignore = lambda number, frame: None
  before = {number: signal.signal(number, ignore) for number in (signal.SIGTERM, signal.SIGINT)}
  yield ignore
  for number, handler in before.items():
    signal.signal(number, handler)


def stopped_after(run_dir: RunDir, n_rows: int, *numbers: int) -> tuple[int, Stopped]:
  """Runs until it is asked to stop; returns the last recorded step and how the run ended."""
  sender = signal_after(run_dir, n_rows, *numbers)
  with pytest.raises(Stopped) as stop:
    train(experiment(10**6), run_dir)
  sender.join()
  return logs.read_rows(run_dir.metrics_jsonl)[-1]['step'], stop.value


def test_a_run_that_is_asked_to_stop_is_saved_and_goes_on(tmp_path, harmless):
  run_dir = RunDir(tmp_path / 'run')
  first, stop = stopped_after(run_dir, 25, signal.SIGTERM, signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is harmless
  assert first >= 25 and stop.exit_code == PREEMPTED
  assert str(stop) == (f'stopped by SIGTERM and saved at step {first} of 1000000 in '
                       f'{run_dir.path}; repeat the command to resume')
  second, stop = stopped_after(run_dir, first + 3, signal.SIGINT)
  assert f'stopped by SIGINT and saved at step {second} of' in str(stop)
  rows = logs.read_rows(run_dir.metrics_jsonl)
  assert [row['step'] for row in rows] == list(range(1, second + 1)) and second >= first + 3
  checkpoints = Checkpoints(run_dir.checkpoints)
  assert checkpoints.steps == [first, second]
  checkpoints.close()
  starts = json.loads(run_dir.manifest_json.read_text())['starts']
  assert [start['from_step'] for start in starts] == [0, first]


def test_a_run_that_hangs_says_in_which_phase_and_goes_on_when_it_can(tmp_path, monkeypatch, capfd):
  """The data really stand still, then the saving does, each until the watchdog has written."""
  config, run_dir = experiment(14, seconds=0.7), RunDir(tmp_path / 'run')
  row, save = MicroworldSource.row, Checkpoints.save

  def stands_still(where: str):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (
        run_dir.stacks_txt.exists() and where in run_dir.stacks_txt.read_text()):
      time.sleep(0.01)

  def slow_row(self, j):
    if j == 4 * 9:  # the first of the tenth step
      stands_still('phase data after step 8')
    return row(self, j)

  def slow_save(self, *arguments):
    stands_still('phase save after step 14')
    return save(self, *arguments)

  monkeypatch.setattr(MicroworldSource, 'row', slow_row)
  monkeypatch.setattr(Checkpoints, 'save', slow_save)
  train(config, run_dir)
  assert run_dir.done.exists()
  lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith('watchdog: ')]
  # Compiling, or anything on a busy machine, may take longer than this watchdog waits, too.
  data, = [line for line in lines if 'phase data after step 8' in line]
  saving, = [line for line in lines if 'phase save after step 14' in line]
  assert 'process 0 of 1' in data and 'is waiting for data' in data
  assert 'is saving' in saving and str(run_dir.stacks_txt) in saving
  stacks = run_dir.stacks_txt.read_text()
  assert 'in _train' in stacks and 'in slow_save' in stacks


def test_a_watchdog_tells_once_per_hang_and_only_of_hangs(tmp_path, capfd):
  run_dir = RunDir(tmp_path)
  with Watchdog(WatchdogConfig(seconds=0.4), run_dir) as watchdog:
    for step in range(8):
      watchdog.at('monitor', step)
      time.sleep(0.1)
    assert capfd.readouterr().err == ''
    time.sleep(1.2)
  assert capfd.readouterr().err.count('phase monitor after step 7') == 1
  with Watchdog(WatchdogConfig(seconds=0.0), run_dir):
    time.sleep(0.3)
  assert capfd.readouterr().err == ''


IMPATIENT = """
import os, signal
from research.training.halt import Halt
with Halt() as halt:
  os.kill(os.getpid(), signal.SIGTERM)
  os.kill(os.getpid(), signal.SIGTERM)
  print(halt.reached(1), flush=True)
  os.kill(os.getpid(), signal.SIGINT)
  os.kill(os.getpid(), signal.SIGINT)
print('not reached')
"""


def test_a_second_sigterm_is_ignored_and_a_second_interrupt_leaves_at_once():
  ended = subprocess.run([sys.executable, '-c', IMPATIENT], cwd=ROOT, capture_output=True,
                         text=True, timeout=60, check=False)
  assert (ended.returncode, ended.stdout) == (130, 'True\n'), ended.stderr
  assert ended.stderr == '\nfinishing the step and saving; Ctrl-C again to leave at once\n'


ABORTS = """
import time
from research.run_dir import RunDir
from research.training.config import WatchdogConfig
from research.training.watchdog import Watchdog
with Watchdog(WatchdogConfig(seconds=0.2, abort=True), RunDir({path!r})) as watchdog:
  watchdog.at('step', 3)
  watchdog.at('eval')
  time.sleep(60)
"""


def test_a_watchdog_ends_the_process_where_it_is_told_to(tmp_path):
  ended = subprocess.run([sys.executable, '-c', ABORTS.format(path=str(tmp_path))], cwd=ROOT,
                         capture_output=True, text=True, timeout=60, check=False)
  assert ended.returncode == EXIT_CODE
  assert 'phase eval after step 3' in ended.stderr and ended.stderr.count('\n') == 1
  assert 'time.sleep' not in ended.stderr and (tmp_path / 'stacks.txt').exists()


@pytest.mark.parametrize('settings, words', [
    ({'seconds': -1.0}, 'watchdog.seconds=-1.0 must be a finite number, at least 0'),
    ({'seconds': 0.0, 'abort': True}, 'watchdog.abort needs watchdog.seconds above 0')])
def test_settings_of_a_watchdog_that_cannot_be_are_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    WatchdogConfig(**settings)
