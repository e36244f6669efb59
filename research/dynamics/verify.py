"""Compares a replay with its original, bit for bit, while it is made."""

import collections
from collections.abc import Callable
import functools
import json
import math
from typing import Any

import jax
import numpy as np

from parallelism.sharding import path_name
from research.dynamics.original import Original
from research.errors import UserError
from research.monitors import table
from research.run_dir import RunDir
from research.training.checkpoints import items
from research.training.logs import JsonLines, read_rows
from research.training.span import Observers
from research.training.step import State
from research.training.stored import DamagedError, StoredCheckpoint, read_record

_NOUNS = {  # one, several
    'metrics': ('row of metrics', 'rows of metrics'),
    'evals': ('row of held-out loss', 'rows of held-out loss'),
    'snapshot': ('snapshot', 'snapshots'), 'checkpoint': ('checkpoint', 'checkpoints'),
    'scores': ('table of scores', 'tables of scores')}


class ReplayError(UserError):
  """A replay whose bits are not the original's although nothing says why."""


class Verifier(Observers):
  """Notes in verified.jsonl what was compared; a difference without a reason ends the replay."""

  def __init__(self, original: Original, run_dir: RunDir, kept: int, until: int,
               reasons: tuple[str, ...]):
    """Takes up the record after step `kept`.

    Args:
      original: the run that is replayed.
      run_dir: of the replay.
      kept: the last step whose record stays; -1 for none.
      until: the last step that must be equal, as data or the range end there.
      reasons: what may change bits (machine, mesh, packages); with any, differences are noted.
    """
    self._original, self._run_dir = original, run_dir
    self._until, self._reasons = until, reasons
    self._log = JsonLines(run_dir.verified_jsonl, kept)

  def row(self, log: str, row: dict[str, Any]) -> None:
    """Compares the numbers that the row of this step has in both runs."""
    then = getattr(self._original, log).get(row['step'])
    if then and row['step'] <= self._until:
      self._note(row['step'], log, {
          name: abs(row[name] - then[name]) for name in row.keys() & then.keys()
          if json.dumps(row[name]) != json.dumps(then[name])})

  def snapshot(self, step: int, stored: Any) -> None:
    """Compares every leaf with the snapshot that the original stored."""
    reader = self._original.snapshots
    if step in reader.steps and step <= self._until:
      self._compare(step, 'snapshot', stored, lambda name: reader.read([step], name)[0])

  def checkpoint(self, step: int, state: State) -> None:
    """Compares every leaf of the state with the original's checkpoint, read leaf by leaf."""
    self._log.sync()  # What is noted up to a checkpoint stays when a replay is resumed from it.
    if step not in self._original.checkpoint_steps or step > self._until:
      return
    path, record = self._original.run_dir.checkpoints / str(step), functools.cache(read_record)

    def read(name: str) -> np.ndarray:
      try:
        return StoredCheckpoint(path).read(name, record(path).get('tensors', {}).get(name, ''))
      except DamagedError as error:
        raise DamagedError(f'{path}: {name} {error}') from error
    self._compare(step, 'checkpoint', items(state), read)

  def scores(self, step: int) -> None:
    """Compares the scores of a step that both runs scored with the same items."""
    files = [run_dir.monitor_scores / table.scores_name(step)
             for run_dir in (self._original.run_dir, self._run_dir)]
    if step > self._until or not all(file.exists() for file in files) or not self._same_items:
      return
    then, now = (table.read_scores(file)[1] for file in files)
    different = {}
    for name, old, new in zip(then._fields, then, now, strict=True):
      different |= _difference(name, old, new)
    self._note(step, 'scores', different)

  @functools.cached_property
  def _same_items(self) -> bool:
    files = [run_dir.monitor_items for run_dir in (self._original.run_dir, self._run_dir)]
    return table.read_item_table(files[0]) == table.read_item_table(files[1])

  def close(self) -> None:
    """Closes the record."""
    self._log.close()

  def _compare(self, step: int, what: str, now: Any, read: Callable[[str], np.ndarray]) -> None:
    """Compares a tree of arrays on the mesh with what `read` says of each leaf's name.

    What is damaged in the original is said and noted, and no difference of the replay.
    """
    different = {}
    for path, leaf in jax.tree.leaves_with_path(now):
      name = path_name(path)
      try:
        different |= _difference(name, read(name), leaf)
      except DamagedError as error:
        print(f'note: step {step}: the {what} of the original is damaged and not compared, {error}',
              flush=True)
        self._log.append({'step': step, 'what': what, 'different': {}, 'damaged': str(error)})
        return
    self._note(step, what, different)

  def _note(self, step: int, what: str, different: dict[str, float]) -> None:
    self._log.append({'step': step, 'what': what, 'different': different})
    if different and not self._reasons:
      name, more = next(iter(different)), len(different) - 1
      raise ReplayError(
          f'step {step}: {name} of the {what} differs from {self._original.name} by up to '
          f'{different[name]:.3g} ({more} more differ), though machine, mesh and packages are '
          f'the same{self._original.code_difference()}')


def differences(then: Any, now: Any) -> dict[str, float]:
  """Returns {dotted name: greatest absolute difference} of the leaves that differ in any bit.

  NaN where a number stands against none.

  Args:
    then, now: trees of the same structure of arrays, each addressable as a whole.
  """
  found = {}
  for (path, x), y in zip(jax.tree.leaves_with_path(then), jax.tree.leaves(now), strict=True):
    found |= _difference(path_name(path), x, y)
  return found


def _difference(name: str, then: Any, now: Any) -> dict[str, float]:
  then, now = np.asarray(then), np.asarray(now)
  if (then.dtype, then.shape) == (now.dtype, now.shape) and then.tobytes() == now.tobytes():
    return {}
  if then.shape != now.shape:
    return {name: math.nan}
  then, now = then.astype(np.float64), now.astype(np.float64)
  same = (then == now) | (np.isnan(then) & np.isnan(now))
  with np.errstate(invalid='ignore'):  # Of infinities that are equal.
    gaps = np.where(same, 0.0, np.abs(then - now))
  return {name: float(np.max(gaps, initial=0.0))}


def verdict(run_dir: RunDir, name: str, reasons: list[str]) -> str:
  """Returns in words what was compared with the run `name`, and how it came out."""
  noted = read_rows(run_dir.verified_jsonl)
  rows = [row for row in noted if 'damaged' not in row]
  if not rows:
    return f'nothing to compare with {name}: no step before the first changed one'
  said = _counted(rows)
  said += '' if any(row['what'] == 'checkpoint' for row in rows) else (
      '; no full state (checkpoint) lay in the range to compare')
  said += ''.join(f'; damaged in the original: {row["damaged"]}' for row in noted if row not in rows)
  wrong = [row for row in rows if row['different']]
  if not wrong:
    return f'equal to {name} bit for bit: {said}'
  worst = {}
  for row in wrong:
    for leaf, gap in row['different'].items():
      worst[leaf] = float(np.maximum(worst.get(leaf, 0.0), gap))  # Unlike max, keeps NaN.
  largest = max(worst, key=lambda leaf: (math.isnan(worst[leaf]), worst[leaf]))
  return (f'compared with {name}: {said}; different: {_counted(wrong)}, the first at step '
          f'{wrong[0]["step"]}, loss by up to {worst.get("loss", 0.0):.3g}, most in {largest} '
          f'({worst[largest]:.3g}); what is not the same: {"; ".join(reasons)}')


def _counted(rows: list[dict[str, Any]]) -> str:
  counts = collections.Counter(row['what'] for row in rows)
  return ', '.join(f'{counts[what]} {nouns[counts[what] > 1]}'
                   for what, nouns in _NOUNS.items() if counts[what])
