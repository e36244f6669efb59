"""Start-up of a run on several hosts, and its end when one of them fails."""

import atexit
import dataclasses
import os
import sys
from typing import Annotated as A
from typing import ClassVar

import jax

from parallelism import roll_call

_rolls: list[roll_call.Roll] = []  # The roll of this process, where it is one of several.


@dataclasses.dataclass(frozen=True)
class HostsConfig:
  """How long the processes of a run on several hosts wait for one another."""

  KIND: ClassVar[str] = 'placement'

  startup_seconds: A[int, 'time in which all processes must have started'] = 300
  heartbeat_seconds: A[int, 'silence after which a process counts as lost, and the run ends; one '
                       'that dies on a host that lives is noticed at once'] = 30

  def __post_init__(self):
    for field in ('startup_seconds', 'heartbeat_seconds'):
      if getattr(self, field) < 1:
        raise ValueError(f'hosts.{field}={getattr(self, field)} must be at least 1')


def start(config: HostsConfig, coordinator: str, n_processes: int, process_id: int) -> None:
  """Connects this process to the others; does nothing for a run of one process.

  Args:
    config: how long to wait for others.
    coordinator: '' for one process; 'auto' where the cluster says who is who (Cloud TPU, SLURM,
      Open MPI); otherwise host:port of process 0.
    n_processes: number of processes, with an explicit coordinator.
    process_id: this process's rank, with an explicit coordinator.

  Raises:
    ValueError: no valid rank, no cluster, or processes that did not start in time; the message
      names them.
  """
  if not coordinator:
    return
  if coordinator == 'auto':
    place = _detect(config)
  elif 0 <= process_id < n_processes:
    place = roll_call.Place(process_id, n_processes, coordinator)
  else:
    raise ValueError(f'--process_id={process_id} must lie in 0..{n_processes - 1} '
                     f'(--n_processes={n_processes})')
  if place.n_processes == 1:
    return
  # JAX waits for all by itself but ends without a word on who is missing.
  _rolls.append(roll_call.call(place, config.startup_seconds))
  jax.distributed.initialize(
      place.address, num_processes=place.n_processes, process_id=place.process,
      initialization_timeout=config.startup_seconds,
      heartbeat_timeout_seconds=config.heartbeat_seconds)


def _detect(config: HostsConfig) -> roll_call.Place:
  """Returns this process's place as the cluster has it; raises ValueError where there is none."""
  from jax._src import clusters  # JAX has no public way to ask who is who before it starts up.
  address, n_processes, process, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, None, config.startup_seconds)
  if None in (address, n_processes, process):
    raise ValueError('--coordinator=auto: this is no Cloud TPU, SLURM or Open MPI job; give '
                     '--coordinator=host:port of process 0, --n_processes and --process_id')
  return roll_call.Place(process, n_processes, address)


def finish() -> None:
  """Tells the other processes, if any, that this one has done its work."""
  for roll in _rolls:
    roll.part()


def tell(sentence: str) -> None:
  """Has process 0 print what another one has to say; for process 0 itself it does nothing."""
  for roll in _rolls:
    roll.tell(sentence)


def fail(sentence: str, exit_code: int) -> None:
  """Tells the other processes, if any, why this one ends, so that they end too.

  Where this one fails because another died, it ends here, with the name of that one. Otherwise
  the caller goes on to say its own error and to exit, which then waits for nobody.
  """
  for roll in _rolls:
    roll.fail(sentence)
    atexit.register(_leave, exit_code)


def _leave(exit_code: int) -> None:
  """Exits before JAX's own clean-up, which would wait for processes that are gone."""
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(exit_code)
