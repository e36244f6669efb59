"""Commands of launchers.trajectory that only read: list, audit, distance."""

import json
import pathlib
import sys

from absl import flags

from research.dynamics import audit as audit_lib
from research.dynamics import paths
from research.dynamics.audit_location import audit_location
from research.dynamics.derived import chosen_steps
from research.dynamics.trajectory import Trajectory, open_trajectory
from research.errors import UserError

STEPS = flags.DEFINE_list('steps', [], 'steps of checkpoints, separated by commas')
LAST = flags.DEFINE_integer('last', 10, 'how many checkpoints, the newest, where --steps is not '
                            'given', lower_bound=2)
TABLE = flags.DEFINE_string(
    'table', '', 'audit: norms of every tensor and step; distance: every pair. A .csv or .parquet')
JSON = flags.DEFINE_bool('json', False, 'print JSON')


def _progress(name: str, done: int, of: int) -> None:
  if sys.stderr.isatty():
    print(f'\x1b[2K[{done + 1}/{of}] {name}', end='\r', file=sys.stderr, flush=True)


def looked_at(trajectory: Trajectory) -> list[int]:
  """Returns the steps of --steps or --last; raises UserError where both are given."""
  if STEPS.value and flags.FLAGS['last'].present:
    raise UserError('give --steps or --last, not both')
  return chosen_steps(trajectory, STEPS.value, LAST.value)


def list_steps(location: str) -> None:
  """Prints a line per checkpoint."""
  trajectory = open_trajectory(location)
  rows = [{'step': step, 'tokens': trajectory.tokens(step),
           'path': str(trajectory.file_of(step, trajectory.names[0]))} for step in trajectory.steps]
  for row in rows:
    print(json.dumps(row) if JSON.value else f'{row["step"]:>10}  {row["tokens"]!s:>14}  {row["path"]}')


def audit(location: str) -> int:
  """Prints what is wrong; returns 1 if anything is."""
  findings, histories = audit_location(location, _progress)
  if TABLE.value:
    audit_lib.write_table(audit_lib.norms_table(histories), pathlib.Path(TABLE.value))
  for finding in findings:
    print(json.dumps(finding._asdict()) if JSON.value else finding)
  n_read = sum(len(followed.steps) for followed in histories.values())
  print(f'{location}: {len(findings)} findings in {n_read} tensors', file=sys.stderr)
  return int(bool(findings))


def distance(location: str) -> None:
  """Prints mean and least distances by lag, and writes those of all pairs."""
  trajectory = open_trajectory(location)
  steps = looked_at(trajectory)
  table = paths.cyclic_table(steps, paths.distances(trajectory, steps, _progress),
                             paths.norms(trajectory, steps))
  if TABLE.value:
    audit_lib.write_table(table, pathlib.Path(TABLE.value))
  for row in paths.by_lag(table).to_pylist():
    print(json.dumps(row) if JSON.value else '  '.join(f'{k} {v:.4g}' for k, v in row.items()))
