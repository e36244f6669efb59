r"""Makes a run again with other data in some steps, all else equal, and compares the two.

  python -m launchers.counterfactual --run_dir=runs/quickstart --edit='swap 1200:1260 1320:1380'
  python -m launchers.counterfactual --run_dir=runs/quickstart --edit='mask 1200:1260 successive' \
      --until=1500 --to=runs/without_successive
  python -m launchers.counterfactual --run_dir=runs/quickstart --edit='reorder 1200:1260 7' \
      --edit='replace 1260:1320 0:60'

A window A:B is the data that takes the state of step A to that of step B. Edits, in order:
  swap A:B C:D         the two windows change places
  replace A:B C:D      A:B is fed what C:D is fed
  reorder A:B [SEED]   the rows of the window are permuted
  mask A:B [KIND ...]  rows of these kinds (families, entries of data.*.paths; none named: all)
                       are taken out of the loss, a mean over tokens: what is left of a batch
                       weighs more
Everything before the first changed batch is checked to be equal to the original, bit for bit. The
replay's directory is a run directory with its own report, comparison.csv and comparison.png. The
loss is compared over steps that were fed the same batch in both runs.
Placement settings can be overridden with --config.<name>=<value>. Repeating the command resumes.
"""

import pathlib

from absl import flags

from launchers import flags as shared
from research.data.edits import parse_edit
from research.dynamics.counterfactual import as_text, counterfactual
from research.dynamics.original import open_original
from research.reports.comparison import write_comparison
from research.run_dir import RunDir

RUN_DIR = flags.DEFINE_string('run_dir', '', 'directory of the run, which is only read')
EDIT = flags.DEFINE_multi_string('edit', [], 'a change of the data, as above; may be repeated')
UNTIL = flags.DEFINE_integer('until', -1, 'the last step that is made; -1: the last of the run')
TO = flags.DEFINE_string('to', '', 'where it is written; default <run_dir>-<edits>')


def main() -> None:
  original = open_original(RUN_DIR.value)
  edits = [parse_edit(text) for text in EDIT.value]
  until = original.last if UNTIL.value == -1 else UNTIL.value
  name = '-'.join(str(edit).replace(' ', '-').replace(':', '_').replace('/', '_')
                  for edit in edits)
  run_dir = RunDir(pathlib.Path(TO.value or f'{original.path}-{name}'))
  said, compared = counterfactual(original, run_dir, edits, until, shared.overrides())
  if compared:
    write_comparison(run_dir.comparison_png, compared, edits)
  print(f'{said}\n{as_text(compared)}\nwritten to {run_dir.path}')


if __name__ == '__main__':
  shared.run(main)
