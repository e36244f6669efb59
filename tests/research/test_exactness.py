"""A run killed twice and resumed equals an uninterrupted one, bit for bit, in all that it wrote.

The runs are real processes of the real launcher, killed with SIGKILL while they train.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

from experiments import quickstart
from parallelism.mesh import make_mesh
from research import build as build_lib
from research import overrides
from research.data import tokenizers
from research.monitors import table, watch
from research.run_dir import RunDir
from research.training import logs
from research.training.checkpoints import Checkpoints
from research.training.snapshots import SnapshotReader

ROOT = pathlib.Path(__file__).resolve().parents[2]
N_STEPS = 40
OVERRIDES = {
    'n_steps': str(N_STEPS), 'checkpoints.every': '10', 'checkpoints.snapshot_every': '4',
    'evals.every': '8', 'model.dropout': '0.1', 'optimizer.ema_decay': '0.9',
    'data.microworld.drift_window': '6'}


def command(run_dir: pathlib.Path, **more: str) -> list[str]:
  settings = [f'--config.{name}={text}' for name, text in {**OVERRIDES, **more}.items()]
  return [sys.executable, '-m', 'launchers.pretrain', '--experiment=quickstart',
          f'--run_dir={run_dir}', *settings]


@pytest.fixture(scope='module')
def environment(tmp_path_factory):
  """One device and a compilation cache shared by all starts."""
  cache = str(tmp_path_factory.mktemp('xla'))
  return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': cache,
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}


def run(run_dir: pathlib.Path, environment, **more: str) -> subprocess.CompletedProcess:
  return subprocess.run(command(run_dir, **more), cwd=ROOT, env=environment, text=True,
                        capture_output=True, check=False)


def kill_after(run_dir: pathlib.Path, n_rows: int, environment) -> None:
  """Starts the run and kills it once it has written n_rows metric rows."""
  process = subprocess.Popen(command(run_dir), cwd=ROOT, env=environment,
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  metrics = RunDir(run_dir).metrics_jsonl
  while process.poll() is None:
    if metrics.exists() and metrics.read_bytes().count(b'\n') >= n_rows:
      process.send_signal(signal.SIGKILL)
    time.sleep(0.02)
  assert process.returncode == -signal.SIGKILL, 'the run ended before it was killed'


@pytest.fixture(scope='module')
def pair(tmp_path_factory, environment):
  """(uninterrupted run, run killed at two moments and resumed)."""
  whole, killed = tmp_path_factory.mktemp('whole'), tmp_path_factory.mktemp('killed')
  finished = run(whole, environment)
  assert finished.returncode == 0, finished.stderr
  assert finished.stdout.strip().splitlines()[-1] == f'report: {whole / "report.html"}'
  # At both moments a snapshot that was committed after the last checkpoint has to be forgotten.
  kill_after(killed, 17, environment)
  kill_after(killed, 29, environment)
  resumed = run(killed, environment)
  assert resumed.returncode == 0, resumed.stderr
  assert 'resuming' in resumed.stdout
  return RunDir(whole), RunDir(killed)


def built_for(run_dir: RunDir):
  config = overrides.apply(quickstart.get_config(),
                           [*OVERRIDES.items(), ('mesh.data', '1')])
  manifest = json.loads(run_dir.manifest_json.read_text())
  built = build_lib.build(config, make_mesh(config.mesh, jax.devices()[:1]), manifest['numerics'])
  return config, manifest, built


def assert_same_bits(a, b):
  for (path, x), y in zip(jax.tree.leaves_with_path(a), jax.tree.leaves(b), strict=True):
    x, y = np.asarray(x), np.asarray(y)
    assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), path


@pytest.mark.slow
def test_state_and_data_position(pair):
  whole, killed = (Checkpoints(run_dir.checkpoints) for run_dir in pair)
  _, _, built = built_for(pair[0])
  assert whole.steps == killed.steps and whole.steps[-1] == N_STEPS
  for step in whole.steps:
    (state, position), (other, other_position) = (
        checkpoints.restore(step, built.abstract_state) for checkpoints in (whole, killed))
    assert position == other_position and position['step'] == step
    assert int(state.step) == step and jax.tree.leaves(state.ema)
    assert_same_bits(state, other)
  whole.close()
  killed.close()


@pytest.mark.slow
def test_rows_one_per_step(pair):
  for name in ('metrics_jsonl', 'evals_jsonl'):
    rows, others = (logs.read_rows(getattr(run_dir, name)) for run_dir in pair)
    assert rows == others, name
  metrics = logs.read_rows(pair[1].metrics_jsonl)
  assert [row['step'] for row in metrics] == list(range(1, N_STEPS + 1))
  timings = logs.read_rows(pair[1].timings_jsonl)
  assert [row['step'] for row in timings] == list(range(1, N_STEPS + 1))


@pytest.mark.slow
def test_snapshots_and_scores(pair):
  _, _, built = built_for(pair[0])
  whole, killed = (SnapshotReader(run_dir.snapshots) for run_dir in pair)
  assert whole.steps == killed.steps == list(range(0, N_STEPS + 1, 4))
  for step in whole.steps:
    assert_same_bits(whole.params(step, built.params), killed.params(step, built.params))
    tables = [pq.read_table(run_dir.monitor_scores / table.scores_name(step)) for run_dir in pair]
    assert tables[0].equals(tables[1])
  assert table.score_steps(pair[1].monitor_scores) == killed.steps


@pytest.mark.slow
def test_scores_computed_again_from_snapshots_are_the_same_bits(pair):
  config, manifest, built = built_for(pair[0])
  tokenizer = tokenizers.load(pair[0].tokenizer_json)
  again = watch.rescore(config, tokenizer, manifest['start_id'], built, pair[0], [0, 20, N_STEPS])
  for step, scores in again:
    _, stored = table.read_scores(watch.scored_path(pair[0], step))
    assert_same_bits(tuple(scores), tuple(stored))


@pytest.mark.slow
def test_manifest_and_finished_run(pair, environment):
  manifest = json.loads(pair[1].manifest_json.read_text())
  # A kill at row 13 finds the checkpoint of step 10 whole, or still being written.
  assert len(manifest['starts']) == 3 and manifest['starts'][1]['from_step'] in (0, 10)
  machine = manifest['starts'][-1]['machine']
  assert machine['threads'] and machine['packages']['jax'] and 'xla_flags' in machine
  again = run(pair[1].path, environment)
  assert again.returncode == 0 and str(pair[1].report_html) in again.stdout


@pytest.mark.slow
def test_changed_identity_is_refused_and_changed_placement_recorded(pair, environment, tmp_path):
  refused = run(pair[1].path, environment, **{'optimizer.peak_lr': '0.5'})
  assert refused.returncode == 2 and 'optimizer.peak_lr=0.002' in refused.stderr
  assert len(refused.stderr.strip().splitlines()) == 1, refused.stderr
  kill_after(tmp_path / 'run', 13, environment)
  more = run(tmp_path / 'run', environment, **{'checkpoints.snapshot_every': '5'})
  assert more.returncode == 0, more.stderr
  start = json.loads(RunDir(tmp_path / 'run').manifest_json.read_text())['starts'][-1]
  assert start['changes'] == {'checkpoints.snapshot_every': [4, 5]}
  assert set(SnapshotReader(RunDir(tmp_path / 'run').snapshots).steps) >= {0, 15, 20, 35, 40}
