"""A run with experts on two devices from end to end: their loads reach every record."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from research.run_dir import RunDir

ROOT = pathlib.Path(__file__).resolve().parents[2]
SETTINGS = {
    'n_steps': 3, 'model.n_layers': 1, 'model.moe.n_experts': 4, 'model.moe.d_expert': 16,
    'data.batch_size': 4, 'mesh.data': 1, 'mesh.expert': 2, 'monitors.suite': 'none',
    'checkpoints.every': 3, 'checkpoints.snapshot_every': 0, 'evals.every': 0}


@pytest.mark.slow
def test_loads_reach_metrics_tensorboard_and_report(tmp_path):
  ended = subprocess.run(
      [sys.executable, '-m', 'launchers.pretrain', '--experiment=quickstart',
       f'--run_dir={tmp_path}', *[f'--config.{name}={value}' for name, value in SETTINGS.items()]],
      cwd=ROOT, text=True, capture_output=True, check=False,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu',
           'XLA_FLAGS': '--xla_force_host_platform_device_count=2'})
  assert ended.returncode == 0, ended.stderr
  assert 'experts: blocks (' in ended.stdout
  run_dir = RunDir(tmp_path)
  rows = [json.loads(line) for line in run_dir.metrics_jsonl.read_text().splitlines()]
  assert len(rows) == 3
  for row in rows:
    assert 1 <= row['expert_max_load'] <= 2  # two of four experts per token: a share of at most half
    assert row['expert_dropped'] == 0 and row['expert_rounds'] >= 1
  assert json.loads(run_dir.manifest_json.read_text())['numerics']['expert_product'] == 'blocks'
  events = b''.join(path.read_bytes() for path in run_dir.tensorboard.iterdir())
  report = run_dir.report_html.read_text(encoding='utf-8')
  for name in ('expert_max_load', 'expert_dropped', 'expert_rounds'):
    assert f'/{name}'.encode() in events
  for label in ('Fullest expert', 'Dropped choices', 'Exchanges per layer'):
    assert label in report
