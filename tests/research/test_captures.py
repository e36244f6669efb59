"""Captures of planted hops: text switches at a known step; margins are read from Parquet."""

import dataclasses
import json
import pathlib

import numpy as np
import pandas as pd
import pytest

from research import overrides
from research.dynamics import captures
from research.errors import UserError
from research.monitors.items import write_items
from research.run_dir import RunDir
from research.training.loop import train
from tests.research import synthetic_runs
from tests.research.replay_runs import content, monitor, switching_run

pytestmark = pytest.mark.usefixtures('compilation_cache')
EVERY = 10  # steps between full checkpoints
SWITCH = 40  # from this batch on, every letter equals 'y' and no longer 'z'


def planted(folder, seed: int) -> RunDir:
  """Returns a finished run with a snapshot of every sixth step whose text switches once."""
  config = switching_run(folder)
  same, zed = config.data.text.paths
  pathlib.Path(same).write_text(pathlib.Path(zed).read_text().replace('=z', '=y'))
  items = folder / 'items.jsonl'
  write_items([dataclasses.replace(item, generalizing='y') for item in monitor()], items)
  text = dataclasses.replace(config.data.text, schedule=((0., 0., 1.), (float(SWITCH), 1., 0.)))
  config = dataclasses.replace(
      config, n_steps=108, seed=seed, model=dataclasses.replace(config.model, dropout=0.),
      data=dataclasses.replace(config.data, batch_size=16, text=text),
      optimizer=dataclasses.replace(config.optimizer, peak_lr=3e-3, schedule='constant'))
  run_dir = RunDir(folder / 'run')
  train(config, run_dir)
  return run_dir


def margins_of(folder) -> pd.Series:
  """Returns the mean margin of all items by step, from the score files."""
  frame = pd.concat(map(pd.read_parquet, (folder / 'monitors' / 'scores').iterdir()))
  margin = np.exp(frame.logp_generalizing) - np.exp(frame.logp_shortcut)
  return margin.groupby(frame.step).mean()


def check(run_dir: RunDir, one: captures.Capture) -> None:
  """Asserts that a capture brackets a change of sign to one step, after the text has switched."""
  a, b = one.found
  assert SWITCH <= a and one.suspect.before <= a < b <= one.suspect.after and b == a + 1
  margin = margins_of(RunDir(one.run_dir).path)
  assert margin[a] < 0 < margin[b] and one.suspect.change > 0
  trained = margins_of(run_dir.path)  # As scored while training ran.
  assert trained[one.suspect.before] == margin[one.suspect.before]
  assert one.n_replayed == one.suspect.after - one.suspect.before // EVERY * EVERY
  assert one.n_replayed - (one.suspect.after - one.suspect.before) < EVERY


def test_suspected_hops_are_captured_to_one_step(tmp_path, capsys):
  run_dir = planted(tmp_path, seed=0)
  before = content(run_dir.path)
  done = captures.capture(run_dir, 1)
  assert len(done) == 1 == len(captures.suspects_of(run_dir))
  check(run_dir, done[0])
  assert '1 of at most 1 captures' in capsys.readouterr().out
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


def test_a_hop_near_the_center_is_captured_though_nobody_suspected_it(tmp_path, monkeypatch):
  run_dir = synthetic_runs.hopping_run(tmp_path / 'run', every=40)
  monkeypatch.setattr(captures, 'suspects_of', lambda run_dir: [])
  found = [one for one, is_confirmed in captures.chosen(run_dir, 9) if is_confirmed]
  assert {(one.dataset, one.before, one.after) for one in found} == {
      ('successive_words', 640, 760), ('successive_words', 1040, 1160),
      ('successive_words', 1440, 1560)}


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 5))
def test_planted_runs_are_captured(tmp_path, seed):
  """With the one above five planted runs; the change of each is bracketed to a step."""
  run_dir = planted(tmp_path, seed)
  done = captures.capture(run_dir, 1)
  assert len(done) == 1
  check(run_dir, done[0])


@pytest.mark.parametrize('settings, message', [
    ({'monitors.captures': '2'}, 'monitors.captures=2 replays .* set --config.checkpoints.keep=0'),
    ({'monitors.captures': '-1'}, 'must not be negative')])
def test_captures_take_the_checkpoints_before_them(tmp_path, settings, message):
  keep = {'checkpoints.keep': '2'}
  with pytest.raises(ValueError, match=message):
    overrides.apply(switching_run(tmp_path), [*keep.items(), *settings.items()])
