"""Trajectories, averages and paths against NumPy; what is derived can be read and trained on."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from parallelism.mesh import make_mesh
from research import build as build_lib
from research.data import tokenizers
from research.data.batches import batch_at
from research.dynamics import derived, paths
from research.dynamics.audit_location import audit_location
from research.dynamics.series import RowSeries
from research.dynamics.trajectory import open_trajectory
from research.errors import UserError
from research.run_dir import RunDir
from research.training.logs import read_rows
from research.training.stored import DamagedError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_a_run_is_a_trajectory(trained):
  trajectory = open_trajectory(trained.path)
  assert trajectory.steps == list(range(31))
  rows = read_rows(trained.metrics_jsonl)
  assert trajectory.tokens(0) == 0 and trajectory.tokens(7) == rows[6]['tokens']
  name = 'blocks.mlp.gate'
  through_TNDF = trajectory.leaf_through_time(name)
  assert len(through_TNDF) == 31
  for step in (0, 13, 30):
    np.testing.assert_array_equal(through_TNDF[step], trajectory.leaf(step, name))
    file = trajectory.file_of(step, name)
    np.testing.assert_array_equal(
        np.frombuffer(file.read_bytes(), np.float32), through_TNDF[step].ravel())
  np.testing.assert_array_equal(trajectory.leaf_through_time(name, [20, 4]), through_TNDF[[20, 4]])
  assert trajectory.scores().num_rows == 0


def test_parameters_are_placed_and_equal_the_norm_that_training_logged(trained):
  trajectory = open_trajectory(trained.path)
  mesh = make_mesh(trajectory.config.mesh)
  built = build_lib.build(trajectory.config, mesh, trajectory.manifest['numerics'])
  params = trajectory.params(9, built.params)
  for got, like in zip(jax.tree.leaves(params), jax.tree.leaves(built.params), strict=True):
    assert got.sharding == like.sharding and got.dtype == like.dtype
  logged = read_rows(trained.metrics_jsonl)[8]['param_norm']
  assert paths.norms(trajectory, [9])[0] == pytest.approx(logged, rel=1e-5)
  assert set(trajectory.params(9)) == set(trajectory.names)


def test_documents_are_those_of_the_batches(trained):
  trajectory = open_trajectory(trained.path)
  documents = list(trajectory.documents(4, 6))
  assert {document['step'] for document in documents} == {5, 6}
  for row in range(3):
    segments = batch_at(trajectory.source, 8, 4)['segment_ids'][row]
    here = [d for d in documents if (d['step'], d['row']) == (5, row)]
    assert len(here) == len(set(segments[segments > 0].tolist()))


def test_documents_of_a_counterfactual_are_the_edited_ones(short_run):
  manifest = json.loads(short_run.manifest_json.read_text())
  manifest |= {'parent': {'run_dir': '', 'step': 10}, 'replay': {
      'of': '', 'steps': [10, 30], 'edits': ['replace 20:21 4:5', 'mask 21:22']}}
  before = list(open_trajectory(short_run.path).documents(4, 5))
  short_run.manifest_json.write_text(json.dumps(manifest))
  changed = open_trajectory(short_run.path)
  texts = lambda documents: [document['text'] for document in documents]
  assert before and texts(changed.documents(20, 21)) == texts(before)
  assert all(document['masked'] for document in changed.documents(21, 22))


def test_a_changed_tensor_is_not_read_silently(short_run):
  trajectory = open_trajectory(short_run.path)
  file = trajectory.file_of(8, 'final_norm.scale')
  data = bytearray(file.read_bytes())
  data[5] ^= 4
  file.write_bytes(data)
  for read in (lambda: trajectory.leaf(8, 'final_norm.scale'), lambda: trajectory.params(8),
               lambda: trajectory.leaf_through_time('final_norm.scale')):
    with pytest.raises(DamagedError, match=f'{file}: final_norm.scale of step 8'):
      read()
  trajectory.leaf(9, 'final_norm.scale')
  file.unlink()
  with pytest.raises(DamagedError, match='final_norm.scale.*is missing'):
    trajectory.leaf(8, 'final_norm.scale')


@pytest.mark.parametrize('ask, words', [
    (lambda t: t.leaf(31, 'final_norm.scale'), 'no snapshot or checkpoint of step 31.*nearest are 30'),
    (lambda t: t.leaf(3, 'norm'), "no tensor 'norm'"),
    (lambda t: t.documents(28, 31), 'documents=28:31: .* holds steps 0:30'),
    (lambda t: derived.chosen_steps(t, ['3', '99'], 2), '--steps=99.*nearest is 30'),
    (lambda t: derived.chosen_steps(t, ['3', '9', '3'], 2), '--steps names 3 more than once'),
    (lambda t: derived.chosen_steps(t, ['3'], 2), '1 checkpoint is not enough'),
    (lambda t: paths.ema_weights(3, 1.0), '--decay=1.0 must lie')])
def test_bad_requests_are_one_sentence(trained, ask, words):
  with pytest.raises(UserError, match=words):
    ask(open_trajectory(trained.path))


def test_steps_are_taken_in_their_order(trained):
  trajectory = open_trajectory(trained.path)
  assert derived.chosen_steps(trajectory, ['20', '3', '10'], 2) == [3, 10, 20]
  assert derived.chosen_steps(trajectory, [], 3) == [28, 29, 30]


@pytest.mark.parametrize('command, arguments, words', [
    ('interpolate', ['--decay=0.5'], '--decay means nothing to interpolate; it takes --steps, --at'),
    ('average', ['--steps=3,9', '--last=4', '--to=x'], 'give --steps or --last, not both')])
def test_a_flag_that_means_nothing_to_a_command_is_an_error(
    trained, tmp_path, command, arguments, words):
  arguments = [a.replace('--to=x', f'--to={tmp_path}/x') for a in arguments]
  ended = launch('trajectory', command, str(trained.path), *arguments)
  assert ended.returncode == 2 and ended.stderr.count('\n') == 1 and words in ended.stderr


def random_series(n: int = 7) -> tuple[RowSeries, dict[str, np.ndarray]]:
  rng = np.random.default_rng(4)
  rows = {'a': rng.normal(size=(n, 3, 5)).astype(np.float32),
          'b': rng.normal(size=(n, 11)).astype(np.float32)}
  return RowSeries(range(n), rows), rows


def test_averages_are_those_of_their_definitions():
  series, rows = random_series()
  mean = dict(paths.combined(series, [1, 4, 6], paths.uniform_weights(3)))
  np.testing.assert_array_equal(
      mean['a'], rows['a'][[1, 4, 6]].astype(np.float64).mean(0).astype(np.float32))
  average = rows['b'][0].astype(np.float64)
  for x in rows['b'][1:]:
    average = 0.7 * average + 0.3 * x.astype(np.float64)
  ema = dict(paths.combined(series, range(7), paths.ema_weights(7, 0.7)))
  np.testing.assert_allclose(ema['b'], average, rtol=1e-6)
  line = dict(paths.combined(series, [2, 5], paths.line_weights(0.25)))
  np.testing.assert_allclose(line['a'], 0.75 * rows['a'][2] + 0.25 * rows['a'][5], rtol=1e-6)
  for at, step in ((0.0, 2), (1.0, 5)):
    end = dict(paths.combined(series, [2, 5], paths.line_weights(at)))
    np.testing.assert_array_equal(end['b'], rows['b'][step])


def test_distances_are_those_of_numpy_in_any_blocks(monkeypatch):
  series, rows = random_series()
  flat = np.concatenate([rows['a'].reshape(7, -1), rows['b']], 1).astype(np.float64)
  want_TT = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
  for block_bytes in (2**28, 600):
    monkeypatch.setattr(paths, 'BLOCK_BYTES', block_bytes)
    np.testing.assert_allclose(paths.distances(series, range(7)), want_TT, rtol=1e-12, atol=1e-12)
  np.testing.assert_allclose(paths.norms(series, range(7)), np.linalg.norm(flat, axis=1))


def test_a_circle_closes_and_a_line_does_not():
  angle_T = np.linspace(0, 2 * np.pi, 13)[:, None]
  circle = {'x': np.hstack([np.cos(angle_T), np.sin(angle_T)]).astype(np.float32)}
  line = {'x': (1 + np.arange(13)[:, None] * [1.0, 2.0]).astype(np.float32)}
  closures = []
  for rows in (circle, line):
    series = RowSeries(range(13), rows)
    table = paths.cyclic_table(
        series.steps, paths.distances(series, series.steps), paths.norms(series, series.steps))
    assert table.num_rows == 13 * 12 / 2
    by_lag = paths.by_lag(table).to_pydict()
    assert by_lag['lag'] == list(range(1, 13)) and by_lag['pairs'] == list(range(12, 0, -1))
    closures.append(np.array(by_lag['closure_mean']))
  lag = np.arange(1, 13)
  # A chord of k steps over k chords of one.
  want = np.sin(np.pi * lag / 12) / (lag * np.sin(np.pi / 12))
  np.testing.assert_allclose(closures[0], want, atol=1e-6)
  np.testing.assert_allclose(closures[1], 1.0, atol=1e-9)


def test_an_average_is_a_run_directory_that_is_sound(trained, tmp_path_factory, tmp_path,
                                                     monkeypatch):
  run = RunDir(shutil.copytree(trained.path, tmp_path_factory.mktemp('named') / 'run'))
  named = run.path / 'tokenizer_config.json'  # It says which tokens are special.
  named.write_text(json.dumps({'bos_token': tokenizers.PAD}))
  trajectory, target = open_trajectory(run.path), RunDir(tmp_path / 'mean')
  weights = paths.uniform_weights(3)

  def write():
    derived.write_derived(target, trajectory, paths.combined(trajectory, [10, 20, 30], weights),
                          {'steps': [10, 20, 30], 'weights': weights.tolist()})

  def interrupted(*_):
    raise KeyboardInterrupt
  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(derived.Checkpoints, 'save_params', interrupted)
    write()
  assert not target.path.exists() and list(tmp_path.iterdir())
  write()
  assert audit_location(str(target.path))[0] == []
  assert list(tmp_path.iterdir()) == [target.path]
  assert (target.path / named.name).read_text() == named.read_text()
  assert tokenizers.load(target.tokenizer_json).bos_id == 0  # that of PAD
  again = open_trajectory(target.path)
  assert again.steps == [30] and again.manifest['derived']['steps'] == [10, 20, 30]
  want = trajectory.leaf_through_time('blocks.attention.q', [10, 20, 30])
  np.testing.assert_allclose(
      again.leaf(30, 'blocks.attention.q'), want.astype(np.float64).mean(0), rtol=1e-6)
  with pytest.raises(UserError, match='is there already'):
    derived.check_target(target)


def launch(launcher: str, *arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, '-m', f'launchers.{launcher}', *arguments], cwd=ROOT,
                        text=True, capture_output=True, check=False,
                        env={**os.environ, 'JAX_PLATFORMS': 'cpu',
                             'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'})


@pytest.mark.slow
def test_from_training_over_an_average_to_training_again(tmp_path):
  """Average by the launcher, then scored, sampled and trained on by the others."""
  settings = ['--config.n_steps=6', '--config.checkpoints.snapshot_every=2',
              '--config.checkpoints.every=3', '--config.evals.every=0',
              '--config.logging.tensorboard=false']
  run, mean, more = (str(tmp_path / name) for name in ('run', 'mean', 'more'))
  for launcher, *arguments in (
      ('pretrain', f'--run_dir={run}', *settings), ('trajectory', 'audit', run),
      ('trajectory', 'average', run, '--steps=2,4,6', f'--to={mean}'), ('trajectory', 'audit', mean),
      ('score', f'--run_dir={mean}'), ('score', f'--run_dir={mean}'),
      ('sample', f'--run_dir={mean}', '--prompt=3 + 4 =', '--max_tokens=2'),
      ('pretrain', f'--run_dir={more}', f'--config.start.run_dir={mean}', *settings),
      ('trajectory', 'audit', more)):
    ended = launch(launcher, *arguments)
    assert ended.returncode == 0, (launcher, arguments, ended.stderr)
  first, record = open_trajectory(more), json.loads(
      (tmp_path / 'more/checkpoints/3/_CHECKPOINT_METADATA').read_text())['custom_metadata']
  averaged = json.loads(
      (tmp_path / 'mean/checkpoints/6/_CHECKPOINT_METADATA').read_text())['custom_metadata']
  assert record['parent'] == {'run_dir': str(tmp_path / 'mean'), 'step': 6, 'hash': averaged['hash']}
  np.testing.assert_array_equal(first.leaf(0, 'embedding.tokens'),
                                open_trajectory(mean).leaf(6, 'embedding.tokens'))
  assert open_trajectory(run).scores().num_rows == 4 * len(set(
      open_trajectory(run).scores()['item_id'].to_pylist()))
  for step in (2, 6):  # as where scoring was interrupted
    (tmp_path / f'run/monitors/scores/step-{step:08d}.parquet').unlink()
  again = launch('score', f'--run_dir={run}')
  assert again.returncode == 0, again.stderr
  assert [line.split(',')[0] for line in again.stdout.splitlines() if line.startswith('step ')] == [
      'step 2: scored', 'step 6: scored', 'step 0: same bits as in training',
      'step 4: same bits as in training']
  refused = launch('pretrain', f'--run_dir={tmp_path}/x', f'--config.start.run_dir={mean}',
                   '--config.start.optimizer=true', *settings)
  assert refused.returncode == 2 and 'has no optimizer state' in refused.stderr
  (tmp_path / 'run/snapshots/final_norm.scale/c.1.0').unlink()
  found = launch('trajectory', 'audit', run, '--json')
  assert found.returncode == 1
  assert json.loads(found.stdout.splitlines()[0])['tensor'] == 'final_norm.scale'
