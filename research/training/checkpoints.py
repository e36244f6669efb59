"""Full checkpoints through Orbax: parameters, optimizer, average, data position and RNG."""

import pathlib
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from research.training.config import CheckpointConfig
from research.training.step import State


class Checkpoints:
  """The full checkpoints of one run; saving is asynchronous, one save at a time."""

  def __init__(self, path: pathlib.Path, config: CheckpointConfig | None = None):
    policies = ocp.training.preservation_policies
    keep = policies.LatestN(config.keep) if config and config.keep else policies.PreserveAll()
    self._checkpointer = ocp.training.Checkpointer(
        path.absolute(), preservation_policy=keep,
        save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
        cleanup_tmp_directories=config is not None)
    self._saving = None

  @property
  def steps(self) -> list[int]:
    """Steps with a whole checkpoint, ascending."""
    return sorted(checkpoint.step for checkpoint in self._checkpointer.checkpoints)

  def save(self, step: int, state: State, position: dict[str, int], facts: dict[str, str]) -> None:
    """Starts saving; waits first for the save before it and raises what that one raised.

    Args:
      step: optimizer steps done.
      state: the training state.
      position: where the data stream stands: `step` and `tokens` consumed so far.
      facts: hashes that the checkpoint carries as metadata.
    """
    self.wait()
    self._saving = self._checkpointer.save_checkpointables_async(
        step, {**_items(state), 'data': position}, custom_metadata=facts)

  def save_params(self, step: int, params: Any, facts: dict[str, str]) -> None:
    """Saves a checkpoint that has parameters only, to start other runs from, and waits for it."""
    self.wait()
    self._checkpointer.save_checkpointables(step, {'params': params}, custom_metadata=facts)

  def wait(self) -> None:
    """Waits for the save under way; raises what it raised."""
    saving, self._saving = self._saving, None
    if saving is not None:
      saving.result()

  def restore(self, step: int, abstract: State) -> tuple[State, dict[str, int]]:
    """Returns the state of `step`, laid out like `abstract`, and the data position."""
    loaded = self._checkpointer.load_checkpointables(step, {**_items(abstract), 'data': None})
    state = State(step=loaded['position']['step'], params=loaded['params'],
                  optimizer=loaded['optimizer'], ema=loaded.get('ema', {}),
                  rng=loaded['position']['rng'])
    return state, loaded['data']

  def restore_params(self, step: int, abstract: Any) -> Any:
    """Returns only the parameters of `step`, laid out like `abstract`."""
    return self._checkpointer.load_checkpointables(step, {'params': abstract})['params']

  def restore_optimizer(self, step: int, abstract: Any) -> Any:
    """Returns only the optimizer state of `step`, laid out like `abstract`."""
    return self._checkpointer.load_checkpointables(step, {'optimizer': abstract})['optimizer']

  def close(self) -> None:
    """Waits and releases Orbax's threads."""
    self.wait()
    self._checkpointer.close()


def _items(state: State) -> dict[str, Any]:
  items = {'params': state.params, 'optimizer': state.optimizer,
           'position': {'step': state.step, 'rng': state.rng}}
  return {**items, 'ema': state.ema} if jax.tree.leaves(state.ema) else items
