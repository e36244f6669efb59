"""Writes what a window of steps was trained on, document by document, to Parquet or JSON lines.

  python -m launchers.window --run_dir=runs/quickstart --steps=1300:1340 --to=window.parquet

One row per document: step (that of the metrics row whose update it entered), row of the batch,
position and number of its tokens, source, kind (family of the micro-world, entry of data.*.paths),
id, masked, text. Of a counterfactual replay it is the edited data.
"""

import pathlib

from absl import flags

from launchers import flags as shared
from research.data.edits import parse_window
from research.dynamics.original import check_range, open_original, trained_on
from research.data.windows import write_documents

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of a run')
STEPS = flags.DEFINE_string('steps', '', 'A:B: what took the state of step A to that of step B')
TO = flags.DEFINE_string('to', '', 'file ending in .parquet or .jsonl; default '
                         '<run_dir>-window-A-B.parquet')


def main() -> None:
  original = open_original(RUN_DIR.value)
  a, b = parse_window(STEPS.value, '--steps')
  check_range(original, a, b, '--steps')
  path = pathlib.Path(TO.value or f'{original.path}-window-{a}-{b}.parquet')
  n_documents = write_documents(path, trained_on(original), original.config.data.batch_size, a, b)
  print(f'{n_documents:,} documents of steps {a} to {b}: {path}')


if __name__ == '__main__':
  shared.run(main)
