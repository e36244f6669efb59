"""The launcher on eight fake devices: a pipeline with everything else, observed as on one device."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from research.run_dir import RunDir
from research.training import logs

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = ['--config.n_steps=12', '--config.checkpoints.every=6', '--config.evals.every=6',
            '--config.checkpoints.snapshot_every=12', '--config.mesh.data=1',
            '--config.logging.tensorboard=false']
PIPELINE = ['--config.mesh.stage=2', '--config.mesh.fsdp=2', '--config.mesh.tensor=2']


def run(run_dir: pathlib.Path, *more: str) -> str:
  done = subprocess.run(
      [sys.executable, '-m', 'launchers.pretrain', f'--run_dir={run_dir}', *SETTINGS, *more],
      cwd=ROOT, capture_output=True, text=True, timeout=600,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu',
           'XLA_FLAGS': '--xla_force_host_platform_device_count=8'})
  assert done.returncode == 0, done.stderr
  return done.stderr


@pytest.mark.slow
def test_a_run_on_a_pipeline_of_split_stages_is_that_of_one_device(tmp_path):
  errors = run(tmp_path / 'mesh', *PIPELINE)
  assert 'Involuntary full rematerialization' not in errors
  run(tmp_path / 'one')
  for name, key in (('metrics_jsonl', 'loss'), ('evals_jsonl', 'heldout_loss')):
    got, want = ([row[key] for row in logs.read_rows(getattr(RunDir(tmp_path / where), name))]
                 for where in ('mesh', 'one'))
    np.testing.assert_allclose(got, want, rtol=1e-5)
