"""Replay, bisection, windows and counterfactuals of a micro-world run, as users type them."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest

from research.dynamics.curves import read_curves
from research.run_dir import RunDir

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = ['--config.n_steps=60', '--config.checkpoints.every=20', '--config.checkpoints.keep=0',
         '--config.checkpoints.snapshot_every=10', '--config.evals.every=20',
         '--config.model.dropout=0.1', '--config.optimizer.ema_decay=0.9',
         '--config.data.microworld.drift_window=6']


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  """One device and a compilation cache shared by all starts."""
  return {**os.environ, 'JAX_PLATFORMS': 'cpu',
          'JAX_COMPILATION_CACHE_DIR': str(tmp_path_factory.mktemp('xla')),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}


@pytest.fixture(scope='module')
def trained(tmp_path_factory, environment) -> RunDir:
  run_dir = RunDir(tmp_path_factory.mktemp('runs') / 'run')
  launch(environment, 'pretrain', '--experiment=quickstart', f'--run_dir={run_dir.whole}', *SMALL)
  return run_dir


def command(launcher: str, *arguments: str) -> list[str]:
  return [sys.executable, '-m', f'launchers.{launcher}', *arguments]


def launch(environment, launcher: str, *arguments: str) -> str:
  result = subprocess.run(command(launcher, *arguments), cwd=ROOT, env=environment, text=True,
                          capture_output=True, check=False)
  assert result.returncode == 0, result.stderr
  return result.stdout


@pytest.mark.slow
def test_a_killed_replay_is_resumed_and_equal(trained, environment):
  arguments = [f'--run_dir={trained.whole}', '--steps=12:55',
               '--config.checkpoints.snapshot_every=1']
  again = RunDir(f'{trained.whole}-replay-12-55')
  process = subprocess.Popen(command('replay', *arguments), cwd=ROOT, env=environment,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  while process.poll() is None:
    if again.metrics_jsonl.exists() and again.metrics_jsonl.read_bytes().count(b'\n') >= 44:
      process.send_signal(signal.SIGKILL)
    time.sleep(0.02)
  assert process.returncode == -signal.SIGKILL, 'the replay ended before it was killed'
  output = launch(environment, 'replay', *arguments)
  assert 'resuming' in output
  # All 55 steps, the evaluations of steps 0, 20 and 40, and snapshots 20 to 50 with their scores.
  assert output.splitlines()[-1] == (
      f'equal to {trained.whole} bit for bit: 55 rows of metrics, 3 rows of held-out loss, '
      '4 snapshots, 2 checkpoints, 4 tables of scores')


@pytest.mark.slow
def test_bisect_and_its_window(trained, environment, tmp_path):
  curves = read_curves(trained.monitor_items, trained.monitor_scores)
  index = [i for i, context in enumerate(curves.contexts) if context.dataset == 'flipped']
  margin = curves.margin_TC[:, index].mean(1)
  threshold = (margin[4] + margin[-1]) / 2  # The ends differ, whatever the monitor does.
  output = launch(environment, 'bisect', f'--run_dir={trained.whole}', '--between=40:60',
                  '--dataset=flipped', '--measure=margin', f'--threshold={threshold}',
                  f'--to={tmp_path}/bisect')
  question = f'flipped margin > {threshold:g}'
  again = RunDir(tmp_path / 'bisect')
  found = json.loads(again.bisection_json(question).read_text())
  a, b = found['found']
  states = {reading['step']: reading['margin'] > threshold for reading in found['readings']}
  assert b == a + 1 and states[a] != states[b] and list(states) == list(range(40, 61))
  assert found['changes'] == [[s, s + 1] for s in range(40, 60) if states[s] != states[s + 1]]
  assert f'changes between steps {a} and {b}' in output
  launch(environment, 'window', f'--run_dir={trained.whole}', f'--steps={a}:{b}',
         f'--to={tmp_path}/window.parquet')
  documents = pd.read_parquet(tmp_path / 'window.parquet')
  assert documents.equals(pd.read_parquet(again.documents_parquet(question)))
  assert (documents['step'] == b).all() and documents['row'].nunique() == 48


@pytest.mark.slow
def test_counterfactual(trained, environment, tmp_path):
  output = launch(environment, 'counterfactual', f'--run_dir={trained.whole}',
                  '--edit=mask 30:34 arithmetic', '--edit=reorder 36:40 5', '--until=45',
                  f'--to={tmp_path}/changed')
  changed = RunDir(tmp_path / 'changed')
  assert '10 rows of metrics' in output and changed.comparison_png.exists()
  table = pd.read_csv(changed.comparison_csv).set_index('quantity')
  assert {'loss', 'heldout_loss', 'successive', 'control: arithmetic'} <= set(table.index)
  assert table.loc['loss', 'gap'] != 0
