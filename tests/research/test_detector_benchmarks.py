"""The detector's benchmarks: estimates of known noise, repeated commands, published series."""

import csv
import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments.benchmarks import detector_trials as trials, noise_estimates, real_series
from experiments.benchmarks import simulated_scores as simulated
from research.dynamics import accuracies
from research.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments):
  return subprocess.run([sys.executable, '-m', *arguments], cwd=ROOT, text=True,
                        capture_output=True, check=False)


def test_known_noise_is_estimated():
  """Log-odds drawn here, item by item, without the simulation of the benchmark."""
  random = np.random.default_rng(0)
  seeds = np.repeat(np.arange(12), 100)
  odds_TI = (random.normal(0, 1.5, 1200) + random.normal(0, 0.4, 12)[seeds]
             + random.normal(0, 0.5, (300, 1)) + random.normal(0, 0.3, (300, 12))[:, seeds]
             + random.normal(0, 1.2, (300, 1200)))
  got = dict(zip(noise_estimates.COLUMNS, noise_estimates.estimates(odds_TI, seeds)))
  wanted = {'item': 1.5, 'context': 0.4, 'common_step': 0.5, 'context_step': 0.3, 'item_step': 1.2}
  for name, value in wanted.items():
    np.testing.assert_allclose(got[name], value, rtol=0.5 if name == 'context' else 0.1)
  assert abs(got['common_correlation']) < 0.15 and abs(got['context_correlation']) < 0.05


def test_shares_have_exact_intervals():
  share, low, high = trials.share(0, 100)
  assert (share, low) == (0, 0)
  np.testing.assert_allclose(high, 1 - 0.025**(1 / 100))  # Closed form of no success.


def small_trial(shift):
  return trials.Trial(simulated.Size(60, 2, 16, 50),
                      simulated.Noise(1.7, 0.35, 0.02, 0.05, 1.6, 0.3, 0.3), 0.02, shift, 15, 0)


def test_a_sharp_hop_counts_as_found_and_the_naive_rule_alarms():
  counts = trials.simulate_batch('hops', small_trial(0.6), 10, np.random.default_rng(0))
  assert counts['hits'] == 10 and counts['alarms'] <= 1 and counts['naive'] == 10


def test_a_kind_goes_on_where_it_stopped(tmp_path):
  path, trial = tmp_path / 'hops.jsonl', small_trial(0.3)
  first = trials.run_kind('hops', trial, 20, path)
  lines = path.read_text()
  both = trials.run_kind('hops', trial, 40, path)
  again = path.read_text()
  assert again.startswith(lines) and len(again.splitlines()) == 2
  one, other = map(json.loads, again.splitlines())
  assert one == first != other and both['n'] == 40
  assert both['naive_calls'] == one['naive_calls'] + other['naive_calls']
  assert trials.run_kind('hops', trial, 20, path) == first
  trials.draw_figure({'noise': first, 'hops': both}, tmp_path / 'a.png')
  assert (tmp_path / 'a.png').read_bytes().startswith(b'\x89PNG')


@pytest.mark.parametrize('arguments,message', [
    (['detector', '--out=x', '--dwell=3'], '--dwell=3 must be above the 6 checkpoints'),
    (['real_series', '--olmo=nowhere'], '--olmo=nowhere has no downstream.csv.gz')])
def test_wrong_flags_are_said_in_one_sentence(arguments, message):
  result = run(f'experiments.benchmarks.{arguments[0]}', *arguments[1:])
  assert result.returncode == 2 and message in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1


def write_series(path, models):
  """Writes a table of models: name -> (tasks, steps) accuracies."""
  with path.open('w', newline='') as file:
    table = csv.writer(file)
    table.writerow(['model', 'step', 'task', 'value', 'stderr'])
    for name, accuracy_KT in models.items():
      for k, row in enumerate(accuracy_KT):
        table.writerows([name, 100 * t, f'task{k}', repr(float(x)), 0.01]
                        for t, x in enumerate(row))


def test_copies_and_repeats_are_counted_once(tmp_path):
  random = np.random.default_rng(1)
  source = np.where(np.arange(40) < 20, 0.1, 0.6) + 0.005 * random.standard_normal((2, 40))
  copy = source + 0.005 * random.standard_normal((2, 40))
  copy[:, :25] = source[:, :25]  # The hop is in the copied part.
  late = source + 0.005 * random.standard_normal((2, 40))
  late[:, 30] = late[:, -1]  # Serves the final weights under another name.
  write_series(tmp_path / 'a.csv', {'copy': copy, 'late': late, 'source': source})
  series = accuracies.read_rows(tmp_path / 'a.csv', 'model', error='stderr')
  found = {one.series.model: one for one in real_series.search_all(series)}
  assert found['copy'].dropped == [100 * t for t in range(25)] and not found['copy'].hops
  assert found['late'].dropped == [3000]
  for name in ('late', 'source'):
    assert [hop[0] for hop in found[name].hops] == ['task0', 'task1']
    assert all(1800 <= before < after <= 2100 for _, before, after, _ in found[name].hops)


def test_a_table_with_a_hole_is_refused(tmp_path):
  path = tmp_path / 'a.csv'
  path.write_text('model,step,task,value\nm,0,a,0.1\nm,0,b,0.2\nm,100,a,0.3\n')
  with pytest.raises(UserError, match='m has no b at step 100'):
    accuracies.read_rows(path, 'model')
  with pytest.raises(UserError, match='column stderr is missing'):
    accuracies.read_rows(path, 'model', error='stderr')
  with pytest.raises(UserError, match="no row has {'task': 'c'}"):
    accuracies.read_rows(path, 'model', where={'task': 'c'})
  path.write_text('model,step,task,value\nm,0,a,nothing\n')
  with pytest.raises(UserError, match='m a step 0'):
    accuracies.read_rows(path, 'model')


def test_pythia_learns_lambada_between_steps_1000_and_3000(shared_data):
  found = {one.series.model: one for one in
           real_series.pythia(shared_data / 'pythia_checkpoint_evals', 0)}
  rises = {model: [hop for hop in one.hops if hop[0] == 'lambada_openai']
           for model, one in found.items()}
  sizes = {model.split('-')[1] for model, hops in rises.items() if hops}
  assert sizes == {'70m', '160m', '410m', '1b', '1.4b', '2.8b', '6.9b', '12b'}
  for hops in rises.values():
    assert all(hop[1:3] == (1000, 3000) and hop[3] > 0.2 for hop in hops) and len(hops) <= 1
  assert sum(one.n_late for one in found.values()) == 0
  # The note on the data: these rows of pythia-2.8b are those of pythia-2.8b-deduped.
  assert found['pythia-2.8b'].dropped == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000]
  assert not found['pythia-2.8b'].hops and rises['pythia-2.8b-deduped']


def test_olmo_has_no_late_hop(shared_data):
  found = real_series.olmo(shared_data / 'olmo_ladder_runs')
  searched = [one for one in found if not one.reason]
  assert len(searched) >= 30 and sum(one.n_late for one in searched) == 0
