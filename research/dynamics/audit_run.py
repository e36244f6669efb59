"""The audit of a run directory: files, records and their order, then all tensors."""

from collections.abc import Callable, Iterator
import functools
import pathlib
from typing import Any

import numpy as np

from research.dynamics.audit import audit_series
from research.dynamics.audit_content import Finding, Followed
from research.dynamics.audit_index import Index
from research.dynamics.series import CheckpointSeries, SnapshotSeries, checkpoint_steps
from research.dynamics.update_bounds import update_bound, update_reach
from research.run_dir import RunDir
from research.training import hashes, stored
from research.training.snapshots import SnapshotReader


def audit_run(run_dir: RunDir, progress: Callable[[str, int, int], None] | None = None
              ) -> tuple[list[Finding], dict[str, Followed]]:
  """Returns all that is wrong with a run's checkpoints and snapshots, and its tensors' histories.

  What a file would say that cannot be read is not judged: learning rates without config.json,
  origins without manifest.json, snapshots without their lines.
  """
  index = Index(run_dir)
  findings = [*index.findings, *_checkpoints(run_dir, index), *_ends(run_dir, index)]
  bound, reach = _limits(index)
  histories: dict[str, Followed] = {}
  if index.commits:
    findings += _commits(run_dir, index.commits)
    more, histories = audit_series(SnapshotSeries(run_dir.snapshots), bound, reach, progress)
    findings += more
  full = CheckpointSeries(run_dir.checkpoints)
  more, of_full = audit_series(full, bound, reach)
  # Damage to files and hashes of these has been named already, tensor by tensor.
  findings += [finding for finding in more if finding.kind != 'damaged']
  findings += _disagreeing(histories, of_full, full)
  for name, followed in of_full.items():
    histories.setdefault(name, followed)
  return sorted(set(findings), key=lambda finding: (finding.step, *finding)), histories


def _limits(index: Index) -> tuple[Callable | None, Callable | None]:
  """Returns `bound` and `reach` of `audit_series`, None where the learning rates are not known."""
  config = index.config
  if config is None:
    return None, None
  def reach(first: int, last: int, peak: float) -> float:
    made = [step for step in range(first, last) if step + 1 not in index.skipped]
    return update_reach(config, np.array(made, np.int64), peak)
  return functools.partial(update_bound, config), reach


def _checkpoints(run_dir: RunDir, index: Index) -> Iterator[Finding]:
  """Yields what is wrong with full checkpoints by their files, hashes, records and state."""
  steps = checkpoint_steps(run_dir.checkpoints)
  before: dict[str, Any] = {}
  dtypes: dict[str, str] = {}
  for step in steps:
    path, found = run_dir.checkpoints / str(step), {}
    for damage in stored.damage(path, step, lambda name, x: found.update({name: _looked_at(x)})):
      yield Finding('damaged', step, str(damage.file), damage.tensor, damage.problem)
    yield from _state(path, step, found, dtypes)
    inventory = path / stored.INVENTORY
    if not inventory.exists() and (step != steps[-1] or run_dir.done.exists()):
      yield Finding('damaged', step, str(inventory), '', 'is missing')
    try:
      record = stored.read_record(path)
    except stored.DamagedError:
      continue  # Named above.
    yield from _number(path, step)
    if record:
      where = str(path / stored.RECORD)
      for problem in _record_problems(record, before, index.manifest):
        yield Finding('order', step, where, '', problem)
      yield from _gap(run_dir, record, before)
      before = record


def _looked_at(x: np.ndarray) -> tuple[str, int]:
  """Returns dtype and number of elements that are not finite."""
  with np.errstate(invalid='ignore'):
    return x.dtype.name, int((x != x).sum() + (np.abs(x) == np.inf).sum())


def _state(path: pathlib.Path, step: int, found: dict[str, tuple[str, int]], dtypes: dict[str, str]
           ) -> Iterator[Finding]:
  """Yields tensors, but for the parameters, that are not finite or not of their earlier dtype."""
  for name, (dtype, n_nonfinite) in found.items():
    item = name.partition('.')[0]
    if item == 'params':
      continue  # They are followed through time.
    if n_nonfinite:
      yield Finding('nonfinite', step, str(path / item), name,
                    f'{n_nonfinite} elements are not finite')
    if dtypes.setdefault(name, dtype) != dtype:
      yield Finding('dtype', step, str(path / item), name,
                    f'is {dtype}, in the first checkpoint {dtypes[name]}')


def _gap(run_dir: RunDir, record: dict[str, Any], before: dict[str, Any]) -> Iterator[Finding]:
  """Yields a finding where the parent of a checkpoint lay between it and the one before."""
  parent = record['parent']
  if before and parent and not parent['run_dir'] and parent['step'] > before['step']:
    yield Finding('missing', parent['step'], str(run_dir.checkpoints / str(parent['step'])), '',
                  f'is not here, but checkpoint {record["step"]} follows from it')


def _number(path: pathlib.Path, step: int) -> Iterator[Finding]:
  """Yields a finding where the state in a checkpoint has done another number of steps."""
  if not (path / 'position').is_dir():
    return  # Derived and imported ones have parameters alone; another lack is named as damage.
  try:
    inside = int(stored.StoredCheckpoint(path).read('position.step', ''))
  except stored.DamagedError:
    return  # Named with the checkpoint's damage.
  if inside != step:
    yield Finding('order', step, str(path / 'position'), 'position.step',
                  f'is {inside}: this is the checkpoint of another step')


def _record_problems(record: dict[str, Any], before: dict[str, Any],
                     manifest: dict[str, Any] | None) -> Iterator[str]:
  """Yields where a record contradicts the run, or the checkpoint before it."""
  parent, window = record['parent'], record['window']
  if manifest is not None:
    # Identity settings are hashed as the run began: code has gained settings since, perhaps.
    for name, want in manifest['hashes'].items():
      if record[name] != want:
        yield f'was made with {name} {record[name][:12]}, the run with {want[:12]}'
    origin = _origin(record, manifest)
    if (window['from'], window['to']) != (origin, record['step']):
      yield (f'consumed the batches of steps {window["from"]} to {window["to"]}, its parent is at '
             f'{origin}')
  if before and parent:
    if parent['run_dir'] or parent['step'] < before['step']:
      yield f'does not follow from checkpoint {before["step"]}, but from {parent["step"]}'
    elif parent['step'] == before['step'] and parent['hash'] != before['hash']:
      yield f'follows from another checkpoint {before["step"]} than the one that is here'


def _origin(record: dict[str, Any], manifest: dict[str, Any]) -> int:
  """Returns the step at which the window of a record begins.

  A run that trains on from another one counts from 0; what is derived or a replay counts on.
  """
  parent = record['parent']
  if parent is None:
    return record['step'] if 'imported' in manifest else 0
  counts_on = 'derived' in manifest or 'replay' in manifest
  return parent['step'] if counts_on or not parent['run_dir'] else 0


def _commits(run_dir: RunDir, lines: list[dict[str, Any]]) -> Iterator[Finding]:
  """Yields what is wrong with the lines that commit snapshots."""
  reader, path = SnapshotReader(run_dir.snapshots), run_dir.snapshots / 'commits.jsonl'
  parent, last = '', -1
  for number, line in enumerate(lines):
    step = line['step']
    def finding(problem: str) -> Finding:
      return Finding('order', step, f'{path}:{number + 1}', '', problem)
    if step <= last:
      yield finding(f'stands after the snapshot of step {last}')
    last = step
    if line['row'] != number:
      yield finding(f'names row {line["row"]} of the arrays, which is that of another snapshot')
    if 'tensors' not in line:
      continue  # Written before there were hashes.
    if line.get('hash') != hashes.record_hash(line):
      yield finding('does not have its own hash')
    if line.get('parent') != parent:
      yield finding('does not follow from the snapshot before it')
    parent = line.get('hash')
    for name in sorted(line['tensors'].keys() ^ set(reader.names())):
      yield finding(f'{name} is ' + ('missing' if name in line['tensors'] else 'not in this line'))


def _ends(run_dir: RunDir, index: Index) -> Iterator[Finding]:
  """Yields a finding where a finished run lacks the checkpoint or the snapshot of its end."""
  if index.end is None:
    return
  if index.end not in checkpoint_steps(run_dir.checkpoints):
    yield Finding('missing', index.end, str(run_dir.checkpoints / str(index.end)), '',
                  'the run is done, but its last checkpoint is not here')
  last = max((line['step'] for line in index.commits or []), default=index.end)
  if last != index.end:
    yield Finding('missing', index.end, str(run_dir.snapshots / 'commits.jsonl'), '',
                  f'the run is done, but its last snapshot is of step {last}')


def _disagreeing(snapshots: dict[str, Followed], full: dict[str, Followed], series: CheckpointSeries
                 ) -> Iterator[Finding]:
  """Yields parameters whose checkpoint and snapshot of one step, of one dtype, differ."""
  for name, followed in full.items():
    if name not in snapshots:
      continue
    others = snapshots[name]
    known = {step: (digest, dtype) for step, digest, dtype in zip(
        others.steps, others.digests, others.dtypes, strict=True)}
    for step, digest, dtype in zip(followed.steps, followed.digests, followed.dtypes, strict=True):
      if step in known and known[step][1] == dtype and known[step][0] != digest:
        yield Finding('order', step, str(series.file_of(step, name)), name,
                      'differs from the snapshot of the same step')
