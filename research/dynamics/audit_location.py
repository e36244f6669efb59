"""The audit of whatever a location holds: a run directory, or any other trajectory."""

from collections.abc import Callable

from research.dynamics.audit import audit_series
from research.dynamics.audit_content import Finding, Followed
from research.dynamics.audit_run import audit_run
from research.dynamics.trajectory import open_trajectory
from research.run_dir import RunDir


def audit_location(location: str, progress: Callable[[str, int, int], None] | None = None
                   ) -> tuple[list[Finding], dict[str, Followed]]:
  """Returns all that is wrong with a trajectory, and the history of each of its tensors.

  Of a run the files, hashes, records and learning rates are judged too; of anything else the
  tensors alone.

  Raises:
    UserError: there is no trajectory.
  """
  run_dir = RunDir(location)
  if run_dir.manifest_json.exists() and run_dir.config_json.exists():
    return audit_run(run_dir, progress)
  return audit_series(open_trajectory(location), progress=progress)
