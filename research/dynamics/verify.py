"""Compares a replay with its original, bit for bit, while it is made."""

import collections
from collections.abc import Iterable
import functools
import json
from typing import Any

import jax
import numpy as np

from parallelism.sharding import path_name
from research.dynamics.original import Original
from research.errors import UserError
from research.monitors import table
from research.run_dir import RunDir
from research.training.checkpoints import Checkpoints
from research.training.logs import JsonLines, read_rows
from research.training.snapshots import leaf_names
from research.training.span import Observers
from research.training.step import State

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
    if step not in reader.steps or step > self._until:
      return
    different = {}
    for name, leaf in zip(leaf_names(stored), jax.tree.leaves(stored), strict=True):
      then = reader.leaf(step, name)
      parts = ((then[shard.index] if shard.index else then, shard) for shard in _own_shards(leaf))
      different |= _differences(name, ((part.read().result(), shard.data) for part, shard in parts))
    self._note(step, 'snapshot', different)

  def checkpoint(self, step: int, state: State) -> None:
    """Compares every leaf of the state with the original's checkpoint, read into host memory."""
    self._log.sync()  # What is noted up to a checkpoint stays when a replay is resumed from it.
    if step not in self._original.checkpoint_steps or step > self._until:
      return
    host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend='cpu')[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=host), state)
    checkpoints = Checkpoints(self._original.run_dir.checkpoints)
    then, _ = checkpoints.restore(step, abstract)
    checkpoints.close()
    different = {}
    for (path, leaf), old in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(then),
                                 strict=True):
      old = np.asarray(old)
      different |= _differences(
          path_name(path), ((old[shard.index], shard.data) for shard in _own_shards(leaf)))
    self._note(step, 'checkpoint', different)

  def scores(self, step: int) -> None:
    """Compares the scores of a step that both runs scored with the same items."""
    files = [run_dir.monitor_scores / table.scores_name(step)
             for run_dir in (self._original.run_dir, self._run_dir)]
    if step > self._until or not all(file.exists() for file in files) or not self._same_items:
      return
    then, now = (table.read_scores(file)[1] for file in files)
    different = {}
    for name, old, new in zip(then._fields, then, now, strict=True):
      different |= _differences(name, [(old, new)])
    self._note(step, 'scores', different)

  @functools.cached_property
  def _same_items(self) -> bool:
    files = [run_dir.monitor_items for run_dir in (self._original.run_dir, self._run_dir)]
    return table.read_item_table(files[0]) == table.read_item_table(files[1])

  def close(self) -> None:
    """Closes the record."""
    self._log.close()

  def _note(self, step: int, what: str, different: dict[str, float]) -> None:
    self._log.append({'step': step, 'what': what, 'different': different})
    if different and not self._reasons:
      name, more = next(iter(different)), len(different) - 1
      raise ReplayError(
          f'step {step}: {name} of the {what} differs from {self._original.name} by up to '
          f'{different[name]:.3g} ({more} more differ), though machine, mesh and packages are '
          f'the same{self._original.code_difference()}')


def _own_shards(leaf: jax.Array):
  return [shard for shard in leaf.addressable_shards if shard.replica_id == 0]


def _differences(name: str, pairs: Iterable[tuple[Any, Any]]) -> dict[str, float]:
  """Returns {name: greatest absolute difference}, {} where all bits are equal."""
  worst = None
  for then, now in pairs:
    then, now = np.asarray(then), np.asarray(now)
    if then.dtype != now.dtype or then.tobytes() != now.tobytes():
      gap = np.max(np.abs(then.astype(np.float64) - now.astype(np.float64)), initial=0.0)
      worst = max(worst or 0.0, float(gap))
  return {} if worst is None else {name: worst}


def verdict(run_dir: RunDir, name: str, reasons: list[str]) -> str:
  """Returns in words what was compared with the run `name`, and how it came out."""
  rows = read_rows(run_dir.verified_jsonl)
  if not rows:
    return f'nothing to compare with {name}: no step before the first changed one'
  said = _counted(rows)
  wrong = [row for row in rows if row['different']]
  if not wrong:
    return f'equal to {name} bit for bit: {said}'
  worst = {}
  for row in wrong:
    for leaf, gap in row['different'].items():
      worst[leaf] = max(worst.get(leaf, 0.0), gap)
  largest = max(worst, key=worst.get)
  return (f'compared with {name}: {said}; different: {_counted(wrong)}, the first at step '
          f'{wrong[0]["step"]}, loss by up to {worst.get("loss", 0.0):.3g}, most in {largest} '
          f'({worst[largest]:.3g}); what is not the same: {"; ".join(reasons)}')


def _counted(rows: list[dict[str, Any]]) -> str:
  counts = collections.Counter(row['what'] for row in rows)
  return ', '.join(f'{counts[what]} {nouns[counts[what] > 1]}'
                   for what, nouns in _NOUNS.items() if counts[what])
