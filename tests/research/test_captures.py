"""Captures of planted hops: text switches at known steps, and margins are read back from Parquet."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from research import overrides
from research.dynamics import captures
from research.run_dir import RunDir
from research.training.loop import train
from tests.research.replay_runs import N_STEPS, SWITCHES, content, switching_run

pytestmark = pytest.mark.usefixtures('compilation_cache')
EVERY = 10  # steps between full checkpoints


def planted(folder, seed: int) -> RunDir:
  """Returns a finished run with a snapshot of every sixth step whose text switches twice."""
  run_dir = RunDir(folder / 'run')
  train(dataclasses.replace(switching_run(folder), seed=seed), run_dir)
  return run_dir


def margins_of(folder) -> pd.Series:
  """Returns the mean margin of all items by step, from the score files."""
  frame = pd.concat(map(pd.read_parquet, (folder / 'monitors' / 'scores').iterdir()))
  margin = np.exp(frame.logp_generalizing) - np.exp(frame.logp_shortcut)
  return margin.groupby(frame.step).mean()


def check(run_dir: RunDir, done: list[captures.Capture]) -> None:
  """Asserts that every capture brackets a change of sign to one step, after the text has switched."""
  for one in done:
    a, b = one.found
    assert one.suspect.before <= a < b <= one.suspect.after and b == a + 1
    margin = margins_of(RunDir(one.run_dir).path)
    assert margin[a] * margin[b] < 0 and np.sign(margin[b]) == np.sign(one.suspect.change)
    wanted = next(s for s in reversed(SWITCHES) if s < b)  # The switch that came before.
    assert a >= wanted and (one.suspect.change < 0) == (wanted == SWITCHES[0])
    assert one.n_replayed == one.suspect.after - one.suspect.before // EVERY * EVERY
    assert one.n_replayed - (one.suspect.after - one.suspect.before) < EVERY


def test_suspected_hops_are_captured_to_one_step(tmp_path, capsys):
  run_dir = planted(tmp_path, seed=0)
  before = content(run_dir.path)
  done = captures.capture(run_dir, 1)
  assert len(done) == 1 <= len(captures.suspects_of(run_dir))
  check(run_dir, done)
  assert '1 of at most 1 captures' in capsys.readouterr().out
  (stored,) = json.loads(run_dir.captures_json.read_text())
  assert stored['found'] == list(done[0].found)
  assert before == {name: hashed for name, hashed in content(run_dir.path).items()
                    if name != run_dir.captures_json.name}
  assert captures.capture(run_dir, 1)[0].found == done[0].found  # Nothing is made again.
  assert f'of {N_STEPS}' not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 10))
def test_ten_planted_runs_are_captured(tmp_path, seed):
  """With the one above: the greatest change of each is bracketed to a step."""
  run_dir = planted(tmp_path, seed)
  done = captures.capture(run_dir, 1)
  assert len(done) == 1
  check(run_dir, done)


@pytest.mark.parametrize('settings, message', [
    ({'monitors.captures': '2'}, 'monitors.captures=2 replays .* set --config.checkpoints.keep=0'),
    ({'monitors.captures': '-1'}, 'must not be negative')])
def test_captures_take_the_checkpoints_before_them(tmp_path, settings, message):
  keep = {'checkpoints.keep': '2'}
  with pytest.raises(ValueError, match=message):
    overrides.apply(switching_run(tmp_path), [*keep.items(), *settings.items()])
