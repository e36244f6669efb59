"""Being asked to stop: SIGTERM and Ctrl-C let a run finish its step and save, on all processes.

The first of either asks. A second SIGTERM changes nothing, as schedulers may send several; a second
Ctrl-C ends the process at once, as SIGKILL would, which leaves whole checkpoints only.
"""

import os
import signal
import types

import jax
from jax.experimental import multihost_utils

from research.errors import PREEMPTED, Stopped

LEFT = 130  # exit code of a process that does not wait, as shells have it for Ctrl-C


class Halt:
  """Listens to signals while it is entered; outside they do what they did before."""

  def __init__(self):
    self._asked_by: str | None = None
    self._together = jax.process_count() > 1
    self._before: dict[int, object] = {}

  def __enter__(self) -> 'Halt':
    """Begins to listen."""
    # Of several processes SIGTERM is JAX's: its coordination service tells it to all of them.
    ours = (signal.SIGINT,) if self._together else (signal.SIGINT, signal.SIGTERM)
    self._before = {number: signal.signal(number, self._hear) for number in ours}
    return self

  def __exit__(self, *unused: object) -> None:
    """Gives the signals back."""
    for number, handler in self._before.items():
      signal.signal(number, handler)

  def _hear(self, number: int, frame: types.FrameType | None) -> None:
    """Remembers that the run was asked to stop; leaves at the second Ctrl-C."""
    del frame
    again, name = self._asked_by, signal.Signals(number).name
    if number == signal.SIGTERM:
      self._asked_by = again or name
      return
    self._asked_by = name
    if again == name:
      os._exit(LEFT)
    # A print might be what was interrupted, and cannot be entered twice.
    os.write(2, b'\nfinishing the step and saving; Ctrl-C again to leave at once\n')
    if self._together:
      os.kill(os.getpid(), signal.SIGTERM)

  def reached(self, step: int) -> bool:
    """Returns whether to stop after this step; all processes have to ask after each step.

    They get the same answer, whichever of them was asked to stop.
    """
    if self._together:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._asked_by is not None

  def stopped(self, step: int, n_steps: int, path: os.PathLike) -> Stopped:
    """Returns the end of a run that was saved at `step` because it was asked to stop."""
    who = self._asked_by or 'SIGTERM'  # of another process
    return Stopped(f'stopped by {who} and saved at step {step} of {n_steps} in {path}; repeat the '
                   'command to resume', PREEMPTED)
