"""The audit finds every planted fault and names its file; healthy series and runs give no finding."""

import functools

import numpy as np
import pytest

from experiments.benchmarks import faults
from research.dynamics import audit_content
from research.dynamics.audit import audit_series, norms_table
from research.dynamics.audit_location import audit_location
from research.dynamics.audit_run import audit_run
from research.dynamics.series import RowSeries, SnapshotSeries
from research.dynamics.update_bounds import update_bound
from research.errors import UserError
from research.training.provenance import Window
from tests.research.conftest import short_config


def names_it(findings, planted) -> bool:
  paths = [(finding.step, finding.file) for finding in findings]
  return any(step == planted.step and (file.startswith(str(planted.file)) or
                                       str(planted.file).startswith(file)) for step, file in paths)


def test_a_healthy_run_gives_no_finding(trained):
  findings, histories = audit_location(str(trained.path))
  assert findings == []
  assert all(len(followed.steps) == 31 for followed in histories.values()) and histories


@pytest.mark.parametrize('fault, seed', [
    *((fault, 0) for fault in faults.FILE_FAULTS),
    *(pytest.param(fault, seed, marks=pytest.mark.slow)
      for fault in faults.FILE_FAULTS for seed in (1, 2))])
def test_every_fault_in_a_file_is_named(short_run, fault, seed):
  planted = faults.FILE_FAULTS[fault](short_run, np.random.default_rng(seed))
  findings, _ = audit_run(short_run)
  assert names_it(findings, planted), (planted, [str(finding) for finding in findings])


@pytest.mark.parametrize('fault, kinds', [
    ('swap two tensors, snapshot', {'swapped', 'jump', 'too far', 'order'}),
    ('duplicate a step, snapshot', {'duplicate'}),
    ('splice two checkpoints, snapshot', {'splice'}),
    ('values through bfloat16, snapshot', {'dtype'}),
    ('duplicate a step, checkpoint', {'order'}),
    ('splice two checkpoints, checkpoint', {'order'}),
    ('swap two tensors, checkpoint', {'order'})])
def test_faults_whose_hashes_were_recomputed(short_run, fault, kinds):
  planted = faults.FILE_FAULTS[fault](short_run, np.random.default_rng(5))
  faults.rehash(short_run)
  findings, _ = audit_run(short_run)
  assert names_it(findings, planted), (planted, [str(finding) for finding in findings])
  assert kinds & {finding.kind for finding in findings if finding.step == planted.step}


def test_recomputed_hashes_of_a_healthy_run_give_no_finding(short_run):
  faults.rehash(short_run)
  assert audit_run(short_run)[0] == []


@functools.lru_cache
def walk(n_steps: int = 40, n: int = 600, seed: int = 0) -> dict[str, np.ndarray]:
  """Tensors that drift and tremble from step to step, float32 [steps, ...]."""
  rng = np.random.default_rng(seed)
  start = rng.normal(size=(4, n)).astype(np.float32) * 0.1
  drift = rng.normal(size=(4, n)) * 1e-3
  steps = rng.normal(size=(n_steps, 4, n)) * 1e-3 + drift
  x = (start + np.cumsum(steps, 0)).astype(np.float32)
  return {name: x[:, i].copy() for i, name in enumerate('abcd')}


def series_of(rows) -> RowSeries:
  return RowSeries(range(0, 10 * len(rows['a']), 10), {name: x.copy() for name, x in rows.items()})


@pytest.mark.parametrize('fault', [
    'flip the sign', 'swap two tensors', 'duplicate a step', 'splice, other half in the series',
    'values through bfloat16', 'one element not a number', 'one tensor zero'])
@pytest.mark.parametrize('i', [7, 39])
def test_content_alone_shows_it(fault, i):
  rows = {name: x.copy() for name, x in walk().items()}
  if fault == 'flip the sign':  # That of a weight that is not next to zero.
    rows['b'][:, 5] += 1
    rows['b'][i, 5] *= -1
  else:
    faults.CONTENT_FAULTS[fault](rows, i, np.random.default_rng(1), {})
  findings, _ = audit_series(series_of(rows))
  assert 10 * i in {finding.step for finding in findings}, fault
  assert len({finding.step for finding in findings}) == 1


def test_a_swap_names_both_tensors():
  rows = {name: x.copy() for name, x in walk().items()}
  rows['a'][9], rows['c'][9] = walk()['c'][9], walk()['a'][9]
  findings, _ = audit_series(series_of(rows))
  swapped, = [finding for finding in findings if finding.kind == 'swapped']
  assert swapped.step == 90 and swapped.tensor == 'a' and 'holds c' in swapped.problem


@pytest.mark.parametrize('seed', range(5))
def test_healthy_walks_give_no_finding(seed):
  assert audit_series(series_of(walk(100, 300, seed)))[0] == []


def test_histories_are_those_of_numpy():
  rows = walk()
  _, histories = audit_series(series_of(rows))
  x = rows['b'].astype(np.float64)
  followed = histories['b']
  np.testing.assert_allclose(followed.norms, np.linalg.norm(x, axis=1), rtol=1e-12)
  np.testing.assert_allclose(
      followed.moved[1:], np.linalg.norm(x[1:] - x[:-1], axis=1), rtol=1e-12)
  np.testing.assert_allclose(
      followed.around[1:-1], np.linalg.norm(x[2:] - x[:-2], axis=1), rtol=1e-12)
  off = np.abs(x[1:-1] - (x[:-2] + x[2:]) / 2).max(1)
  np.testing.assert_allclose(followed.outlier[1:-1], off, rtol=1e-9)
  table = norms_table(histories)
  assert table.num_rows == 4 * 40 and table['norm'].to_numpy()[40] == followed.norms[0]


def test_no_adamw_update_is_farther_than_the_bound_and_a_sparse_one_reaches_it():
  """The witness is Adam written out, on the gradients that reach Cauchy-Schwarz's bound."""
  config = short_config(**{'optimizer.weight_decay': '0', 'optimizer.warmup_steps': '0'})
  b1, b2 = config.optimizer.b1, config.optimizer.b2
  for n in (1, 3, 30):
    best = np.array([(b1 / b2) ** (n - 1 - k) for k in range(n)])
    rng, farthest = np.random.default_rng(0), []
    for gradients in (best, *rng.normal(size=(50, n)), rng.normal(size=n) ** 9):
      m = v = 0.0
      for g in gradients:
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
      farthest.append(abs(m / (1 - b1**n)) / np.sqrt(v / (1 - b2**n)))
    bound = update_bound(config, n - 1, n, 0.0) / config.optimizer.peak_lr
    assert max(farthest) <= bound * (1 + 1e-6)
    assert farthest[0] == pytest.approx(bound, rel=0.002)


def test_an_update_beyond_the_learning_rate_is_named(trained):
  class Shifted(SnapshotSeries):
    def leaf(self, step, name):
      return super().leaf(step, name) + (0.5 if step >= 20 and name == 'final_norm.scale' else 0)
  config = short_config()
  bound = functools.partial(update_bound, config)
  findings, _ = audit_series(Shifted(trained.snapshots), bound)
  finding, = [finding for finding in findings if finding.kind == 'too far']
  assert finding.step == 20 and finding.tensor == 'final_norm.scale'
  assert 'the learning rate allows' in finding.problem


def test_windows_hash_the_same_for_any_division_of_rows_and_add_up():
  rng = np.random.default_rng(0)
  batches = [{'tokens': rng.integers(0, 99, (4, 8)).astype(np.int32),
              'loss_mask': rng.random((4, 8)).astype(np.float32)} for _ in range(6)]
  def hashed(first, last, rows, owned, which=batches):
    window = Window(first, rows, owned)
    for step in range(first + 1, last + 1):
      window.add(step, {name: x[list(rows)] for name, x in which[step - 1].items()})
    return window.close()
  whole = hashed(0, 6, range(4), range(4))
  assert (whole['from'], whole['to']) == (0, 6)
  total = lambda *windows: f'{sum(int(w["hash"], 16) for w in windows) % 2**128:032x}'
  assert whole['hash'] == total(hashed(0, 6, [0, 1], [0, 1]), hashed(0, 6, [1, 2, 3], [2, 3]))
  assert whole['hash'] == total(hashed(0, 2, range(4), range(4)), hashed(2, 6, range(4), range(4)))
  changed = [dict(batch) for batch in batches]
  changed[3] = {**batches[3], 'tokens': batches[3]['tokens'][::-1]}
  assert hashed(0, 6, range(4), range(4), changed)['hash'] != whole['hash']
  changed[3], changed[4] = batches[4], batches[3]
  assert hashed(0, 6, range(4), range(4), changed)['hash'] != whole['hash']


def test_a_location_without_a_trajectory_is_one_sentence(tmp_path):
  with pytest.raises(UserError, match='is no trajectory'):
    audit_location(str(tmp_path))


def test_thresholds_are_frozen():
  """They were set on some runs and judged on others; a change needs new judging."""
  frozen = {name: getattr(audit_content, name) for name in (
      'DETOUR', 'JUMP', 'END_JUMP', 'OUTLIER', 'NEAR')}
  assert frozen == {'DETOUR': 3.0, 'JUMP': 5.0, 'END_JUMP': 12.0, 'OUTLIER': 10.0, 'NEAR': 5}
