"""A run on text files from end to end, and a run that starts from its checkpoint."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pandas as pd
import pytest

from parallelism.mesh import make_mesh
from research import build as build_lib
from research import config as config_lib
from research.run_dir import RunDir
from research.training.checkpoints import Checkpoints

ROOT = pathlib.Path(__file__).resolve().parents[2]
TEXT = ('The wind moved over the grass. A bird sang, and then it was quiet again. '
        'Nobody had told the children where the road would end. ')


def pretrain(run_dir: pathlib.Path, cache: pathlib.Path, **settings) -> str:
  sizes = {'model.n_layers': 1, 'model.d_model': 32, 'model.n_heads': 2, 'model.n_kv_heads': 2,
           'model.d_head': 16, 'model.d_ff': 48, 'data.sequence_length': 64, 'model.context_length': 320,
           'data.batch_size': 4, 'checkpoints.every': 4, 'checkpoints.snapshot_every': 4,
           'evals.every': 4, 'evals.n_batches': 1, 'data.cache_dir': cache}
  result = subprocess.run(
      [sys.executable, '-m', 'launchers.pretrain', '--experiment=text_bytes',
       f'--run_dir={run_dir}', *[f'--config.{k}={v}' for k, v in {**sizes, **settings}.items()]],
      cwd=ROOT, env={**os.environ, 'JAX_PLATFORMS': 'cpu'}, text=True, capture_output=True,
      check=False)
  assert result.returncode == 0, result.stderr
  return result.stdout


def params_of(run_dir: RunDir, step: int):
  config = config_lib.from_json(run_dir.config_json.read_text())
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  built = build_lib.build(config, mesh, build_lib.resolve_numerics(config, mesh))
  checkpoints = Checkpoints(run_dir.checkpoints)
  params = checkpoints.restore_params(step, built.params)
  checkpoints.close()
  return params


@pytest.mark.slow
def test_text_run_then_a_run_that_starts_from_it(tmp_path):
  for i in range(2):
    (tmp_path / f'{i}.txt').write_text(TEXT * (40 + i))
  paths = f'{tmp_path}/0.txt,{tmp_path}/1.txt'
  first, second = RunDir(tmp_path / 'first'), RunDir(tmp_path / 'second')
  output = pretrain(first.path, tmp_path / 'cache', n_steps=8, **{'data.text.paths': paths})
  assert 'bits per byte' in output and output.strip().endswith('report.html')
  scored = json.loads(first.heldout_text_json.read_text())
  sizes = [len(TEXT) * (40 + i) for i in range(2)]
  assert scored['all']['bytes'] == sum(round(size * 0.1) for size in sizes)
  assert scored['all']['tokens'] == scored['all']['bytes']  # One token per byte, each scored once.
  assert 0 < scored['all']['bits_per_byte'] < 8.5 and scored['all']['xz -9e'] < 1
  # The micro-world's monitors ran on this model with its own tokenizer, and pandas reads them.
  scores = pd.read_parquet(first.monitor_scores)
  items = pd.read_parquet(first.monitor_items)
  assert sorted(scores['step'].unique()) == [0, 4, 8] and len(scores) == 3 * len(items)
  assert np.isfinite(scores['logp_generalizing']).all() and (scores['logp_shortcut'] < 0).all()

  pretrain(second.path, tmp_path / 'cache', n_steps=2,
           **{'data.text.paths': paths, 'start.run_dir': first.path, 'start.step': 4,
              'optimizer.peak_lr': 0.0})
  manifest = json.loads(second.manifest_json.read_text())
  assert manifest['parent'] == {'run_dir': str(first.path.resolve()), 'step': 4}
  # At learning rate zero the second run's parameters are those it started from.
  for old, new in zip(jax.tree.leaves(params_of(first, 4)), jax.tree.leaves(params_of(second, 2)),
                      strict=True):
    np.testing.assert_array_equal(old, new)
