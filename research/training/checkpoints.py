"""Full checkpoints through Orbax: parameters, optimizer, average, data position, RNG, guard.

Each carries the hashes of its tensors (`research.training.provenance`), checked when it is read.
"""

import bisect
import pathlib
from collections.abc import Collection, Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
from orbax.checkpoint import v1 as ocp

from research.errors import UserError
from research.training import hashes, stored
from research.training.config import CheckpointConfig
from research.training.step import State


class _Needed:
  """Of Orbax's kind, preserves the last checkpoint up to each of some steps.

  Attributes:
    steps: those of the save to come.
  """

  def __init__(self):
    self.steps: Collection[int] = ()

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
    """Returns whether each checkpoint, ascending by step, stays on the disk."""
    del context
    at_hand = [checkpoint.step for checkpoint in checkpoints]
    last = {bisect.bisect_right(at_hand, step) - 1 for step in self.steps}
    return [i in last for i in range(len(at_hand))]


class Checkpoints:
  """The full checkpoints of one run; saving is asynchronous, one save at a time."""

  def __init__(self, path: pathlib.Path, config: CheckpointConfig | None = None):
    policies = ocp.training.preservation_policies
    keep, self._needed = policies.PreserveAll(), _Needed()
    if config and config.keep:
      keep = policies.AnyPreservationPolicy([policies.LatestN(config.keep), self._needed])
    self._path = path.absolute()
    self._checkpointer = ocp.training.Checkpointer(
        self._path, preservation_policy=keep,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        cleanup_tmp_directories=config is not None)
    self._saving = None

  @property
  def steps(self) -> list[int]:
    """Steps with a whole checkpoint, ascending."""
    return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

  def newest(self, aside: pathlib.Path) -> int | None:
    """Returns the newest step, None for a run that has none yet.

    Raises:
      UserError: all that there were lie in `aside`.
    """
    if not self.steps and aside.exists():
      raise self._none_sound(aside)
    return self.steps[-1] if self.steps else None

  def path(self, step: int) -> pathlib.Path:
    """Returns the directory of a step's checkpoint."""
    return self._path / str(step)

  def record(self, step: int) -> dict[str, Any]:
    """Returns what the checkpoint of a step says about itself, {} for one without hashes."""
    return stored.read_record(self.path(step))

  def save(self, step: int, state: State, position: dict[str, int], record: dict[str, Any],
           needed: Collection[int] = ()) -> None:
    """Starts saving; waits first for the save before it and raises what that one raised.

    Args:
      step: optimizer steps done.
      state: the training state.
      position: where the data stream stands: `step` and `tokens` consumed so far.
      record: what the checkpoint says about itself, {} for nothing.
      needed: the last checkpoint up to each of these steps stays beside the latest.
    """
    self.wait()
    self._needed.steps = needed
    self._saving = step, self._checkpointer.save_checkpointables_async(
        step, {**items(state), 'data': position}, custom_metadata=record)

  def save_params(self, step: int, params: Any, position: dict[str, int], record: dict[str, Any]
                  ) -> None:
    """Saves parameters that no optimizer state goes with, which training can start from."""
    self.wait()
    self._saving = step, self._checkpointer.save_checkpointables_async(
        step, {'params': params, 'data': position}, custom_metadata=record)

  def wait(self) -> None:
    """Waits for the save under way and lists its files; raises what it raised."""
    saving, self._saving = self._saving, None
    if saving is None:
      return
    step, saved = saving
    saved.result()
    self.take_inventory(step)

  def take_inventory(self, step: int) -> None:
    """Lists the files of a whole checkpoint, unless a process that was killed did so already."""
    path = self.path(step)
    if jax.process_index() == 0 and not (path / stored.INVENTORY).exists():
      stored.write_inventory(path)

  def restore(self, step: int, abstract: State) -> tuple[State, dict[str, int]]:
    """Returns the state of `step`, laid out like `abstract`, and the data position.

    Raises:
      DamagedError: a tensor does not have the hash that the checkpoint gives for it.
    """
    if not (self.path(step) / 'guard').is_dir():
      raise UserError(f'{self.path(step)} has no item guard: it was written before there were guards, '
                      'and training cannot go on from it; start.run_dir takes its parameters')
    loaded = self._load(step, {**items(abstract), 'data': None})
    state = State(step=loaded['position']['step'], params=loaded['params'],
                  optimizer=loaded['optimizer'], ema=loaded.get('ema', {}),
                  rng=loaded['position']['rng'], guard=loaded['guard'])
    return state, loaded['data']

  def restore_params(self, step: int, abstract: Any) -> Any:
    """Returns only the parameters of `step`, laid out like `abstract`; checked like `restore`."""
    return self._load(step, {'params': abstract})['params']

  def restore_optimizer(self, step: int, abstract: Any) -> Any:
    """Returns only the optimizer state of `step`, laid out like `abstract`; checked likewise."""
    return self._load(step, {'optimizer': abstract})['optimizer']

  def _load(self, step: int, wanted: dict[str, Any]) -> dict[str, Any]:
    """Returns the items wanted, every tensor of them compared with its hash."""
    record, complaint = {}, ''
    try:
      record = self.record(step)
      if record and record['step'] != step:
        complaint = f'{self.path(step)}: says that it is of step {record["step"]}'
    except stored.DamagedError as error:
      complaint = str(error)
    _raise_together(complaint)
    loaded = self._checkpointer.load_checkpointables(step, wanted)
    found = hashes.digests({name: tree for name, tree in loaded.items() if name != 'data'})
    said = record.get('tensors', found)
    wrong = [name for name, digest in found.items() if said.get(name) != digest]
    if wrong:
      complaint = (f'{self.path(step) / wrong[0].partition(".")[0]}: {wrong[0]} does not have the '
                   'content that was saved')
    elif record and 'data' in loaded and loaded['data'] != record['position']:
      complaint = (f'{self.path(step)}/data: the position {loaded["data"]} is not '
                   f'{record["position"]}, which was saved')
    _raise_together(complaint)
    return loaded

  def restore_newest(self, abstract: State, aside: pathlib.Path) -> tuple[int, State, dict[str, int]]:
    """Returns (step, state, data position) of the newest checkpoint that is sound.

    Damaged ones that are newer are moved into `aside` and named; nothing is deleted.

    Raises:
      UserError: none is sound, or a newer one cannot be read.
    """
    for step in reversed(self.steps):
      try:
        return step, *self.restore(step, abstract)
      except Exception as error:  # What Orbax and TensorStore raise for broken files is no one type.
        found = _damage(self.path(step), step, error)
        if found is None:
          raise
        print(f'{found}; checkpoint {step} is set aside in {self._set_aside(step, aside)}',
              flush=True)
    raise self._none_sound(aside)

  def _none_sound(self, aside: pathlib.Path) -> UserError:
    return UserError(f'no checkpoint of {self._path} is sound; all are in {aside}: put one back from a '
                     'copy, or choose another --run_dir to begin anew')

  def _set_aside(self, step: int, aside: pathlib.Path) -> pathlib.Path:
    taken = len(list(aside.glob(f'{step}-*')))
    target = aside / f'{step}-{taken}'
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'checkpoint {step} is damaged')
    if jax.process_index() == 0:
      aside.mkdir(exist_ok=True)
      self.path(step).rename(target)
    if jax.process_count() > 1:
      multihost_utils.sync_global_devices(f'checkpoint {step} is set aside')
    self._checkpointer.reload()
    return target

  def close(self) -> None:
    """Waits and releases Orbax's threads."""
    self.wait()
    self._checkpointer.close()


def _raise_together(complaint: str) -> None:
  """Raises DamagedError on all processes if one of them has a complaint ('': none)."""
  found = bool(complaint)
  if jax.process_count() > 1:
    found = bool(multihost_utils.process_allgather(np.array(found)).any())
  if found:
    raise stored.DamagedError(complaint or 'another process finds the checkpoint damaged')


def _damage(path: pathlib.Path, step: int, error: Exception) -> str | None:
  """Returns what is wrong with a checkpoint that could not be restored, None if it is not at fault.

  Of several processes only what all of them see alike counts: a hash, not a failed read.

  Raises:
    UserError: it cannot be read, which says nothing of what is in it.
  """
  if isinstance(error, stored.DamagedError) or jax.process_count() > 1:
    return str(error) if isinstance(error, stored.DamagedError) else None
  return next((str(damage) for damage in stored.damage(path, step)), None)


def items(state: State) -> dict[str, Any]:
  """Returns the trees of arrays that a checkpoint stores, by item."""
  trees = {'params': state.params, 'optimizer': state.optimizer,
           'position': {'step': state.step, 'rng': state.rng}, 'guard': state.guard}
  return {**trees, 'ema': state.ema} if jax.tree.leaves(state.ema) else trees
