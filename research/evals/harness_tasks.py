"""Tasks of lm-evaluation-harness by name, ready to be asked; bad names and missing data said."""

import difflib
import importlib.util
import logging
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from research.errors import UserError


def require_harness() -> None:
  """Makes the harness ready to be imported; raises UserError where it is not installed."""
  if importlib.util.find_spec('lm_eval') is None:
    raise UserError("lm-evaluation-harness is not installed; pip install -e '.[evals]'")
  # Forks of a process with JAX's threads may hang.
  os.environ.setdefault('DISABLE_MULTIPROC', '1')
  os.environ.setdefault('USE_TORCH', '0')  # of datasets, where torch happens to be installed
  # It warns of every metric whose aggregation is left to its default.
  logging.getLogger('lm_eval.api.task').setLevel(logging.ERROR)
  if not sys.stderr.isatty():
    os.environ.setdefault('TQDM_DISABLE', '1')
    os.environ.setdefault('HF_DATASETS_DISABLE_PROGRESS_BARS', '1')


def check_names(wanted: Sequence[str], known: Sequence[str]) -> None:
  """Raises UserError for a task that is not known, with the nearest names."""
  for name in wanted:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
      raise UserError(f'--tasks={name}: no such task; the nearest are {", ".join(near)}')


def load(names: Sequence[str], include_path: str = '', num_fewshot: int | None = None
         ) -> dict[str, dict[str, Any]]:
  """Returns for each name what the harness makes of it: its tasks and its groups.

  Args:
    names: of tasks, groups or tags.
    include_path: folder with tasks as YAML files; a name there goes before one of the harness's.
      The harness's own tasks are looked through only where a name is not in the folder.
    num_fewshot: demonstrations; None leaves it to the tasks. Those that say 0 keep it.

  Raises:
    UserError: the harness is not installed, a name is not known, or a task's data is not at hand.
  """
  require_harness()
  from lm_eval.tasks import TaskManager
  if include_path and not pathlib.Path(include_path).is_dir():
    raise UserError(f'--include_path={include_path} is no folder')
  manager = TaskManager(include_path=include_path or None, include_defaults=False)
  if not set(names) <= set(manager.all_tasks):
    print("looking through the harness's own tasks", file=sys.stderr, flush=True)
    manager = TaskManager(include_path=include_path or None)
  check_names(names, manager.all_tasks)
  loaded = {name: _loaded(manager, name) for name in names}
  for name, tasks in loaded.items():
    for task in tasks['tasks'].values():
      if getattr(task, 'UNSAFE_CODE', False) or getattr(task, 'MULTIMODAL', False):
        raise UserError(f'--tasks={name}: {task.task_name} runs what the model writes, or asks '
                        'about more than text; neither is done here')
      own = task.get_config('num_fewshot')
      if own is None or num_fewshot is not None and own != 0:
        task.set_config(key='num_fewshot', value=num_fewshot or 0)
  return loaded


def _loaded(manager: Any, name: str) -> dict[str, Any]:
  """Returns the tasks of a name; their data are read, or fetched, here."""
  try:
    return manager.load([name])
  except OSError as error:  # datasets raises ConnectionError, FileNotFoundError or kinds of them
    raise UserError(
        f'--tasks={name}: its data is not at hand ({" ".join(str(error).split())}); go online '
        'once, so that it comes into the cache of Hugging Face datasets, or give tasks whose YAML '
        'names local files with --include_path') from error
  except ModuleNotFoundError as error:
    raise UserError(f'--tasks={name}: this task needs the package {error.name}; pip install it'
                    ) from error

