"""What the detector says of a run, read back from its files; witnesses are what was written."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from research import config as config_lib
from research.data import tokenizers
from research.dynamics import findings, parity, parity_scoring
from research.dynamics.analysis import analyze
from research.dynamics.curves import read_variants
from research.errors import UserError
from research.monitors import table
from research.monitors.encoding import encode_items
from research.monitors.microworld_items import microworld_items
from research.monitors.suspects import Suspects
from tests.research import synthetic_runs

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(name='run_dir', scope='module')
def _run_dir(tmp_path_factory):
  return synthetic_runs.hopping_run(tmp_path_factory.mktemp('runs') / 'run', every=40)


@pytest.fixture(name='said', scope='module')
def _said(run_dir):
  """What the launcher prints, run as users run it."""
  result = subprocess.run(
      [sys.executable, '-m', 'launchers.hops', f'--run_dir={run_dir.path}'], cwd=ROOT, text=True,
      capture_output=True, check=False, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  assert result.returncode == 0, result.stderr
  return result.stdout


def test_hops_are_told_with_their_brackets(said, run_dir):
  lines = said.splitlines()
  told = [line for line in lines if line.startswith('  hop to')]
  assert len(told) == 3
  assert ('hop to generalizing between steps 680 and 720 (2,088,960 and 2,211,840 tokens): +1.28 '
          '[+1.2' in told[0]) and 'controls calm, in 1 of 1 prompt variants' in told[0]
  assert 'hop to pattern between steps 1,080 and 1,120' in told[1]
  at = lines.index('successive_words (400 items, 4 contexts, 1 variants)')
  assert lines[at + 1] == '  ' + '-' * 17 + '+' * 10 + '-' * 10 + '+' * 13
  assert 'generalizing 46%' in lines[at + 2] and 'pattern 54%' in lines[at + 2]
  assert 'confirmed hops: 3; of controls: 0' in lines
  assert 'parity of float32 and bfloat16 was not measured: the run has no snapshots' in lines
  assert run_dir.report_html.exists()


def test_files_hold_what_was_told(said, run_dir):
  found = json.loads(run_dir.hops_json.read_text())
  by_name = {row['name']: row for row in found['datasets']}
  assert [hop['between_steps'] for hop in by_name['successive_words']['hops']] == [
      [680, 720], [1080, 1120], [1480, 1520]]
  assert [row['name'] for row in found['datasets'] if row['is_control']] == [
      'opposites_words', 'sentiment_words', 'sums_words']
  rate = found['hop_rate']
  tokens = (1760 - 200) * 3072  # five checkpoints of 40 steps less at either end
  assert (rate['confirmed'], rate['n_datasets'], rate['tokens']) == (3, 3, tokens)
  assert rate['per_billion_tokens'] == pytest.approx(3 / (3 * tokens / 1e9), rel=1e-4)
  assert rate['low'] < rate['per_billion_tokens'] < rate['high']
  states = pd.read_parquet(run_dir.states_parquet)
  assert len(states) == 6 * 50
  own = states[states.dataset == 'successive_words'].set_index('step')
  accuracy = synthetic_runs.plateaus(own.index, synthetic_runs.HOPPING)
  assert list(own.state) == ['GENERALIZING' if a > 0.5 else 'PATTERN' for a in accuracy]
  np.testing.assert_allclose(own['mean'], 1.6 * accuracy - 0.8, atol=0.02)
  assert np.all(own.tokens == own.index * 3072)
  assert np.all((own.low < own['mean']) & (own['mean'] < own.high))


def test_a_strip_shows_the_commonest_state_of_a_piece():
  assert findings.strip(np.array([1, 1, 0, -1])) == '++.-'
  long = findings.strip(np.repeat([1, -1], [3 * 48, 3 * 48]))
  assert long == '+' * 48 + '-' * 48


def test_margins_that_change_their_level_are_described(run_dir):
  pytest.importorskip('ruptures')
  analysis = analyze(read_variants(run_dir.monitor_items, run_dir.monitor_scores))
  found = findings.findings(analysis, {}, 'margin', None)
  assert found['hop_rate'] is None  # No tokens are known.
  successive, = [row for row in found['datasets'] if row['name'] == 'successive_words']
  large = [(change['step'], change['change']) for change in successive['margin_changes']
           if abs(change['change']) > 0.2]
  assert [step for step, _ in large] == [720, 1120, 1520]
  np.testing.assert_allclose([size for _, size in large], [1.28, -1.28, 1.28], atol=0.05)


def test_parity_is_the_worst_snapshots():
  one_TI = np.array([[0.1, -0.1, 0.3, 0.2], [0.1, -0.1, 0.3, 0.2]])
  other_TI = np.array([[0.1, -0.1, 0.2, 0.2], [-0.1, -0.1, 0.3, -0.2]])
  got = parity.compare([10, 20], ['a', 'a', 'b', 'b'], one_TI, other_TI)
  assert got.steps == (10, 20)
  assert got.share == {'a': 0.5, 'b': 0.5}
  assert got.shift == pytest.approx({'a': 0.1, 'b': 0.2})
  assert got.tolerance('accuracy') is got.share and got.tolerance('margin') is got.shift


def test_stored_snapshots_are_scored_in_both_ways_once(short_run):
  config = config_lib.from_json(short_run.config_json.read_text())
  items = [item for item in microworld_items(config.data.microworld, 64)
           if item.dataset in ('successive', 'flipped') and item.seed < 2]
  encoded = encode_items(items, tokenizers.load(short_run.tokenizer_json), 64)
  table.write_item_table(short_run.monitor_items, items, encoded)
  assert parity.read_parity(short_run) is None
  assert parity_scoring.default_steps(short_run) == [7, 15, 23, 30]
  got = parity_scoring.parity_of(short_run, [30])
  assert parity.read_parity(short_run) == got
  assert set(got.shift) == {'successive', 'flipped'}
  # bfloat16 keeps eight bits: probabilities differ by less than a few times 2**-8, but differ.
  assert all(0 < shift < 0.02 for shift in got.shift.values())
  assert all(0 <= share < 1 for share in got.share.values())
  with pytest.raises(UserError, match='step 31: no such snapshot'):
    parity_scoring.parity_of(short_run, [31])
  assert parity_scoring.parity_of(short_run) == got  # Nothing is scored again.


def test_suspicion_finds_sides_that_are_held():
  suspects, found = Suspects(), []
  margins = (-0.3, -0.4, 0.3, -0.3, 0.2, 0.3, 0.05, -0.05, 0.3, -0.2, -0.25)
  for i, margin in enumerate(margins):
    found += suspects.add(10 * i, {'a': margin, 'b': 0.3})
  assert [(one.dataset, one.before, one.after) for one in found] == [('a', 30, 40), ('a', 80, 90)]
  assert [one.change for one in found] == pytest.approx([0.2 + 0.4, -0.2 - 0.3])
  assert suspects.n_suspected == 2


def test_too_little_is_said_in_one_sentence(tmp_path):
  run_dir = synthetic_runs.hopping_run(tmp_path / 'run', every=100)
  for path in sorted(run_dir.monitor_scores.iterdir())[10:]:
    path.unlink()
  result = subprocess.run(
      [sys.executable, '-m', 'launchers.hops', f'--run_dir={run_dir.path}'], cwd=ROOT, text=True,
      capture_output=True, check=False, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  assert result.returncode == 2
  assert result.stderr.startswith('error: 10 scored checkpoints are too few to tell a hop; 23')
  assert not run_dir.hops_json.exists()
