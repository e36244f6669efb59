"""The audit of a run directory: files, records and their order, then all tensors."""

from collections.abc import Callable, Iterator
import json
import pathlib
from typing import Any

import numpy as np

from research import config as config_lib
from research.config import ExperimentConfig
from research.dynamics.audit import audit_series
from research.dynamics.audit_content import Finding, Followed
from research.dynamics.series import CheckpointSeries, SnapshotSeries, checkpoint_steps
from research.dynamics.update_bounds import update_bound, update_reach
from research.run_dir import RunDir
from research.training import hashes, stored
from research.training.logs import read_rows
from research.training.provenance import config_hash
from research.training.snapshots import SnapshotReader


def audit_run(run_dir: RunDir, progress: Callable[[str, int, int], None] | None = None
              ) -> tuple[list[Finding], dict[str, Followed]]:
  """Returns all that is wrong with a run's checkpoints and snapshots, and its tensors' histories.

  Raises:
    UserError: config.json or manifest.json cannot be read as such.
  """
  config = config_lib.from_json(run_dir.config_json.read_text(encoding='utf-8'))
  manifest = json.loads(run_dir.manifest_json.read_text(encoding='utf-8'))
  findings = [*_checkpoints(run_dir, config, manifest), *_commits(run_dir), *_ends(run_dir)]
  skipped = {row['step'] for row in read_rows(run_dir.metrics_jsonl) if row.get('skipped')}

  def bound(first: int, last: int, peak: float) -> float:
    return update_bound(config, first, last, peak)

  def reach(first: int, last: int, peak: float) -> float:
    made = [step for step in range(first, last) if step + 1 not in skipped]
    return update_reach(config, np.array(made, np.int64), peak)

  histories: dict[str, Followed] = {}
  if (run_dir.snapshots / 'commits.jsonl').exists():
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


def _checkpoints(run_dir: RunDir, config: ExperimentConfig, manifest: dict[str, Any]
                 ) -> Iterator[Finding]:
  """Yields what is wrong with full checkpoints by their files, hashes and records."""
  steps = checkpoint_steps(run_dir.checkpoints)
  before: dict[str, Any] = {}
  for step in steps:
    path = run_dir.checkpoints / str(step)
    for damage in stored.damage(path, step):
      yield Finding('damaged', step, str(damage.file), damage.tensor, damage.problem)
    inventory = path / stored.INVENTORY
    if not inventory.exists() and (step != steps[-1] or run_dir.done.exists()):
      yield Finding('damaged', step, str(inventory), '', 'is missing')
    try:
      record = stored.read_record(path)
    except stored.DamagedError:
      continue  # Named above.
    if 'derived' not in manifest:  # Those have parameters alone.
      yield from _number(path, step)
    if record:
      where = str(path / stored.RECORD)
      for problem in _record_problems(record, before, config, manifest):
        yield Finding('order', step, where, '', problem)
      before = record


def _number(path: pathlib.Path, step: int) -> Iterator[Finding]:
  """Yields a finding where the state in a checkpoint has done another number of steps."""
  try:
    inside = int(stored.StoredCheckpoint(path).read('position.step', ''))
  except stored.DamagedError:
    return  # Named with the checkpoint's damage.
  if inside != step:
    yield Finding('order', step, str(path / 'position'), 'position.step',
                  f'is {inside}: this is the checkpoint of another step')


def _record_problems(record: dict[str, Any], before: dict[str, Any], config: ExperimentConfig,
                     manifest: dict[str, Any]) -> Iterator[str]:
  """Yields where a record contradicts the run, or the checkpoint before it."""
  if record['config'] != config_hash(config):
    yield 'was made with other identity settings than config.json has'
  for name, want in manifest['hashes'].items():
    if record[name] != want:
      yield f'was made with {name} {record[name][:12]}, the run with {want[:12]}'
  parent, window = record['parent'], record['window']
  origin = parent['step'] if parent and ('derived' in manifest or not parent['run_dir']) else 0
  if (window['from'], window['to']) != (origin, record['step']):
    yield (f'consumed the batches of steps {window["from"]} to {window["to"]}, its parent is at '
           f'{origin}')
  if before and parent:
    if parent['run_dir'] or parent['step'] < before['step']:
      yield f'does not follow from checkpoint {before["step"]}, but from {parent["step"]}'
    elif parent['step'] == before['step'] and parent['hash'] != before['hash']:
      yield f'follows from another checkpoint {before["step"]} than the one that is here'


def _commits(run_dir: RunDir) -> Iterator[Finding]:
  """Yields what is wrong with the lines that commit snapshots, and with their files' lengths."""
  reader, path = SnapshotReader(run_dir.snapshots), run_dir.snapshots / 'commits.jsonl'
  lines, parent, last = read_rows(path), '', -1
  for number, line in enumerate(lines):
    step = line['step']
    def finding(problem: str) -> Finding:
      return Finding('order', step, f'{path}:{number + 1}', '', problem)
    if step <= last:
      yield finding(f'stands after the snapshot of step {last}')
    last = step
    if line['row'] != number:
      yield finding(f'names row {line["row"]} of the arrays, which is that of another snapshot')
    if 'hash' not in line:
      continue
    if line['hash'] != hashes.record_hash(line):
      yield finding('does not have its own hash')
    if line['parent'] != parent:
      yield finding('does not follow from the snapshot before it')
    parent = line['hash']
    for name in sorted(line['tensors'].keys() ^ set(reader.names())):
      yield finding(f'{name} is ' + ('missing' if name in line['tensors'] else 'not in this line'))


def _ends(run_dir: RunDir) -> Iterator[Finding]:
  """Yields a finding where a finished run lacks the checkpoint or the snapshot of its end."""
  if not run_dir.done.exists():
    return
  end = json.loads(run_dir.done.read_text(encoding='utf-8'))['step']
  if end not in checkpoint_steps(run_dir.checkpoints):
    yield Finding('missing', end, str(run_dir.checkpoints / str(end)), '',
                  'the run is done, but its last checkpoint is not here')
  steps = SnapshotReader(run_dir.snapshots).steps
  if steps and steps[-1] != end:
    yield Finding('missing', end, str(run_dir.snapshots / 'commits.jsonl'), '',
                  f'the run is done, but its last snapshot is of step {steps[-1]}')


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
