"""Replays, bisection and counterfactuals of a tiny run whose text switches at known steps.

The witness is another run of the same config, which training itself scored at every step.
"""

import dataclasses
import json
import shutil
import types

import jax
import numpy as np
import pandas as pd
import pytest

from parallelism.mesh import MeshConfig, make_mesh
from research import build as build_lib
from research.data.edits import parse_edit
from research.dynamics import bisect as bisect_lib
from research.dynamics import verify
from research.dynamics.audit_location import audit_location
from research.dynamics.counterfactual import as_csv, compare, counterfactual
from research.dynamics.curves import read_curves
from research.dynamics.original import open_original
from research.dynamics.replay import replay
from research.dynamics.verify import ReplayError
from research.errors import UserError
from research.monitors import table
from research.monitors.scoring import Scores
from research.reports.comparison import write_comparison
from research.run_dir import RunDir
from research.training import hashes
from research.training.checkpoints import Checkpoints
from research.training.logs import read_rows
from research.training.loop import train
from research.training.snapshots import SnapshotReader
from tests.research.replay_runs import N_STEPS, SWITCHES, content, monitor, switching_run

DENSE = [('checkpoints.snapshot_every', '1')]
pytestmark = pytest.mark.usefixtures('compilation_cache')


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
  """(the run, the same run with a snapshot of every step)."""
  folder = tmp_path_factory.mktemp('runs')
  config = switching_run(folder)
  dense = dataclasses.replace(config.checkpoints, snapshot_every=1)
  train(config, RunDir(folder / 'run'))
  train(dataclasses.replace(config, checkpoints=dense), RunDir(folder / 'witness'))
  return RunDir(folder / 'run'), RunDir(folder / 'witness')


def original_of(run_dir: RunDir):
  return open_original(str(run_dir.whole))


def copy_of(run_dir: RunDir, path, *without: str):
  shutil.copytree(run_dir.whole, path, ignore=shutil.ignore_patterns(*without))
  return open_original(str(path))


def same_snapshots(run_dir: RunDir, witness: RunDir, steps) -> bool:
  """Whether both hold the same bits and scores at these steps."""
  readers = [SnapshotReader(run.snapshots) for run in (run_dir, witness)]
  names = [path.name for path in run_dir.snapshots.iterdir() if path.is_dir()]
  assert len(names) > 5
  for step in steps:
    for name in names:
      a, b = (reader.leaf(step, name).read().result() for reader in readers)
      if a.dtype != b.dtype or a.tobytes() != b.tobytes():
        return False
    scores = [table.read_scores(run.monitor_scores / table.scores_name(step))[1]
              for run in (run_dir, witness)]
    if any(a.tobytes() != b.tobytes() for a, b in zip(*scores, strict=True)):
      return False
  return True


def test_forty_steps_again_are_the_same_bits(runs, tmp_path):
  run_dir, witness = runs
  before = content(run_dir.whole)
  again = RunDir(tmp_path / 'replay')
  said = replay(original_of(run_dir), again, (21, 61), DENSE)
  assert said == (f'equal to {run_dir.whole} bit for bit: 41 rows of metrics, 5 rows of held-out '
                  'loss, 7 snapshots, 4 checkpoints, 7 tables of scores')
  assert content(run_dir.whole) == before
  assert SnapshotReader(again.snapshots).steps == list(range(21, 62))
  assert same_snapshots(again, witness, range(21, 62))
  assert audit_location(str(again.path))[0] == []
  assert read_rows(again.metrics_jsonl) == [
      row for row in read_rows(witness.metrics_jsonl) if 20 < row['step'] <= 61]
  manifest = json.loads(again.manifest_json.read_text())
  assert manifest['parent'] == {'run_dir': str(run_dir.whole.resolve()), 'step': 20}
  assert manifest['replay'] == {'of': str(run_dir.whole.resolve()), 'steps': [21, 61], 'edits': []}
  assert manifest['differs'] == ['checkpoints.snapshot_every: 6 -> 1']
  assert again.report_html.exists()
  with pytest.raises(UserError, match='holds a replay of steps 21 to 61 of .*, not a run of its own'):
    train(open_original(str(again.whole)).config, RunDir(again.whole))
  # Optimizer, average, key and data position at the end are those of the witness's own checkpoint.
  config = open_original(str(again.whole)).config
  built = build_lib.build(config, make_mesh(config.mesh), manifest['numerics'])
  pair = [Checkpoints(run.checkpoints) for run in (again, witness)]
  (state, position), (other, other_position) = (
      checkpoints.restore(60, built.abstract_state) for checkpoints in pair)
  assert position == other_position and jax.tree.leaves(state.ema)
  for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
  for checkpoints in pair:
    checkpoints.close()


def test_a_run_resumed_before_snapshots_that_it_had_made(runs, tmp_path):
  """A kill long after the last checkpoint: the snapshots since then are made and scored again."""
  _, witness = runs
  killed = copy_of(witness, tmp_path / 'killed')
  killed.run_dir.done.unlink()
  for step in killed.checkpoint_steps:
    if step > 50:
      shutil.rmtree(killed.run_dir.checkpoints / str(step))
  train(killed.config, RunDir(killed.run_dir.whole))
  assert same_snapshots(killed.run_dir, witness, range(N_STEPS + 1))
  assert read_rows(killed.run_dir.metrics_jsonl) == read_rows(witness.metrics_jsonl)


def test_bits_do_not_depend_on_the_state_that_a_replay_starts_from(runs, tmp_path):
  run_dir, witness = runs
  bare = copy_of(run_dir, tmp_path / 'bare', 'checkpoints')
  again = RunDir(tmp_path / 'replay')
  said = replay(bare, again, (11, 13), DENSE)
  assert said.startswith('equal') and '13 rows of metrics' in said
  assert said.endswith('; no full state (checkpoint) lay in the range to compare')
  assert same_snapshots(again, witness, (11, 12, 13))
  # A finished replay is reported, another one is not put over it.
  assert replay(bare, again, (11, 13), DENSE) == said
  with pytest.raises(UserError, match='holds a replay of steps 11 to 13 .*, not a replay of steps'):
    replay(bare, again, (11, 14), DENSE)


def test_a_difference_is_an_error_that_names_step_and_leaf(runs, tmp_path):
  broken = copy_of(runs[0], tmp_path / 'broken')
  rows = read_rows(broken.run_dir.metrics_jsonl)
  wrong = [{**row, 'loss': row['loss'] + (row['step'] == 23) * 1e-6} for row in rows]
  broken.run_dir.metrics_jsonl.write_text(''.join(json.dumps(row) + '\n' for row in wrong))
  with pytest.raises(ReplayError, match='^step 23: loss of the metrics differs from .* 1e-06'):
    replay(original_of(broken.run_dir), RunDir(tmp_path / 'a'), (22, 24))

  broken.run_dir.metrics_jsonl.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  name = sorted(path.name for path in broken.run_dir.snapshots.iterdir() if path.is_dir())[0]
  leaf = SnapshotReader(broken.run_dir.snapshots).leaf(24, name)
  values = leaf.read().result()
  leaf.write(values + np.float32(0.5)).result()
  commits = broken.run_dir.snapshots / 'commits.jsonl'
  lines = read_rows(commits)
  for line in lines:
    if line['step'] == 24:
      line['tensors'][name] = hashes.digest(values + np.float32(0.5))
  commits.write_text(''.join(json.dumps(line) + '\n' for line in lines))
  with pytest.raises(ReplayError, match=f'^step 24: {name} of the snapshot differs .* 0.5 '):
    replay(original_of(broken.run_dir), RunDir(tmp_path / 'b'), (22, 24))

  # Of another machine the same difference is stated, and the replay goes on.
  at_home = broken.run_dir.manifest_json.read_text()
  manifest = json.loads(at_home)
  manifest['starts'][0]['machine']['threads'] = 99
  broken.run_dir.manifest_json.write_text(json.dumps(manifest))
  said = replay(original_of(broken.run_dir), RunDir(tmp_path / 'c'), (22, 24))
  assert 'different: 1 snapshot, the first at step 24' in said and f'most in {name} (0.5)' in said
  assert 'what is not the same: threads: 99 -> ' in said
  # What a replay found at its start holds when it is reported or resumed at home.
  broken.run_dir.manifest_json.write_text(at_home)
  again = RunDir(tmp_path / 'c')
  assert replay(original_of(broken.run_dir), again, (22, 24)) == said
  shutil.rmtree(again.checkpoints)
  again.done.unlink()
  assert replay(original_of(broken.run_dir), again, (22, 24)) == said


def test_damage_in_the_original_is_named_as_such(runs, tmp_path, capsys):
  broken = copy_of(runs[0], tmp_path / 'broken').run_dir
  name = sorted(path.name for path in broken.snapshots.iterdir() if path.is_dir())[0]
  leaf = SnapshotReader(broken.snapshots).leaf(24, name)
  leaf.write(leaf.read().result() + np.float32(0.5)).result()
  for step in (20, 30):
    file = max((file for file in (broken.checkpoints / str(step) / 'params').rglob('*')
                if file.is_file()), key=lambda file: file.stat().st_size)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
  again = RunDir(tmp_path / 'again')
  said = replay(original_of(broken), again, (22, 31))
  assert 'the checkpoint of step 20 is damaged, an earlier state is used' in capsys.readouterr().out
  assert json.loads(again.manifest_json.read_text())['parent']['step'] == 10
  assert said.startswith('equal to') and '21 rows of metrics' in said
  assert f'{name} of step 24 does not have the content that was saved' in said
  assert f'damaged in the original: {broken.checkpoints}/30: params.' in said
  assert 'no full state (checkpoint) lay in the range' in said


def test_gaps_that_are_no_numbers_do_not_show_as_zero(tmp_path):
  then = {'a': np.array([np.nan, np.inf, 1]), 'b': np.ones(2), 'c': np.ones(3, np.float32)}
  now = {'a': np.array([np.nan, np.inf, 3]), 'b': np.array([np.nan, 1]), 'c': then['c']}
  found = verify.differences(then, now)
  assert set(found) == {'a', 'b'} and found['a'] == 2 and np.isnan(found['b'])
  run_dir = RunDir(tmp_path)
  rows = [{'step': step, 'what': 'metrics', 'different': {'loss': gap, 'accuracy': 0.25}}
          for step, gap in ((1, 0.5), (2, np.nan), (3, 0.5))]
  run_dir.verified_jsonl.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  said = verify.verdict(run_dir, 'it', ['cpu: a -> b'])
  assert 'loss by up to nan, most in loss (nan)' in said


def changes_of(readings, state) -> list[tuple[int, int]]:
  """Adjacent pairs of different states, from a list of (step, value)."""
  return [(a, b) for (a, x), (b, y) in zip(readings, readings[1:]) if state(x) != state(y)]


@pytest.fixture(scope='module')
def scored(runs):
  """Accuracy and margin at every step, as training scored the witness."""
  curves = read_curves(runs[1].monitor_items, runs[1].monitor_scores)
  assert curves.steps.tolist() == list(range(N_STEPS + 1))
  return curves.accuracy_TC.mean(1), curves.margin_TC.mean(1)


def test_bisect_finds_what_exhaustive_scoring_finds(runs, scored, tmp_path, capsys):
  run_dir, _ = runs
  accuracy, margin = scored
  first, last = SWITCHES[0], SWITCHES[1] - 1
  expected = changes_of([(s, accuracy[s]) for s in range(first, last + 1)], lambda x: x > 0.5)
  assert len(expected) % 2 == 1, 'the planted switch is not seen by the monitor'
  again = RunDir(tmp_path / 'bisect')
  result = bisect_lib.bisect(original_of(run_dir), again, (first, last), 'letters',
                             bisect_lib.above())
  assert result.found in result.changes and list(result.changes) == expected
  for reading in result.readings:
    assert reading.accuracy == pytest.approx(accuracy[reading.step], abs=1e-9)
    assert reading.margin == pytest.approx(margin[reading.step], abs=1e-6)
  saved = json.loads(again.bisection_json('letters accuracy > 0.5').read_text())
  assert tuple(saved['found']) == result.found and saved['state'] == 'accuracy > 0.5'
  documents = pd.read_parquet(again.documents_parquet('letters accuracy > 0.5'))
  assert set(documents['step']) == {result.found[1]}
  assert all(kind.endswith('zed.txt') for kind in documents['kind'])  # After the planted switch.

  # A threshold that the margin crosses several times: all changes are listed.
  inside = margin[first:last + 1]
  thresholds = [t for t in (inside[1:] + inside[:-1]) / 2 if len(changes_of(
      list(enumerate(inside)), lambda x, t=t: x > t)) in (3, 5, 7)]
  assert thresholds, 'the margin moves one way only, choose another run'
  rows = again.metrics_jsonl.stat().st_mtime_ns
  several = bisect_lib.bisect(original_of(run_dir), again, (first, last), 'copying',
                              bisect_lib.above('margin', float(thresholds[0])))
  expected = changes_of([(s, margin[s]) for s in range(first, last + 1)],
                        lambda x: x > thresholds[0])
  assert list(several.changes) == expected and several.found in several.changes
  assert f'changes {len(expected)} times' in str(several)
  # The answer before it is still there, and nothing was trained again.
  assert json.loads(again.bisection_json('letters accuracy > 0.5').read_text()) == saved
  assert len(list(again.whole.glob('bisection-*.json'))) == 2
  assert again.metrics_jsonl.stat().st_mtime_ns == rows


def test_a_question_names_files_without_folders(tmp_path):
  path = RunDir(tmp_path).bisection_json('control: a/b margin > 0.1')
  assert path.parent == tmp_path and path.name == 'bisection-control:_a_b_margin-0.1.json'


def test_the_whole_suite_is_scored_and_rows_are_chosen():
  items = [dataclasses.replace(item, dataset='ab'[i % 2]) for i, item in enumerate(monitor())]
  right = np.array([0.0 if item.dataset == 'a' else -9.0 for item in items])  # log-probabilities
  scores = Scores(right, np.full(len(items), -3.0))
  for dataset, accuracy in (('a', 1.0), ('b', 0.0)):
    chosen = bisect_lib.chosen_items(items, dataset)
    assert bisect_lib._read_items(items, chosen, 7, scores).accuracy == accuracy


def test_a_change_within_the_intervals_is_said_to_be_uncertain():
  bounds = {10: (.1, .3), 11: (.2, .6), 12: (.3, .8), 13: (.4, .9), 14: (.6, .9)}
  readings = tuple(bisect_lib.Reading(step, (low + high) / 2, low, high, 0., np.nan, np.nan)
                   for step, (low, high) in bounds.items())
  result = bisect_lib.Bisection('letters', 8, bisect_lib.above(), readings, (11, 12), ((11, 12),))
  assert ('not certain: no 95% interval over demonstration contexts excludes 0.5 at step 11 and 12; '
          'the last before that does is of step 10, the first after of step 14') in str(result)
  sharp = dataclasses.replace(readings[1], accuracy_high=.4), dataclasses.replace(
      readings[2], accuracy_low=.55)
  result = dataclasses.replace(result, readings=(readings[0], *sharp, *readings[3:]))
  assert 'not certain' not in str(result)
  margin = dataclasses.replace(result, state=bisect_lib.above('margin'))  # It has no intervals.
  assert 'at step 11 and 12; the last before that does is of step (none)' in str(margin)


def test_swapping_a_window_with_itself_changes_nothing(runs, tmp_path):
  run_dir, _ = runs
  said, compared = counterfactual(
      original_of(run_dir), RunDir(tmp_path / 'same'), [parse_edit('swap 40:44 40:44')], N_STEPS)
  assert said == (f'equal to {run_dir.whole} bit for bit: 32 rows of metrics, 5 rows of held-out '
                  'loss, 6 snapshots, 4 checkpoints, 6 tables of scores')
  assert {row.name for row in compared} == {'loss', 'heldout_loss', 'copying'}
  assert all(row.gap == 0 and row.largest[1] == 0 for row in compared)


def test_swapping_windows_changes_what_follows_and_nothing_before(runs, tmp_path):
  run_dir, _ = runs
  again, edits = RunDir(tmp_path / 'swapped'), [parse_edit('swap 24:28 34:38')]
  said, compared = counterfactual(original_of(run_dir), again, edits, 60)
  assert said.startswith('equal to') and '4 rows of metrics' in said  # 21 to 24
  then, now = ({row['step']: row for row in read_rows(run.metrics_jsonl)}
               for run in (run_dir, again))
  assert sorted(now) == list(range(21, 61))
  assert all(now[step] == then[step] for step in range(21, 25))
  assert all(now[step]['loss'] != then[step]['loss'] for step in range(25, 61))
  assert all(now[step][name] == then[step][name] for step in now
             for name in ('learning_rate', 'tokens'))
  loss = next(row for row in compared if row.name == 'loss')
  same_batch = [s for s in range(25, 61) if not (24 < s <= 28 or 34 < s <= 38)]
  expected = np.mean([now[s]['loss'] - then[s]['loss'] for s in same_batch])
  assert loss.gap == pytest.approx(expected, rel=1e-9)
  assert loss.steps[loss.after].tolist() == same_batch
  assert 'copying' in as_csv(compared)
  write_comparison(again.comparison_png, compared, edits)
  assert again.comparison_png.read_bytes()[:4] == b'\x89PNG'
  # A replay of the counterfactual is fed the edited data, from its own checkpoints.
  said = replay(open_original(str(again.whole)), RunDir(tmp_path / 'third'), (40, 42))
  assert said.startswith('equal to') and '2 rows of metrics' in said


def test_what_cannot_be_compared_is_said(runs, tmp_path, capsys):
  run_dir, _ = runs
  items = table.read_item_table(run_dir.monitor_items)
  other = copy_of(run_dir, tmp_path / 'other', 'checkpoints', 'snapshots').run_dir
  compared = compare(run_dir, other, 40, [parse_edit('mask 40:50')])
  assert {row.name for row in compared} == {'loss', 'heldout_loss', 'copying'}
  table.write_item_table(other.monitor_items, items[::-1],
                         [types.SimpleNamespace(n_prompt=2, straddles=False)] * len(items))
  compared = compare(run_dir, other, 40, [parse_edit(f'mask 40:{N_STEPS}')])
  assert {row.name for row in compared} == {'heldout_loss'}
  said = capsys.readouterr().out.splitlines()
  assert len(said) == 2 and said[0].startswith('the loss is not compared: no step')
  assert said[1].startswith(f'accuracies are not compared: {run_dir.path} was scored with other')


@pytest.mark.parametrize('call, words', [
    (lambda run, to: replay(run, to, (60, 100)), f'--steps=60:100: .* holds steps 0:{N_STEPS}'),
    (lambda run, to: replay(run, RunDir(run.path / 'inside'), (10, 12)), 'outside it'),
    (lambda run, to: replay(run, to, (10, 12), [('optimizer.peak_lr', '0.5')]),
     'a replay keeps what the run is \\(optimizer.peak_lr=0.03'),
    (lambda run, to: replay(run, to, (10, 12), [('mesh.data', '16')]), 'needs 16 devices'),
    (lambda run, to: bisect_lib.bisect(run, to, (30, 49), 'leters', bisect_lib.above()),
     r'--dataset=leters: .* the nearest is letters \(all: letters\)'),
    (lambda run, to: bisect_lib.bisect(run, to, (30, 90), 'letters', bisect_lib.above()),
     f'--between=30:90: .* holds steps 0:{N_STEPS}'),
    (lambda run, to: bisect_lib.bisect(run, to, (12, 18), 'letters', bisect_lib.above()),
     'in the same state at both ends'),
    (lambda run, to: counterfactual(run, to, [parse_edit('swap 10:14 20:23')], 60),
     'the windows have 4 and 3 steps'),
    (lambda run, to: counterfactual(run, to, [parse_edit('swap 10:14 12:16')], 60),
     'overlap in steps 12:14'),
    (lambda run, to: counterfactual(run, to, [parse_edit('reorder 70:80')], 60),
     f'the run has steps 0:{N_STEPS}, not 70:80'),
    (lambda run, to: counterfactual(run, to, [parse_edit('mask 10:14 zet.txt')], 60),
     "no kind 'zet.txt' in this data; it has .*same.txt"),
    (lambda run, to: counterfactual(run, to, [parse_edit('mask 10:64')], 60), 'but --until=60'),
    (lambda run, to: counterfactual(run, to, [parse_edit('mask 10:64')], 99),
     f'--until=99: the edits begin at step 10, and .* holds steps 0:{N_STEPS}'),
    (lambda run, to: counterfactual(run, to, [], 60), 'at least one --edit'),
])
def test_bad_input_is_one_sentence_before_anything_is_written(runs, tmp_path, call, words):
  with pytest.raises(UserError, match=words) as error:
    call(original_of(runs[0]), RunDir(tmp_path / 'to'))
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'to' / 'manifest.json').exists()


@pytest.mark.slow
def test_a_run_of_four_devices_again_on_four_and_on_one(tmp_path):
  config = switching_run(tmp_path)
  config = dataclasses.replace(config, mesh=MeshConfig(data=2, fsdp=2))
  train(config, RunDir(tmp_path / 'run'))
  run = open_original(str(tmp_path / 'run'))
  said = replay(run, RunDir(tmp_path / 'same'), (21, 31), DENSE)
  assert said.startswith('equal to') and '11 rows of metrics' in said and '1 checkpoint,' in said
  other = RunDir(tmp_path / 'other')
  said = replay(run, other, (21, 31), [('mesh.data', '1'), ('mesh.fsdp', '1')])
  assert said.startswith('compared with') and 'mesh.fsdp: 2 -> 1' in said and "'fsdp': 2" in said
  pairs = [(row['loss'], run.metrics[row['step']]['loss'])
           for row in read_rows(other.metrics_jsonl)]
  assert 0 < max(abs(a - b) for a, b in pairs) < 1e-4  # f32: sums over devices in other orders
  assert json.loads(other.manifest_json.read_text())['mesh']['fsdp'] == 1
