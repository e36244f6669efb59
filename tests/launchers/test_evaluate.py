"""Tasks of lm-evaluation-harness from the command line, in a process that never imports torch."""

import os
import subprocess
import sys

import pandas as pd
import pytest

from research.run_dir import RunDir
from research.training.loop import train
from tests.launchers.test_launchers import ROOT, launch
from tests.research.conftest import short_config
from tests.research.harness_tasks_folder import write_choices

# The launcher, and then what it has imported of torch, which may be installed or not.
THEN_TORCH = """
import runpy, sys
try:
  runpy.run_module('launchers.evaluate', run_name='__main__')
finally:
  print('of torch:', [name for name in sys.modules if name.partition('.')[0] == 'torch'])
"""


@pytest.mark.slow
def test_a_task_is_asked_without_torch(tmp_path, quick_compilation):
  run_dir = RunDir(tmp_path / 'run')
  train(short_config(n_steps='4', **{'checkpoints.snapshot_every': '2', 'checkpoints.every': '4'}),
        run_dir)
  write_choices(tmp_path / 'tasks', 'sums', [
      {'q': f'{a} + 1 =', 'choices': [str(a), str(a + 1)], 'gold': 1} for a in range(1, 7)])
  result = subprocess.run(
      [sys.executable, '-c', THEN_TORCH, f'--run_dir={run_dir.path}', '--tasks=sums',
       f'--include_path={tmp_path / "tasks"}', '--steps=2,4', '--limit=5'], cwd=ROOT, text=True,
      capture_output=True, check=False,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'HF_DATASETS_OFFLINE': '1', 'HF_HUB_OFFLINE': '1',
           'HF_DATASETS_CACHE': str(tmp_path / 'cache'),
           'XLA_FLAGS': '--xla_force_host_platform_device_count=8'})
  assert result.returncode == 0, result.stderr
  assert result.stdout.endswith('of torch: []\n')
  assert '[2/2] step 4, sums: acc ' in result.stderr
  table = pd.read_csv(run_dir.evals_csv)
  assert table[['step', 'metric', 'n_samples']].values.tolist() == [
      [2, 'acc', 5], [2, 'acc_norm', 5], [4, 'acc', 5], [4, 'acc_norm', 5]]
  lines = result.stdout.splitlines()
  assert lines[0].split()[:4] == ['step', 'task', 'n_shot', 'metric'] and len(lines) == 7
  for line, row in zip(lines[1:], table.itertuples()):
    assert line.split() == [str(row.step), 'sums', '0', row.metric, 'none', f'{row.value:.4f}',
                            f'{row.stderr:.4f}', '5']


def test_a_bad_flag_is_one_sentence():
  result = launch('evaluate', '--run_dir=runs/none')
  assert result.returncode == 2
  assert result.stderr == ('error: --tasks is empty; name tasks of lm-evaluation-harness, say '
                           '--tasks=arc_easy\n')
