r"""Looks into the checkpoints of a run or a public series: lists, audits, averages, measures.

  python -m launchers.trajectory list runs/quickstart
  python -m launchers.trajectory audit runs/quickstart --table=norms.parquet
  python -m launchers.trajectory average runs/quickstart --steps=2000,2200,2400 --to=runs/mean
  python -m launchers.trajectory average runs/quickstart --last=10 --decay=0.8 --to=runs/ema
  python -m launchers.trajectory interpolate runs/quickstart --steps=600,2400 --at=0.5 --to=runs/half
  python -m launchers.trajectory distance runs/quickstart --last=100 --table=distances.csv
  python -m launchers.trajectory audit folder/of/revisions
  python -m launchers.trajectory list owner/repository@'stage1-step*'

list         steps, tokens seen and where each checkpoint lies
audit        reads every tensor and names what is missing, truncated, changed, swapped, duplicated,
             spliced, of another dtype, not finite, or moved as no learning rate explains; ends with
             code 1 where something is wrong. Works without hashes too
average      uniform mean of checkpoints, or with --decay their exponential moving average
interpolate  the point --at on the line between two checkpoints
distance     distances between checkpoints, and whether the way between them closes a cycle

A public series is a folder with a sub-folder for each revision, or a repository; those of which the
name says the step are its checkpoints, or those that a pattern after @ matches. launchers.monitor
scores them. Steps are counted through all stages of it.

average and interpolate need a run of our own. What they write is a run directory: launchers.score
scores it, launchers.sample writes texts with it, and --config.start.run_dir trains on from it.
"""

from absl import flags

from launchers import flags as shared
from launchers import trajectory_looks as looks
from launchers import trajectory_points as points
from research.errors import UserError

COMMANDS = {'list': looks.list_steps, 'audit': looks.audit, 'distance': looks.distance,
            'average': points.average, 'interpolate': points.interpolate}
USED = {  # flags by command
    'list': ['json'], 'audit': ['table', 'json'], 'distance': ['steps', 'last', 'table', 'json'],
    'average': ['steps', 'last', 'decay', 'to'], 'interpolate': ['steps', 'at', 'to']}

for module in (looks, points):
  flags.adopt_module_key_flags(module)


def main(command: str, location: str) -> int | None:
  if command not in COMMANDS:
    raise UserError(f'{command!r} is no command; choose one of {", ".join(COMMANDS)}')
  shared.check_used(command, USED)
  return COMMANDS[command](location)


if __name__ == '__main__':
  shared.run(main, ('command', 'location'))
