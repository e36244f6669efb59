r"""Finds the two adjacent steps between which a monitor changes state, by replaying the interval.

  python -m launchers.bisect --run_dir=runs/quickstart --between=1300:1340 --dataset=successive
  python -m launchers.bisect --run_dir=runs/quickstart --between=1300:1340 --dataset=successive \
      --measure=margin --threshold=0.1

The interval is replayed once with a snapshot of every step; a binary search scores a few of them,
then all are scored, which confirms the result and lists every change where there are several. The
state is whether the accuracy is above 0.5 (the margin above 0) unless --threshold says otherwise.
The replay's directory holds bisection-<question>.json, documents-<question>.parquet (what the
found step was trained on), all snapshots and a report. Another dataset or threshold between the
same steps is answered from the same directory without training. Repeating the command resumes.
"""

import pathlib

from absl import flags

from launchers import flags as shared
from research.data.edits import parse_window
from research.dynamics import bisect as bisect_lib
from research.dynamics.original import open_original
from research.run_dir import RunDir

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of the run, which is only read')
BETWEEN = flags.DEFINE_string('between', '', 'A:B: steps on either side of the change')
DATASET = flags.DEFINE_string('dataset', '', 'a dataset of the monitor items, or a family')
MEASURE = flags.DEFINE_string('measure', 'accuracy', 'accuracy or margin')
THRESHOLD = flags.DEFINE_float('threshold', None, 'the state is whether the measure is above it; '
                               'default 0.5 for accuracy, 0 for the margin')
TO = flags.DEFINE_string('to', '', 'where the replay is written; default <run_dir>-bisect-A-B')


def main() -> None:
  state = bisect_lib.above(MEASURE.value, THRESHOLD.value)
  original = open_original(RUN_DIR.value)
  a, b = parse_window(BETWEEN.value, '--between')
  path = pathlib.Path(TO.value or f'{original.path}-bisect-{a}-{b}')
  print(bisect_lib.bisect(original, RunDir(path), (a, b), DATASET.value, state,
                          shared.overrides()))
  print(f'written to {path}')


if __name__ == '__main__':
  shared.run(main)
