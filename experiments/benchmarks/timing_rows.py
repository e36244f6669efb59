"""Runs of launchers.pretrain, and what their timing rows say about a stretch of steps."""

import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

from research.errors import UserError
from research.run_dir import RunDir
from research.training.recorder import IN_STEP

NEVER = 10**9  # steps between what is not to happen


def pretrain(experiment: str, run_dir: RunDir, settings: dict[str, Any]) -> float:
  """Runs an experiment with other settings, in a process of its own; returns its wall seconds.

  Raises:
    UserError: it failed; the message ends with what it said.
  """
  command = [sys.executable, '-m', 'launchers.pretrain', f'--experiment={experiment}',
             f'--run_dir={run_dir.path}',
             *(f'--config.{name}={value}' for name, value in settings.items())]
  start = time.perf_counter()
  finished = subprocess.run(command, check=False, capture_output=True, text=True)
  if finished.returncode:
    raise UserError(f'{" ".join(command)} failed with code {finished.returncode}: '
                    f'{finished.stderr.strip()[-2000:]}')
  return time.perf_counter() - start


def interleaved(ways: Sequence[str], n_rounds: int, run: Callable[[str, RunDir], dict[str, Any]]
                ) -> list[dict[str, dict[str, Any]]]:
  """Returns what `run` measured by way, per round; says the seconds of each `window`.

  Every round begins with another way, and every run has a directory that goes when it is over.
  """
  rounds = []
  for i in range(n_rounds):
    measured, first = {}, i % len(ways)
    for way in (*ways[first:], *ways[:first]):
      with tempfile.TemporaryDirectory(prefix='modehop-timing-') as folder:
        measured[way] = run(way, RunDir(pathlib.Path(folder) / 'run'))
      print(f'round {i + 1} of {n_rounds}, {way}: {measured[way]["window"]:.1f} s', flush=True)
    rounds.append(measured)
  return rounds


def window(rows: list[dict[str, Any]], skip: int, phase: str = '') -> float:
  """Returns the wall seconds between the rows of step `skip` and of the last step.

  A row's `seconds` leave out the phases that are not IN_STEP; together they are the time since the
  row before.

  Args:
    rows: of timings.jsonl, one per step.
    skip: step whose end begins the window.
    phase: sum this phase alone.
  """
  rows = [row for row in rows if row['step'] > skip]
  return sum(row.get(phase, 0.0) if phase else _between(row) for row in rows)


def beside_snapshots(rows: list[dict[str, Any]], every: int, skip: int) -> float:
  """Returns what snapshots add to a run, as a share, by the run alone: what other runs do is out.

  The steps that a snapshot touches are the one that it shows and the two after it, which pay for it
  and for writing; the others of the same run say what a step takes. All by medians over the run.

  Args:
    rows: of timings.jsonl, one per step.
    every: steps between snapshots, at least 5.
    skip: step whose end begins the window.
  """
  by_place: list[list[float]] = [[] for _ in range(every)]
  for row in rows:
    if row['step'] > skip:
      by_place[row['step'] % every].append(_between(row))
  usual = statistics.median(seconds for place in by_place[3:] for seconds in place)
  return (sum(statistics.median(place) for place in by_place[:3]) - 3 * usual) / (every * usual)


def _between(row: dict[str, Any]) -> float:
  """Returns the wall seconds between a row and the one before it."""
  return sum(value for name, value in row.items()
             if name == 'seconds' or (name.endswith('_seconds') and name not in IN_STEP))
