"""Run directories written by hand, with accuracies in closed form, to read back and report on."""

import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from research.run_dir import RunDir

N_SEEDS = 4


def plateaus(steps, corners):
  """Returns the piecewise-linear curve through (step, accuracy) corners."""
  return np.interp(steps, *zip(*corners))


def write_items(run_dir: RunDir, families: dict[str, bool], n_per_context: int,
                n_seeds: int = N_SEEDS) -> None:
  """Writes items.parquet: `n_per_context` items in each of `n_seeds` contexts of every family."""
  rows = []
  for family, is_control in families.items():
    for seed in range(n_seeds):
      for i in range(n_per_context):
        rows.append({
            'item': len(rows), 'item_id': f'{family}-{seed}-{i}', 'family': family,
            'dataset': f'{family}_words', 'seed': seed, 'variant': '', 'is_control': is_control,
            'prompt': f'question one ? answer two .\nquestion {i} <b>&</b> ? answer',
            'generalizing': f' right{i}', 'shortcut': f' wrong{i}', 'n_prompt_tokens': 9,
            'straddles': False})
  table = pa.Table.from_pylist(rows)
  for name in ('item', 'seed', 'n_prompt_tokens'):
    at = table.schema.get_field_index(name)
    table = table.set_column(at, name, table[name].cast(pa.int32()))
  run_dir.monitor_items.parent.mkdir(parents=True, exist_ok=True)
  pq.write_table(table, run_dir.monitor_items)


def write_scores(run_dir: RunDir, steps, accuracy: dict[str, np.ndarray], n_per_context: int,
                 n_seeds: int = N_SEEDS) -> None:
  """Writes one score file per step; the first round(accuracy * n) items of a context are right.

  accuracy holds arrays [T] (all contexts alike) or [T, seeds]. Right items get probabilities
  0.9 and 0.1, wrong ones 0.1 and 0.9, so the margin is 1.6 * accuracy - 0.8.
  """
  run_dir.monitor_scores.mkdir(parents=True, exist_ok=True)
  ranks = np.arange(n_per_context)
  for t, step in enumerate(steps):
    right = np.concatenate([
        ranks < round(float(np.broadcast_to(curve[t], n_seeds)[seed]) * n_per_context)
        for curve in accuracy.values() for seed in range(n_seeds)])
    n = len(right)
    pq.write_table(pa.table({
        'step': pa.array(np.full(n, step), pa.int64()), 'item': pa.array(range(n), pa.int32()),
        'logp_generalizing': pa.array(np.log(np.where(right, .9, .1)), pa.float32()),
        'logp_shortcut': pa.array(np.log(np.where(right, .1, .9)), pa.float32()),
    }), run_dir.monitor_scores / f'step-{step:08d}.parquet')


def write_records(run_dir: RunDir, n_steps: int, last_step: int, name: str = 'synthetic',
                  seed: int = 0) -> None:
  """Writes config, manifest and the logs of a run that has reached `last_step`."""
  run_dir.path.mkdir(parents=True, exist_ok=True)
  config = {
      'name': name, 'seed': seed, 'n_steps': n_steps,
      'model': {'n_layers': 2, 'd_model': 64, 'n_heads': 4, 'n_kv_heads': 2,
                'context_length': 64, 'vocab_size': 700, 'compute_dtype': 'float32'},
      'data': {'kind': 'microworld', 'batch_size': 48, 'sequence_length': 64},
      'optimizer': {'name': 'adamw', 'peak_lr': 0.002, 'schedule': 'constant'}}
  start = {
      'time': '2026-01-02T03:04:05+0000', 'from_step': 0, 'commit': '0123456789abcdef0123',
      'command': ['launchers/pretrain.py', '--experiment=quickstart'],
      'diff': '-a\n+b', 'changes': {},
      'machine': {'python': '3.11.7', 'packages': {'jax': '0.10.2'}, 'platform': 'cpu',
                  'device_kind': 'cpu', 'n_devices': 1, 'cpu': 'A CPU', 'threads': 2}}
  manifest = {
      'experiment': name, 'starts': [start], 'hashes': {'data': 'd' * 64, 'tokenizer': 't' * 64},
      'parent': {'run_dir': '', 'step': -1}, 'mesh': {'data': 1, 'fsdp': 1},
      'model': {'parameters': 182_000, 'active_parameters': 182_000, 'flops_per_token': 1.1e6}}
  run_dir.config_json.write_text(json.dumps(config))
  run_dir.manifest_json.write_text(json.dumps(manifest))
  noise = np.random.default_rng(seed)
  metrics, evals, timings = [], [], []
  for step in range(1, last_step + 1):
    loss = 1.2 + 5 * np.exp(-step / 150)
    metrics.append({
        'step': step, 'tokens': step * 3072, 'loss': loss + 0.05 * noise.normal(),
        'cross_entropy': loss, 'z_loss': 0.0, 'skipped': 0.0,
        'grad_norm': 0.5 + 3 * np.exp(-step / 80) + 0.05 * noise.random(),
        'learning_rate': 2e-3 * min(1, step / 50)})
    timings.append({
        'step': step, 'seconds': 0.08, 'tokens_per_second': 38_000 + 900 * noise.normal(),
        'mfu': 0.41, 'monitor_seconds': 0.008, 'save_seconds': 0.002})
    if step % 100 == 0:
      evals.append({'step': step, 'heldout_loss': loss + 0.1, 'bits_per_byte': loss / 3})
  for path, rows in ((run_dir.metrics_jsonl, metrics), (run_dir.evals_jsonl, evals),
                     (run_dir.timings_jsonl, timings)):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


HOPPING = [  # (step, accuracy): three sudden changes, between two snapshots
    (0, .1), (680, .1), (700, .9), (1080, .9), (1100, .1), (1480, .1), (1500, .9), (2000, .9)]
RISING = [(0, .5), (60, .02), (240, .02), (1200, 1), (2000, 1)]
PARROT = [(0, .5), (60, .1), (2000, .15)]
CALM = [(0, .3), (160, .99), (2000, .99)]


def hopping_run(path: pathlib.Path, *, controls: bool = True, last_step: int = 2000,
                every: int = 20, seed: int = 0) -> RunDir:
  """Returns a run of 2,000 steps whose Successive dataset hops up, down and up again."""
  run_dir = RunDir(path)
  steps = np.arange(every, last_step + 1, every)
  spread_C = np.array([-.06, -.02, .02, .06])
  curves = {'successive': HOPPING, 'flipped': RISING, 'truthy': PARROT}
  families = dict.fromkeys(curves, False)
  accuracy = {
      name: np.clip(plateaus(steps, corners)[:, None] + spread_C, 0, 1)
      for name, corners in curves.items()}
  if controls:
    families |= {'sums': True, 'sentiment': True, 'opposites': True}
    accuracy |= {name: plateaus(steps, CALM) for name in ('sums', 'sentiment', 'opposites')}
  write_records(run_dir, 2000, last_step, seed=seed)
  write_items(run_dir, families, 100)
  write_scores(run_dir, steps, accuracy, 100)
  return run_dir
