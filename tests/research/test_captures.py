"""Captures of planted hops: text switches at a known step; margins are read from Parquet."""

import dataclasses
import json
import pathlib
import shutil

import numpy as np
import pandas as pd
import pytest

from parallelism.mesh import MeshConfig
from research import overrides
from research.config import ExperimentConfig
from research.dynamics import captures
from research.dynamics.analysis import analysis_of
from research.errors import Stopped, UserError
from research.monitors.items import write_items
from research.run_dir import RunDir
from research.training.halt import Halt
from research.training.loop import train
from tests.research import synthetic_runs
from tests.research.replay_runs import content, monitor, switching_run

pytestmark = pytest.mark.usefixtures('compilation_cache')
EVERY = 10  # steps between full checkpoints
SNAPSHOT_EVERY = 6
SWITCH = 40  # from this batch on, every letter equals 'y' and no longer 'z'


def planted(folder, seed: int, keep: int = 1) -> ExperimentConfig:
  """Returns a run with a snapshot of every sixth step whose text switches once."""
  config = switching_run(folder)
  same, zed = config.data.text.paths
  pathlib.Path(same).write_text(pathlib.Path(zed).read_text().replace('=z', '=y'))
  items = folder / 'items.jsonl'
  write_items([dataclasses.replace(item, generalizing='y') for item in monitor()], items)
  text = dataclasses.replace(config.data.text, schedule=((0., 0., 1.), (float(SWITCH), 1., 0.)))
  return dataclasses.replace(
      config, n_steps=108, seed=seed, model=dataclasses.replace(config.model, dropout=0.),
      data=dataclasses.replace(config.data, batch_size=16, text=text),
      optimizer=dataclasses.replace(config.optimizer, peak_lr=3e-3, schedule='constant'),
      checkpoints=dataclasses.replace(
          config.checkpoints, every=EVERY, keep=keep, snapshot_every=SNAPSHOT_EVERY),
      monitors=dataclasses.replace(config.monitors, captures=1))


def full_checkpoints(run_dir: RunDir) -> set[int]:
  """Returns the steps whose full checkpoints lie on the disk."""
  return {int(path.name) for path in run_dir.checkpoints.iterdir() if path.name.isdigit()}


def margins_of(folder) -> pd.Series:
  """Returns the mean margin of all items by step, from the score files."""
  frame = pd.concat(map(pd.read_parquet, (folder / 'monitors' / 'scores').iterdir()))
  margin = np.exp(frame.logp_generalizing) - np.exp(frame.logp_shortcut)
  return margin.groupby(frame.step).mean()


def check(run_dir: RunDir, one: captures.Capture) -> None:
  """Asserts that a capture brackets a change of sign to one step, after the text has switched.

  The replay began with the full checkpoint before the bracket, which two snapshots are.
  """
  a, b = one.found
  before, after = one.suspect.before, one.suspect.after
  assert SWITCH <= a and before <= a < b <= after and b == a + 1
  assert after == before + SNAPSHOT_EVERY and before % SNAPSHOT_EVERY == 0
  margin = margins_of(RunDir(one.run_dir).path)
  assert margin[a] < 0 < margin[b] and one.suspect.change > 0
  trained = margins_of(run_dir.path)  # As scored while training ran.
  assert trained[before] == margin[before] < 0 < trained[after] == margin[after]
  assert (trained.loc[after:] > 0).all()
  nearest = before // EVERY * EVERY
  assert nearest in full_checkpoints(run_dir) and one.n_replayed == after - nearest
  assert one.n_replayed < EVERY + SNAPSHOT_EVERY


def test_suspected_hops_are_captured_to_one_step(tmp_path, capsys):
  run_dir = RunDir(tmp_path / 'run')
  train(planted(tmp_path, seed=0), run_dir)
  before = content(run_dir.path)
  done = captures.capture(run_dir, 1)
  assert len(done) == 1 == len(captures.suspects_of(analysis_of(run_dir)))
  check(run_dir, done[0])
  assert len(full_checkpoints(run_dir)) <= 1 + 1 + 1
  said = capsys.readouterr().out
  assert '1 of at most 1 captures' in said and 'not captured' not in said
  assert f'; {done[0].n_replayed} steps made again (' in said
  (stored,) = json.loads(run_dir.captures_json.read_text())
  assert stored['found'] == list(done[0].found)
  assert before == {name: hashed for name, hashed in content(run_dir.path).items()
                    if name != run_dir.captures_json.name}
  assert captures.capture(run_dir, 1) == done  # Nothing is made again, and costs stay.
  assert json.loads(run_dir.captures_json.read_text()) == [stored]
  # A replay of another run of that name is not taken for this one's.
  commits = RunDir(done[0].run_dir).snapshots / 'commits.jsonl'
  (run_dir.captures_json).unlink()
  hashed = json.loads(commits.read_text().splitlines()[0])['tensors']
  commits.write_text(commits.read_text().replace(next(iter(hashed.values())), '0' * 16))
  with pytest.raises(UserError, match='is the replay of another run; remove or rename it'):
    captures.capture(run_dir, 1)


def test_a_run_killed_between_suspicion_and_capture_keeps_what_it_needs(tmp_path, monkeypatch):
  config = planted(tmp_path, seed=0, keep=2)
  whole, killed = RunDir(tmp_path / 'a'), RunDir(tmp_path / 'b')
  train(config, whole)
  (suspect,) = captures.suspects_of(analysis_of(whole))
  # On the new side for two snapshots; a full checkpoint was saved since, and the next is not due.
  end = (suspect.after + SNAPSHOT_EVERY) // EVERY * EVERY + EVERY + 3
  assert suspect.after + SNAPSHOT_EVERY < end < config.n_steps - EVERY
  with monkeypatch.context() as patch:
    patch.setattr(Halt, 'reached', lambda self, step: step == end)
    with pytest.raises(Stopped):
      train(config, killed)
  shutil.rmtree(killed.checkpoints / str(end))  # A kill would not have saved it.
  pinned = suspect.before // EVERY * EVERY
  assert pinned in full_checkpoints(killed) and max(full_checkpoints(killed)) == end - 3
  train(config, killed)
  assert full_checkpoints(killed) == full_checkpoints(whole) == {pinned, 100, 108}
  (one,) = captures.capture(killed, 1)
  assert one.suspect == suspect
  check(killed, one)


def test_a_hop_near_the_center_is_captured_though_nobody_suspected_it(tmp_path, monkeypatch):
  run_dir = synthetic_runs.hopping_run(tmp_path / 'run', every=40)
  monkeypatch.setattr(captures, 'suspects_of', lambda analysis: [])
  found = [one for one, is_confirmed in captures.chosen(run_dir) if is_confirmed]
  assert {(one.dataset, one.before, one.after) for one in found} == {
      ('successive_words', 680, 720), ('successive_words', 1080, 1120),
      ('successive_words', 1480, 1520)}


def test_what_would_take_too_long_is_left_out_and_said(tmp_path, capsys):
  run_dir = synthetic_runs.hopping_run(tmp_path / 'run', every=40)
  config = json.loads(run_dir.config_json.read_text())
  run_dir.config_json.write_text(json.dumps({**config, 'checkpoints': {'every': 600}}))
  assert captures.capture(run_dir, 2) == []
  said = capsys.readouterr().out.splitlines()
  assert said[0] == (
      'not captured: successive_words (a hop) between steps 680 and 720: no full checkpoint less '
      'than checkpoints.every=600 steps before it was kept; from the state of step 0 it takes 720 '
      f'steps, which python -m launchers.bisect --run_dir={run_dir.path} --between=680:720 '
      '--dataset=successive_words --measure=margin makes')
  assert [line.partition(' between ')[2][:19] for line in said] == [
      'steps 680 and 720: ', 'steps 1,080 and 1,1', 'steps 1,480 and 1,5', '']
  assert said[-1].startswith('0 of at most 2 captures')
  assert not run_dir.captures_json.exists()


def test_what_the_detector_could_judge_and_does_not_confirm_is_no_capture(tmp_path):
  run_dir = synthetic_runs.hopping_run(tmp_path / 'run', every=20)
  suspected = {(one.dataset, one.before) for one in captures.suspects_of(analysis_of(run_dir))}
  risen = ('flipped_words', 700)  # from 0.02 at step 240 to 1 at step 1,200: past 0.5 at step 710
  hops = {('successive_words', before) for before in (680, 1080, 1480)}
  assert suspected == {risen, *hops}
  assert {(one.dataset, one.before) for one, _ in captures.chosen(run_dir)} == hops
  for path in sorted(run_dir.monitor_scores.iterdir())[34 + 5:]:
    path.unlink()  # Five snapshots from step 700 on, which is one too few for the detector.
  assert [(one.dataset, one.before, is_hop) for one, is_hop in captures.chosen(run_dir)] == [
      ('successive_words', 680, False)]


def test_a_bracket_that_a_checkpoint_splits_is_told_to_take_longer():
  suspect = captures.Suspect('letters', 48, 54, 1.0)
  one = captures.Capture(suspect, (51, 52), False, 54 - 40, 1., 'there')
  assert '; 14 steps made again (4 more than checkpoints.every=10, as one lies' in one.told(10)
  assert '; 14 steps made again (no more than checkpoints.every=14) in' in one.told(14)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 5))
def test_planted_runs_are_captured(tmp_path, seed):
  """With the one above five planted runs; the change of each is bracketed to a step."""
  run_dir = RunDir(tmp_path / 'run')
  train(planted(tmp_path, seed), run_dir)
  done = captures.capture(run_dir, 1)
  assert len(done) == 1
  check(run_dir, done[0])


@pytest.mark.slow
def test_a_run_of_two_devices_is_captured_by_one(tmp_path):
  config, run_dir = planted(tmp_path, seed=0), RunDir(tmp_path / 'run')
  train(dataclasses.replace(config, mesh=MeshConfig(data=2)), run_dir)
  one, = captures.capture(run_dir, 1, [('mesh.data', '1')])
  margin = margins_of(RunDir(one.run_dir).path)
  assert one.found[1] == one.found[0] + 1 and margin[one.found[0]] < 0 < margin[one.found[1]]
  run_dir.captures_json.unlink()  # The replay is known as this run's, though bits may differ.
  again, = captures.capture(run_dir, 1, [('mesh.data', '1')])
  assert dataclasses.replace(again, seconds=0) == dataclasses.replace(one, seconds=0)


@pytest.mark.parametrize('settings, message', [
    ({'monitors.captures': '2', 'monitors.suite': 'none'}, 'monitors.captures=2 captures what'),
    ({'monitors.captures': '2', 'checkpoints.snapshot_every': '0'}, 'snapshot_every=0; set both'),
    ({'monitors.captures': '-1'}, 'must not be negative')])
def test_captures_that_cannot_be_are_refused_before_the_run(tmp_path, settings, message):
  with pytest.raises(ValueError, match=message):
    captures.check_settings(overrides.apply(switching_run(tmp_path), [*settings.items()]))
