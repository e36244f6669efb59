r"""Makes steps of a run again, bit for bit, with denser snapshots or other monitors, and checks it.

  python -m launchers.replay --run_dir=runs/quickstart --steps=1300:1340 \
      --config.checkpoints.snapshot_every=1
  python -m launchers.replay --run_dir=runs/quickstart --steps=0:200 \
      --config.monitors.suite=my_items.jsonl

It starts from the nearest full checkpoint before the range (or from initialization: keep more of
them with --config.checkpoints.keep=0 when training) and writes a run directory of its own; the
original is only read. Rows, snapshots, scores and checkpoints that both have are compared bit for
bit on the way; a difference on the same mesh, machine and packages is an error, else it is stated.
Placement settings of the run (mesh, checkpoints, monitors, evals, logging) can be overridden with
--config.<name>=<value>. Repeating the command resumes.
"""

import pathlib

from absl import flags

from launchers import flags as shared
from research.data.edits import parse_window
from research.dynamics.original import open_original
from research.dynamics.replay import replay
from research.run_dir import RunDir

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of the run, which is only read')
STEPS = flags.DEFINE_string('steps', '', 'A:B: the first and the last state that is observed')
TO = flags.DEFINE_string('to', '', 'where the replay is written; default <run_dir>-replay-A-B')


def main() -> None:
  original = open_original(RUN_DIR.value)
  a, b = parse_window(STEPS.value, '--steps')
  path = pathlib.Path(TO.value or f'{original.path}-replay-{a}-{b}')
  print(replay(original, RunDir(path), (a, b), shared.overrides()))


if __name__ == '__main__':
  shared.run(main)
