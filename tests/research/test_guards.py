"""Steps that must change nothing: judged as NumPy judges, skipped, recorded, stopped at.

Whatever is skipped here is a real spike or a real overflow: a batch of noise after a text that the
model has learned, or a learning rate that throws the parameters away.
"""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import ModelConfig
from parallelism.mesh import MeshConfig
from research.config import ExperimentConfig
from research.data.batches import batch_at, make_source
from research.data.config import DataConfig, TextConfig
from research.errors import DIVERGED, Stopped
from research.run_dir import RunDir
from research.training import guards, logs
from research.training.config import CheckpointConfig, EvalConfig, GuardConfig, OptimizerConfig
from research.training.loop import train
from research.training.snapshots import SnapshotReader


def judged_by_numpy(config, losses, norms):
  """Returns which steps count, by a plain loop over lists in float64."""
  kept_losses, kept_norms, counts = [], [], []
  for loss, norm in zip(losses, norms, strict=True):
    spike = False
    if len(kept_losses) >= config.window and math.isfinite(loss) and math.isfinite(norm):
      for value, kept, floor in ((loss, kept_losses, 0.01), (math.log(norm), kept_norms, 0.1)):
        recent = np.array(kept[-config.window:], np.float64)
        median = np.median(recent)
        scale = max(1.4826 * np.median(np.abs(recent - median)), floor)
        spike |= value > median + config.spike_threshold * scale
    finite = math.isfinite(loss) and math.isfinite(norm)
    counts.append(finite and not spike)
    if finite:
      kept_losses.append(loss)
      kept_norms.append(math.log(norm))
  return counts


def test_a_level_that_lasts_becomes_the_usual_one():
  """After half a window of skipped steps, whatever the level before was."""
  config = GuardConfig(window=16)
  judge = jax.jit(guards.judge, static_argnums=0)
  state, counts = guards.fresh(config), []
  for loss in [1.0] * 20 + [3.0] * 20:
    accept, state, _ = judge(config, state, jnp.float32(loss), jnp.float32(1.0), True, True)
    counts.append(bool(accept))
  assert counts == [True] * 20 + [False] * 8 + [True] * 12


def test_judged_as_by_a_loop_over_lists():
  config = GuardConfig(spike_threshold=8.0, window=11)
  rng = np.random.default_rng(0)
  losses = 3 * np.exp(-np.arange(200) / 80) + 0.05 * rng.standard_normal(200)
  norms = np.exp(0.3 * rng.standard_normal(200))
  losses[[4, 60, 61, 150]] += 5  # The first comes before anything is usual.
  norms[[90, 120]] *= 500
  losses[[30, 31]], norms[170] = np.nan, np.inf
  judge = jax.jit(guards.judge, static_argnums=0)
  state, counts = guards.fresh(config), []
  for loss, norm in zip(losses, norms, strict=True):
    loss, norm = jnp.float32(loss), jnp.float32(norm)
    accept, state, seen = judge(config, state, loss, norm, jnp.isfinite(loss) & jnp.isfinite(norm),
                                True)
    counts.append(bool(accept))
  assert counts == judged_by_numpy(config, losses, norms)
  skipped = [step for step, counted in enumerate(counts) if not counted]
  assert skipped == [30, 31, 60, 61, 90, 120, 150, 170]
  assert (int(state.remembered), int(state.skipped), int(state.in_a_row)) == (197, 8, 0)
  assert float(seen['usual_loss']) == pytest.approx(np.median(losses[188:199]), rel=1e-6)
  assert set(seen) == set(guards.JUDGED_BY)


def test_without_a_threshold_only_what_is_not_finite_is_skipped():
  config = GuardConfig(spike_threshold=0.0, window=3)
  state = guards.fresh(config)
  for loss, counts in ((1, True), (1, True), (1, True), (1e9, True), (math.inf, False)):
    accept, state, _ = guards.judge(config, state, jnp.float32(loss), jnp.float32(1),
                                    jnp.isfinite(loss), True)
    assert bool(accept) == counts


def test_batches_without_a_loss_say_nothing_of_what_is_usual():
  """A masked window longer than the ring: what comes after it is no spike, a spike still is one."""
  config = GuardConfig(spike_threshold=8.0, window=5)
  judge = jax.jit(guards.judge, static_argnums=0)
  state, accepted = guards.fresh(config), []
  steps = [(3.0, 1.0, True)] * 6 + [(0.0, 0.0, False)] * 9 + [(3.0, 1.0, True), (9.0, 1.0, True)]
  for loss, norm, fed in steps:
    accept, state, _ = judge(config, state, jnp.float32(loss), jnp.float32(norm), True, fed)
    accepted.append(bool(accept))
  assert accepted == [True] * 16 + [False]
  assert (int(state.remembered), int(state.skipped)) == (8, 1)
  np.testing.assert_array_equal(state.recent_2R, [[3.0, 3.0, 9.0, 3.0, 3.0], [0.0] * 5])


@pytest.mark.parametrize('settings, words', [
    ({'spike_threshold': -1.0}, 'guards.spike_threshold=-1.0 must be a finite number, at least 0'),
    ({'window': 2}, 'guards.window=2 must be at least 3'),
    ({'stop_after': -1}, 'guards.stop_after=-1 must not be negative')])
def test_settings_that_cannot_be_are_refused(settings, words):
  with pytest.raises(ValueError, match=words):
    GuardConfig(**settings)


N_STEPS, FIRST_BAD, LAST_BAD = 90, 71, 72  # steps as rows of metrics count them


@pytest.fixture
def experiment(tmp_path, quick_compilation):
  """A tiny model that learns a few words by heart; noise comes at two steps."""
  rng = np.random.default_rng(0)
  (tmp_path / 'calm.txt').write_text('the cat sat on the mat. ' * 200)
  (tmp_path / 'noise.txt').write_text(''.join(chr(c) for c in rng.integers(33, 127, 5000)))
  return ExperimentConfig(
      name='guarded', n_steps=N_STEPS, mesh=MeshConfig(data=1),
      model=ModelConfig(vocab_size=320, context_length=32, n_layers=1, d_model=32, n_heads=2,
                        n_kv_heads=2, d_head=16, d_ff=64),
      data=DataConfig(
          kind='text', sequence_length=32, batch_size=4, cache_dir=str(tmp_path / 'cache'),
          text=TextConfig(
              paths=(str(tmp_path / 'calm.txt'), str(tmp_path / 'noise.txt')), tokenizer='bytes',
              heldout_fraction=0.0,
              schedule=((0.0, 1.0, 0.0), (FIRST_BAD - 1.0, 0.0, 1.0), (float(LAST_BAD), 1.0, 0.0)))),
      optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=5, schedule='constant', ema_decay=0.9),
      guards=GuardConfig(window=16),
      checkpoints=CheckpointConfig(every=30, keep=0, snapshot_every=2), evals=EvalConfig(every=0),
      logging=dataclasses.replace(ExperimentConfig().logging, tensorboard=False))


def leaves_of(run_dir: RunDir, step: int) -> dict[str, np.ndarray]:
  reader = SnapshotReader(run_dir.snapshots)
  return {path.name: reader.leaf(step, path.name).read().result()
          for path in run_dir.snapshots.iterdir() if path.is_dir()}


def test_noise_in_the_data_is_skipped_recorded_and_done_with(experiment, tmp_path):
  run_dir = RunDir(tmp_path / 'run')
  train(experiment, run_dir)
  rows = logs.read_rows(run_dir.metrics_jsonl)
  assert [row['step'] for row in rows if row['skipped']] == [FIRST_BAD, LAST_BAD]
  assert rows[-1]['skipped_total'] == 2 and rows[FIRST_BAD - 1]['loss'] > 5 > rows[-1]['loss'] + 4
  # The steps before and after changed the parameters, these did not.
  same = lambda a, b: [np.array_equal(x, y) for x, y in zip(
      leaves_of(run_dir, a).values(), leaves_of(run_dir, b).values(), strict=True)]
  assert all(same(FIRST_BAD - 1, LAST_BAD))
  assert not any(same(FIRST_BAD - 3, FIRST_BAD - 1)) and not any(same(LAST_BAD, LAST_BAD + 2))
  # Schedule and data moved on.
  assert [row['tokens'] for row in rows] == [128 * step for step in range(1, N_STEPS + 1)]
  first, second = logs.read_rows(run_dir.skipped_jsonl)
  assert (first['step'], first['in_a_row'], second['in_a_row']) == (FIRST_BAD, 1, 2)
  assert first['loss'] == rows[FIRST_BAD - 1]['loss']
  calm = [row['loss'] for row in rows[FIRST_BAD - 17:FIRST_BAD - 1]]
  assert first['usual_loss'] == second['usual_loss'] == pytest.approx(np.median(calm))
  assert {document['path'] for document in first['documents']} == {str(tmp_path / 'noise.txt')}
  assert {document['row'] for document in first['documents']} == set(range(4))
  # What was skipped can be made again from the line.
  source = make_source(experiment.data, N_STEPS, tmp_path / 'cache')
  again = batch_at(source, 4, first['step'] - 1)
  text = (tmp_path / 'noise.txt').read_text()
  for document in first['documents']:
    start, end = document['tokens']
    assert source.tokenizer.decode(again['tokens'][document['row']].tolist()) == text[start:end]
  report = run_dir.report_html.read_text(encoding='utf-8')
  assert 'Skipped updates' in report


def test_too_many_in_a_row_stop_the_run_which_goes_on_when_told_to(experiment, tmp_path):
  """A learning rate that overflows: after its first step no loss is finite again."""
  config = dataclasses.replace(
      experiment, n_steps=20, data=dataclasses.replace(
          experiment.data, text=dataclasses.replace(experiment.data.text, schedule=())),
      optimizer=OptimizerConfig(peak_lr=1e30, warmup_steps=0, schedule='constant'),
      guards=GuardConfig(stop_after=5))
  run_dir = RunDir(tmp_path / 'run')
  with pytest.raises(Stopped, match='6 steps in a row were skipped up to step 7') as stop:
    train(config, run_dir)
  assert stop.value.exit_code == DIVERGED and '\n' not in str(stop.value)
  assert 'saved at step 7' in str(stop.value) and '--config.guards.stop_after' in str(stop.value)
  rows = logs.read_rows(run_dir.metrics_jsonl)
  assert [row['skipped'] for row in rows] == [0, 1, 1, 1, 1, 1, 1]
  assert not run_dir.done.exists()
  with pytest.raises(Stopped, match='8 steps in a row were skipped up to step 9'):
    train(config, run_dir)
  train(dataclasses.replace(config, guards=GuardConfig(stop_after=0)), run_dir)
  assert run_dir.done.exists()
  rows = logs.read_rows(run_dir.metrics_jsonl)
  assert [row['step'] for row in rows] == list(range(1, 21)) and rows[-1]['skipped_total'] == 19
  lines = logs.read_rows(run_dir.skipped_jsonl)
  assert [line['step'] for line in lines] == list(range(2, 21))
  changes = [start['changes'] for start in json.loads(run_dir.manifest_json.read_text())['starts']]
  assert changes == [{}, {}, {'guards.stop_after': [5, 0]}]
