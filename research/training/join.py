"""What a process needs that joins a run which other processes began."""

import shutil

import jax
from jax.experimental import multihost_utils

from research.run_dir import RunDir, write_whole
from research.training.logs import read_rows


def join(run_dir: RunDir, restored: int | None) -> None:
  """Gives this process the record of process 0, unless it has one of its own up to `restored`.

  So a run may be resumed by more processes than it was begun by, or by as many as it once had.
  Returns when all processes have what they need.

  Args:
    run_dir: the run directory as this process sees it.
    restored: the step that the run resumes from; None for a run that begins.
  """
  if jax.process_count() == 1:
    return
  first = RunDir(run_dir.whole)
  if restored is not None and run_dir.path != first.path and not _complete(run_dir, restored):
    for name in ('config_json', 'manifest_json', 'metrics_jsonl', 'evals_jsonl', 'timings_jsonl',
                 'skipped_jsonl'):
      source = getattr(first, name)
      if source.exists():
        write_whole(getattr(run_dir, name), source.read_text(encoding='utf-8'))
    if first.monitors.exists():
      shutil.copytree(first.monitors, run_dir.monitors, dirs_exist_ok=True)
  multihost_utils.sync_global_devices('records are complete')


def _complete(run_dir: RunDir, restored: int) -> bool:
  steps = [row['step'] for row in read_rows(run_dir.metrics_jsonl) if row['step'] <= restored]
  return run_dir.manifest_json.exists() and steps == list(range(1, restored + 1))
