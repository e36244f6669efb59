"""The hop detector on published accuracies of Pythia and of OLMo's ladder, a table.

  python -m experiments.benchmarks.real_series --pythia=FOLDER --olmo=FOLDER

FOLDER/core_tasks.csv: model,num_fewshot,step,task,metric,value,stderr. FOLDER/downstream.csv.gz:
run,step,kind,task,value, without standard errors. The same thresholds as everywhere; a state is
being above or below a third of the way from the first level to that of the last half, as these
tasks have no pattern answer. Time is counted in checkpoints, however far apart. Checkpoints that
repeat others are dropped, those copied from another model belong to that one alone.
"""

import pathlib
from typing import NamedTuple

from absl import flags
import numpy as np

from experiments.benchmarks import command_line
from experiments.benchmarks.estimates import table
from research.dynamics import accuracies, contrasts, detector
from research.errors import UserError

PYTHIA = flags.DEFINE_string('pythia', None, 'folder with core_tasks.csv')
OLMO = flags.DEFINE_string('olmo', None, 'folder with downstream.csv.gz')
LATE = 0.3  # share of the steps after which training is late


class Found(NamedTuple):
  """What was found in one series.

  Attributes:
    series: without repeated and copied checkpoints.
    dropped: steps that were.
    hops: (task, step before, step after, change) of all tasks.
    n_late: hops after `LATE` of the steps.
    reason: why it could not be searched.
  """

  series: accuracies.Published
  dropped: list[int]
  hops: list[tuple[str, int, int, float]]
  n_late: int
  reason: str = ''


def search(series: accuracies.Published, copied: list[int]) -> Found:
  """Returns the hops of all tasks of one series, copied steps left out."""
  own, repeated = accuracies.without_repeats(series.at(~np.isin(series.steps, copied)))
  dropped = sorted(repeated + copied)
  if len(own.steps) < contrasts.least_checkpoints(detector.DWELL):
    return Found(own, dropped, [], 0, f'only {len(own.steps)} checkpoints of its own')
  levels = detector.series_of_errors(own.accuracy_KT, own.error_KT)
  found = detector.windows(levels, accuracies.center_of(own.accuracy_KT))
  hops = [(own.tasks[hop.dataset], int(own.steps[hop.before]), int(own.steps[hop.after]),
           hop.change) for hop in detector.find_hops(found, levels.mean, own.steps)]
  return Found(own, dropped, hops,
               sum(before >= LATE * own.steps[-1] for _, before, _, _ in hops))


def search_all(series: list[accuracies.Published]) -> list[Found]:
  """Returns what each series has; of copied steps the model whose name comes last is the source."""
  named = sorted(series, key=lambda one: one.model, reverse=True)
  found = []
  for i, one in enumerate(named):
    copied = sorted({s for source in named[:i] for s in accuracies.copied_steps(one, source)})
    found.append(search(one, copied))
  return found[::-1]


def pythia(folder: pathlib.Path, shots: int) -> list[Found]:
  """Returns what Pythia's models have; accuracies with zero or five demonstrations."""
  return search_all(accuracies.read_rows(
      folder / 'core_tasks.csv', 'model', error='stderr',
      where={'num_fewshot': str(shots), 'metric': 'acc'}))


def olmo(folder: pathlib.Path) -> list[Found]:
  """Returns what the runs of OLMo's ladder have."""
  return search_all(accuracies.read_rows(
      folder / 'downstream.csv.gz', 'run', where={'kind': 'downstream'}))


def show(title: str, found: list[Found]) -> None:
  """Prints a table of the hops of all series, and how many are late."""
  rows = []
  for one in found:
    text = '; '.join(f'{task} {before:,}-{after:,} {change:+.2f}'
                     for task, before, after, change in one.hops)
    dropped = (f'{len(one.dropped)} ({one.dropped[0]:,}-{one.dropped[-1]:,})' if one.dropped
               else '0')
    rows.append([one.series.model, str(len(one.series.steps)), dropped,
                 one.reason or text or 'none', str(one.n_late)])
  print(table([title, 'checkpoints', 'repeated or copied', 'hops (steps, change)', 'late'], rows))
  n_series = sum(len(one.series.tasks) for one in found if not one.reason)
  n_runs = sum(not one.reason for one in found)
  print(f'{sum(one.n_late > 0 for one in found)} of {n_runs} models have a hop in the late part '
        f'({n_series} series of a task)\n')


def main() -> None:
  if not PYTHIA.value and not OLMO.value:
    raise UserError('--pythia=FOLDER or --olmo=FOLDER is needed')
  for flag, name in ((PYTHIA, 'core_tasks.csv'), (OLMO, 'downstream.csv.gz')):
    if flag.value and not (pathlib.Path(flag.value) / name).is_file():
      raise UserError(f'--{flag.name}={flag.value} has no {name}')
  if PYTHIA.value:
    for shots in (0, 5):
      show(f'{shots} demonstrations', pythia(pathlib.Path(PYTHIA.value), shots))
  if OLMO.value:
    show('run', olmo(pathlib.Path(OLMO.value)))


if __name__ == '__main__':
  command_line.run(main)
