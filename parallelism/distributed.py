"""Start-up of a run on several hosts."""

import jax


def start(coordinator: str, n_processes: int, process_id: int) -> None:
  """Connects this process to the others; does nothing for a run on one host.

  Args:
    coordinator: '' for one host; 'auto' where the cluster says who is who (Cloud TPU, SLURM,
      Open MPI); otherwise host:port of process 0.
    n_processes: number of processes, with an explicit coordinator.
    process_id: this process's rank, with an explicit coordinator.

  Raises:
    ValueError: an explicit coordinator without a valid rank.
  """
  if not coordinator:
    return
  if coordinator == 'auto':
    jax.distributed.initialize()
    return
  if not 0 <= process_id < n_processes:
    raise ValueError(f'--process_id={process_id} must lie in 0..{n_processes - 1} '
                     f'(--n_processes={n_processes})')
  jax.distributed.initialize(coordinator, num_processes=n_processes, process_id=process_id)
