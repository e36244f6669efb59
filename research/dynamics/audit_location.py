"""The audit of whatever a location holds: a run directory, or any other trajectory."""

from collections.abc import Callable

from research.dynamics.audit import audit_series
from research.dynamics.audit_content import Finding, Followed
from research.dynamics.audit_run import audit_run
from research.dynamics.pieces import PieceSeries
from research.dynamics.public import UnusableError
from research.dynamics.public_trajectory import PublicTrajectory
from research.dynamics.trajectory import open_trajectory
from research.errors import UserError
from research.run_dir import RunDir
from research.training import manifest as manifest_lib

Progress = Callable[[str, int, int], None]
Audit = tuple[list[Finding], dict[str, Followed]]


def audit_location(location: str, progress: Progress | None = None) -> Audit:
  """Returns all that is wrong with a trajectory, and the history of each of its tensors.

  Of a run the files, hashes, records and learning rates are judged too; of a public series whether
  its files are whole, and the tensors.

  Raises:
    UserError: there is no trajectory.
  """
  run_dir = RunDir(location)
  if _is_run(run_dir):
    return audit_run(run_dir, progress)  # Where nothing is left to open, that is a finding.
  return audit_public(open_trajectory(location), progress)


def _is_run(run_dir: RunDir) -> bool:
  """Returns whether a directory is that of a run of ours, though files of it may be lost."""
  if run_dir.snapshots.is_dir() or run_dir.checkpoints.is_dir():
    return run_dir.config_json.exists() or run_dir.manifest_json.exists()
  if not run_dir.manifest_json.exists():
    return False
  try:
    return 'series' not in manifest_lib.read(run_dir)
  except ValueError as error:
    raise UserError(f'{run_dir.manifest_json} cannot be read ({error}), and nothing beside it says '
                    'what it was about') from error


def audit_public(trajectory: PublicTrajectory, progress: Progress | None = None) -> Audit:
  """Returns what is wrong with a public series: revisions that cannot be used, each once, then
  what the tensors of the others say. They are read in pieces (`research.dynamics.pieces`), a few
  revisions of one in memory at once; but all the files must fit on the disk."""
  findings, sound = [], []
  for number, step in enumerate(trajectory.steps):
    if progress:
      progress(f'opening {trajectory.name_of(step)}', number, len(trajectory.steps))
    try:
      trajectory.checkpoint(step)
      sound.append(step)
    except UnusableError as error:
      findings.append(Finding(error.kind, step, str(error.path), '', str(error)))
  histories: dict[str, Followed] = {}
  if sound:
    more, histories = audit_series(PieceSeries(trajectory, sound), progress=progress)
    findings += more
  return sorted((_named(trajectory, finding) for finding in findings),
                key=lambda finding: finding.step), histories


def _named(trajectory: PublicTrajectory, finding: Finding) -> Finding:
  """Returns a finding that names its revision, which the files in a cache do not."""
  name = trajectory.name_of(finding.step)
  if name in finding.file:
    return finding
  return finding._replace(problem=f'{finding.problem} (revision {name})')
