"""Compares the memory that shapes predict with the compiler's, over meshes, models and TPU chips.

  python -m experiments.benchmarks.memory_prediction --json=memory.json
  python -m experiments.benchmarks.memory_prediction --json=memory.json --cases=judging

No TPU is needed, but libtpu is (pip install -e '.[tpu]'): each step is compiled up to its buffer
assignment, which takes 10 to 100 seconds on two cores. The formulas of
`research.training.memory` were fitted to the cases 'calibration' and committed (809a0c6) before
those of 'judging' were compiled. Afterwards norms after branches (`saved_bytes`) and the tensor
axis (`_work_bytes`) got a term each, and whole weights kept with remat 'none' lost theirs, judged
by the cases 'later' and 'unseen'. Then gathers over whole slices began to go in two levels, and
terms were fitted anew to programs of all four and committed (cc3c734) before those of 'fresh' were
compiled. The terms of experts changed after that (4e58775), judged by 'newest', and the loss of
pipelines (0b8d9e6), judged by 'pipelines'. What the JSON file holds already is not compiled again.
"""

import json
import pathlib
from typing import Any

from absl import flags

from experiments.benchmarks import command_line
from experiments.benchmarks.estimates import table
from experiments.benchmarks.memory_cases import (
    Case,
    calibration,
    compiled_bytes,
    fresh,
    judging,
    later,
    newest,
    pipelines,
    predicted,
    unseen,
)
from research.run_dir import write_whole

GROUPS = {'calibration': calibration, 'judging': judging, 'later': later, 'unseen': unseen,
          'fresh': fresh, 'newest': newest, 'pipelines': pipelines}
CASES = flags.DEFINE_list('cases', list(GROUPS), f'of {", ".join(GROUPS)}')
JSON = flags.DEFINE_string('json', 'memory_prediction.json', 'where the figures go and come from')
MIB = 2**20


def row(case: Case, measured: dict[str, Any]) -> list[str]:
  """Returns a line of the table."""
  prediction = predicted(case)
  error = prediction.peak / measured['total'] - 1
  return [case.name, f'{prediction.arguments - measured["arguments"]:d}',
          f'{measured["total"] / MIB:,.0f}', f'{prediction.peak / MIB:,.0f}', f'{error:+.1%}',
          prediction.moment, 'fits' if prediction.fits else 'not sure',
          'refused' if measured['refused'] else 'fits']


def main() -> None:
  """Compiles what is missing, one case after another, and prints the tables."""
  path = pathlib.Path(JSON.value)
  known = json.loads(path.read_text()) if path.exists() else {}
  for group in command_line.chosen(CASES, GROUPS):
    cases = GROUPS[group]()
    for i, case in enumerate(cases):
      if case.name not in known:
        print(f'{group} {i + 1} of {len(cases)}: {case.name}', flush=True)
        known[case.name] = compiled_bytes(case)
        write_whole(path, json.dumps(known, indent=2) + '\n')
    print(f'\n### {group}\n\n' + table(
        ['case', 'arguments off by', 'compiled MiB', 'predicted MiB', 'error', 'fullest moment',
         'predicted', 'compiler'], [row(case, known[case.name]) for case in cases]))
    errors = sorted(abs(predicted(case).peak / known[case.name]['total'] - 1) for case in cases)
    print(f'\nabsolute error: median {errors[len(errors) // 2]:.1%}, largest {errors[-1]:.1%}; '
          f'within 15%: {sum(error <= 0.15 for error in errors)} of {len(errors)}; '
          f'JSON: {path}')


if __name__ == '__main__':
  command_line.run(main)
