"""Commands of launchers.trajectory that write a run directory: average, interpolate."""

from absl import flags

from launchers.trajectory_looks import STEPS, looked_at
from research.dynamics import paths
from research.dynamics.derived import check_target, chosen_steps, write_derived
from research.dynamics.trajectory import RunTrajectory, open_trajectory
from research.errors import UserError
from research.run_dir import RunDir

DECAY = flags.DEFINE_float('decay', 0.0, 'average: decay of an exponential moving average; 0: mean')
AT = flags.DEFINE_float('at', 0.5, 'interpolate: 0 is the earlier checkpoint, 1 the later')
TO = flags.DEFINE_string('to', '', 'the run directory to write, a new one')


def _target() -> RunDir:
  if not TO.value:
    raise UserError('--to is missing; give a new directory, say --to=runs/mean')
  target = RunDir(TO.value)
  check_target(target)
  return target


def _own(location: str) -> RunTrajectory:
  trajectory = open_trajectory(location)
  if not isinstance(trajectory, RunTrajectory):
    raise UserError(f'{location} is a public series, without what a run directory needs; import '
                    'revisions with launchers.convert and average those of a run')
  return trajectory


def average(location: str) -> None:
  """Writes the mean or the moving average of checkpoints as a run directory."""
  target, trajectory = _target(), _own(location)
  steps = looked_at(trajectory)
  weights = (paths.ema_weights(len(steps), DECAY.value) if DECAY.value
             else paths.uniform_weights(len(steps)))
  write_derived(target, trajectory, paths.combined(trajectory, steps, weights),
                {'steps': steps, 'weights': weights.tolist()})
  print(f'average of {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}: {target.path}')


def interpolate(location: str) -> None:
  """Writes the point --at between two checkpoints as a run directory."""
  target, trajectory = _target(), _own(location)
  steps = chosen_steps(trajectory, STEPS.value, 2)
  if len(steps) != 2:
    raise UserError(f'--steps={",".join(STEPS.value)} must be two steps')
  weights = paths.line_weights(AT.value)
  write_derived(target, trajectory, paths.combined(trajectory, steps, weights),
                {'steps': steps, 'weights': weights.tolist()})
  print(f'point {AT.value:g} of the way from step {steps[0]} to {steps[1]}: {target.path}')
