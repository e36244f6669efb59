"""A run killed again and again, at every moment it has, loses nothing: bit for bit the whole run.

The runs are real processes of the real launcher; which moment a kill met is read off the files it
left behind.
"""

import collections
import concurrent.futures
import signal

import numpy as np
import pytest

from experiments.benchmarks import storms
from research.errors import PREEMPTED
from research.run_dir import RunDir
from research.training.logs import read_rows
from research.training.snapshots import SnapshotReader

N_STEPS, N_KILLS, N_TERMS = 60, 25, 8


@pytest.fixture(scope='module')
def stormed(tmp_path_factory):
  """(uninterrupted run, {signal: (run, what each kill found)}); the storms go on side by side."""
  folder = tmp_path_factory.mktemp('storm')
  cache = folder / 'programs'
  whole = RunDir(folder / 'whole')
  storms.finish(whole.path, N_STEPS, cache)
  plans = {signal.SIGKILL: storms.plan(N_KILLS, N_STEPS, seed=0),
           signal.SIGTERM: storms.asked(N_TERMS, N_STEPS, seed=1)}

  def suffer(number: int):
    run_dir = RunDir(folder / signal.Signals(number).name)
    struck = list(storms.storm(plans[number], run_dir, N_STEPS, cache, number))
    storms.finish(run_dir.path, N_STEPS, cache)
    return run_dir, struck

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    return whole, dict(zip(plans, pool.map(suffer, plans), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM], ids=lambda n: n.name)
def test_nothing_is_lost(stormed, number):
  whole, storm = stormed
  run_dir, struck = storm[number]
  assert len(struck) == {signal.SIGKILL: N_KILLS, signal.SIGTERM: N_TERMS}[number]
  assert storms.differences(whole, run_dir) == []


@pytest.mark.slow
def test_kills_met_every_moment(stormed):
  _, struck = stormed[1][signal.SIGKILL]
  met = collections.Counter(blow.kill.moment for blow in struck if blow.in_time)
  assert all(met[moment] for moment in storms.MOMENTS), met
  assert any(first.kill.moment != 'start' and then.kill.moment == 'start'
             for first, then in zip(struck, struck[1:]))  # twice in a row
  assert max(blow.repeated for blow in struck) > 0


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_repeats_nothing(stormed):
  _, struck = stormed[1][signal.SIGTERM]
  stopped = [blow for blow in struck if blow.code == PREEMPTED]
  assert len(stopped) >= N_TERMS // 2
  assert [blow.repeated for blow in stopped] == [0] * len(stopped)


@pytest.mark.slow
def test_what_is_lost_would_be_found(stormed, tmp_path):
  """The comparison sees a row, a bit of a snapshot and a checkpoint that are not as they were."""
  whole, storm = stormed
  run_dir, _ = storm[signal.SIGKILL]
  rows = read_rows(run_dir.metrics_jsonl)
  text = run_dir.metrics_jsonl.read_text(encoding='utf-8')
  run_dir.metrics_jsonl.write_text(text.replace(repr(rows[7]['loss']), '1.0'), encoding='utf-8')
  name = 'final_norm.scale'
  reader = SnapshotReader(run_dir.snapshots)
  leaf, file = reader.leaf(8, name), reader.file_of(8, name)
  value = leaf.read().result()
  leaf.write(np.nextafter(value, np.float32(9), dtype=np.float32)).result()
  try:
    found = storms.differences(whole, run_dir)
  finally:
    run_dir.metrics_jsonl.write_text(text, encoding='utf-8')
    leaf.write(value).result()
  assert found == ['metrics.jsonl: rows differ', f'snapshot 8: {file}: {name} of step 8 does not '
                   'have the content that was saved']
