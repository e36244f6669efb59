"""The audit finds every planted fault and names its file; healthy series and runs give no finding."""

import functools
import json
import shutil

import numpy as np
import pytest

from experiments.benchmarks import faults
from research.dynamics import audit_content
from research.dynamics import audit_run as audit_run_lib
from research.dynamics.audit import audit_series, norms_table
from research.dynamics.audit_location import audit_location
from research.dynamics.audit_run import audit_run
from research.dynamics.series import RowSeries, SnapshotSeries
from research.dynamics.update_bounds import update_bound, update_reach
from research.errors import UserError
from research.training import provenance, stored
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
    ('swap two tensors, checkpoint', {'order'}),
    ('not a number in the optimizer, checkpoint', {'nonfinite'})])
def test_faults_whose_hashes_were_recomputed(short_run, fault, kinds):
  planted = faults.FILE_FAULTS[fault](short_run, np.random.default_rng(5))
  faults.rehash(short_run)
  findings, _ = audit_run(short_run)
  assert names_it(findings, planted), (planted, [str(finding) for finding in findings])
  assert kinds & {finding.kind for finding in findings if finding.step == planted.step}


def test_a_checkpoint_missing_from_the_middle_is_named(short_run):
  shutil.rmtree(short_run.checkpoints / '20')
  finding, = [finding for finding in audit_run(short_run)[0] if finding.kind == 'missing']
  assert finding.step == 20 and finding.file == str(short_run.checkpoints / '20')


def test_optimizer_tensors_of_another_dtype_are_named(short_run):
  """The witness is a list of dtypes by hand."""
  path, found = short_run.checkpoints / '20', {}
  first = {'optimizer.mu.q': ('float32', 0), 'ema.q': ('float32', 0)}
  assert not list(audit_run_lib._state(path, 10, first, found))
  finding, = audit_run_lib._state(path, 20, {**first, 'optimizer.mu.q': ('bfloat16', 0)}, found)
  assert (finding.kind, finding.step, finding.tensor) == ('dtype', 20, 'optimizer.mu.q')


def broken(text: bytes, what: str) -> bytes | None:
  """The bytes of a file after an accident, None for a file that is gone."""
  lines = text.splitlines(keepends=True)
  third = {'high bit': lambda line: line[:4] + bytes([line[4] ^ 0x80]) + line[5:],
           'low bit': lambda line: line.replace(b'"step"', b'"stdp"', 1),
           'quote': lambda line: line.replace(b'"', b'#', 1)}
  if what == 'missing':
    return None
  if what == 'truncated':
    return text[:len(text) // 2]
  at = min(2, len(lines) - 1)
  lines[at] = third[what](lines[at])
  return b''.join(lines)


@pytest.mark.parametrize('name, what', [
    *(('snapshots/commits.jsonl', what) for what in ('high bit', 'low bit', 'quote')),
    *(('metrics.jsonl', what) for what in ('high bit', 'low bit', 'quote')),
    *((name, what) for name in ('config.json', 'manifest.json')
      for what in ('missing', 'truncated')),
    *(('snapshots/embedding/zarr.json', what) for what in ('truncated', 'quote'))])
def test_a_damaged_index_is_a_finding_beside_the_others(short_run, name, what):
  path, checkpoint = short_run.path / name, short_run.checkpoints / '20'
  if 'embedding' in name:
    path = next(path for path in sorted(short_run.snapshots.glob('*/zarr.json')))
  after = broken(path.read_bytes(), what)
  path.unlink() if after is None else path.write_bytes(after)
  (checkpoint / stored.INVENTORY).unlink()
  findings, _ = audit_location(str(short_run.path))
  damaged = {finding.file for finding in findings if finding.kind == 'damaged'}
  assert damaged == {str(path), str(checkpoint / stored.INVENTORY)}


def test_an_array_with_fewer_rows_than_snapshots_is_named(short_run):
  path = sorted(short_run.snapshots.glob('*/zarr.json'))[0]
  metadata = json.loads(path.read_text())
  metadata['shape'][0] = 20
  path.write_text(json.dumps(metadata))
  findings, _ = audit_run(short_run)
  assert {(finding.kind, finding.file) for finding in findings} == {('damaged', str(path))}
  assert {finding.step for finding in findings} == set(range(20, 31))
  assert 'has 20 rows' in findings[0].problem


def test_a_manifest_alone_that_cannot_be_read_is_one_sentence(tmp_path):
  (tmp_path / 'manifest.json').write_text('{"ser')
  with pytest.raises(UserError, match='manifest.json cannot be read'):
    audit_location(str(tmp_path))


def test_settings_that_code_has_gained_since_do_not_matter(short_run, monkeypatch):
  kept = json.loads(short_run.manifest_json.read_text())
  record = stored.read_record(short_run.checkpoints / '10')
  assert kept['hashes']['config'] == record['config'] == provenance.config_hash(short_config())
  monkeypatch.setattr(provenance, 'config_hash', lambda config: '0' * 32)
  assert audit_run(short_run)[0] == []
  del kept['hashes']['config']
  short_run.manifest_json.write_text(json.dumps(kept))
  assert audit_run(short_run)[0] == []
  kept['hashes']['config'] = '1' * 32
  short_run.manifest_json.write_text(json.dumps(kept))
  assert {finding.problem[:20] for finding in audit_run(short_run)[0]} == {'was made with config'}


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


def test_most_of_a_series_may_be_copies():
  """86 of 154 are the same; the one whose neighbors are near it, and no copies, is the original."""
  rows = {name: x.copy() for name, x in walk(154).items()}
  copies = [i for i in range(154) if i not in (99, 101) and i != 100][:45] + list(range(110, 150))
  for x in rows.values():
    x[copies] = x[100]
  findings, _ = audit_series(series_of(rows))
  duplicates = [finding for finding in findings if finding.kind == 'duplicate']
  assert [finding.step for finding in duplicates] == [10 * i for i in copies]
  assert all('one of 86 checkpoints' in finding.problem and 'the first of step 0' in finding.problem
             and 'step 1000 is taken' in finding.problem for finding in duplicates)
  assert not [finding for finding in findings if finding.kind == 'splice']


def test_copies_in_a_short_series_are_found_and_the_last_is_kept_where_none_fits():
  rows = {name: x[:3].copy() for name, x in walk().items()}
  for x in rows.values():
    x[:] = x[2]
  findings, _ = audit_series(series_of(rows))
  assert [(finding.kind, finding.step) for finding in findings] == [
      ('duplicate', 0), ('duplicate', 10)]


def decaying(dtype: str, n_steps: int = 120, seed: int = 0) -> RowSeries:
  """Weights stored in a dtype whose steps decay to 0 along a cosine; a scale about 1, a matrix."""
  rng = np.random.default_rng(seed)
  rate_T = 1e-2 * 0.5 * (1 + np.cos(np.pi * np.arange(n_steps) / n_steps))
  def tensor(start, n):
    signs_TN = np.sign(rng.normal(size=(n_steps, n)) + rng.normal(size=n))
    return (start + np.cumsum(rate_T[:, None] * signs_TN * rng.random((n_steps, n)), 0))
  rows = {'scale': tensor(1.0, 16), 'matrix': tensor(rng.normal(size=400) * 0.1, 400)}
  return RowSeries(range(n_steps), {
      name: x.astype(np.float32).astype(dtype) for name, x in rows.items()})


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16', 'float32'])
@pytest.mark.parametrize('seed', range(3))
def test_healthy_series_that_come_to_rest_give_no_finding(dtype, seed):
  series = decaying(dtype, seed=seed)
  assert dtype == 'float32' or (series._rows['scale'][-1] == series._rows['scale'][-2]).all()
  assert [str(finding) for finding in audit_series(series)[0]] == []


def in_bfloat16(run_dir) -> RowSeries:
  """The snapshots of a run, rounded."""
  series = SnapshotSeries(run_dir.snapshots)
  return RowSeries(series.steps, {name: series.leaves(series.steps, name).astype('bfloat16')
                                  for name in series.names})


def test_a_healthy_run_stored_in_bfloat16_gives_no_finding(trained):
  """Warm-up makes its first updates smaller than a grain of most weights."""
  config = short_config(**{'checkpoints.snapshot_dtype': 'bfloat16'})
  assert audit_series(in_bfloat16(trained))[0] == []
  reach = lambda first, last, peak: update_reach(config, np.arange(first, last), peak)
  assert audit_series(in_bfloat16(trained), functools.partial(update_bound, config), reach)[0] == []


def test_a_last_checkpoint_soon_after_the_one_before_is_no_measure_of_the_others():
  rng = np.random.default_rng(0)
  steps = np.array([0, 10, 20, 30, 31])
  way = np.cumsum(rng.choice([-1, 1], size=(32, 16)) * 1e-3, 0)
  way[20:] -= 2 * (way[20:] - way[20])  # All turn back at once.
  x = (1 + way)[steps].astype(np.float32)
  x[1, 3] += 0.03
  assert not [f for f in audit_series(RowSeries(list(steps), {'a': x}))[0] if f.kind == 'outlier']


def test_equality_is_a_fault_only_where_the_learning_rate_moves_a_grain():
  rows = {name: x.copy() for name, x in walk(12).items()}
  for x in rows.values():
    x[9:] = x[9]
  for x in rows.values():
    x[4] = x[3]
  config = short_config(n_steps='12', **{
      'optimizer.schedule': 'linear', 'optimizer.warmup_steps': '0',
      'optimizer.peak_lr': '1', 'optimizer.final_lr_fraction': '0'})
  series = RowSeries(range(12), rows)
  def reach(first, last, peak):  # Nothing is updated after step 9.
    return update_reach(config, np.array([s for s in range(first, last) if s < 9], int), peak)
  findings, _ = audit_series(series, None, reach)
  assert [(finding.kind, finding.step) for finding in findings] == [('duplicate', 4)]
  assert update_reach(config, np.array([12]), 1.0) == 0.0
  sgd = short_config(n_steps='12', **{'optimizer.name': 'sgd', 'optimizer.warmup_steps': '0',
                                      'optimizer.schedule': 'linear'})
  assert update_reach(sgd, np.array([12]), 1.0) == 0.0
  assert update_reach(sgd, np.array([3]), 1.0) == np.inf


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
