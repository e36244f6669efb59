"""Several runs of one experiment side by side: hops per dataset and seed, as Markdown."""

import dataclasses
from collections.abc import Sequence

from research.dynamics.analysis import Analysis, Dataset, analysis_of
from research.dynamics.states import State
from research.errors import UserError
from research.reports import words
from research.reports.records import Records, read_records
from research.run_dir import RunDir


@dataclasses.dataclass(frozen=True)
class SeedRun:
  """One run of a comparison."""

  label: str
  analysis: Analysis
  records: Records


def read_seed_runs(run_dirs: Sequence[RunDir]) -> list[SeedRun]:
  """Returns the runs with their hops, labeled by directory.

  Raises:
    UserError: a run was not monitored, or there is no run.
  """
  if not run_dirs:
    raise UserError('a comparison needs at least one run directory')
  runs = []
  for run_dir in run_dirs:
    analysis = analysis_of(run_dir)
    if not len(analysis.steps):
      raise UserError(f'{run_dir.path} has no monitor scores in {run_dir.monitor_scores}')
    runs.append(SeedRun(run_dir.path.name, analysis, read_records(run_dir)))
  return runs


def dataset_names(runs: Sequence[SeedRun]) -> list[str]:
  """Returns the names of the datasets that any run scored, controls left out."""
  return sorted({dataset.name for run in runs for dataset in run.analysis.datasets})


def seeds_table(runs: Sequence[SeedRun]) -> str:
  """Returns a Markdown table: one row per run, one column per dataset, then the controls.

  A cell holds the confirmed hops, with the prompt variants in which each is found, how many more
  came with restless controls, the share of generalizing and pattern checkpoints, and the last
  accuracy.
  """
  names = dataset_names(runs)
  heads = ['run', *(words.title(name) for name in names), 'controls', 'loss']
  lines = [_line(heads), _line(['---'] * len(heads))]
  for run in runs:
    datasets = {dataset.name: dataset for dataset in run.analysis.datasets}
    cells = [_dataset_cell(datasets.get(name)) for name in names]
    lines.append(_line([run.label, *cells, _control_cell(run.analysis), _loss(run.records)]))
  return '\n'.join(lines) + '\n'


def hop_sentences(runs: Sequence[SeedRun]) -> str:
  """Returns, per dataset, its confirmed hops run by run, and on how many the controls were calm."""
  lines, n_still = [], 0
  for name in dataset_names(runs):
    judged = [dataset for run in runs for dataset in run.analysis.datasets
              if dataset.name == name and dataset.judged]
    hops = [dataset.n_hops for dataset in judged]
    if any(hops):
      lines.append(f'- {words.title(name)}: hops on {sum(map(bool, hops))} of '
                   f'{words.count(len(hops), "run")} ({", ".join(map(str, hops))})')
    n_still += bool(judged) and not any(hops)
  lines.append(f'- {words.count(n_still, "dataset")} without a hop on any run')
  calm = sum(run.analysis.controls is not None and run.analysis.controls.calm for run in runs)
  lines.append(f'- Controls: calm on {calm} of {words.count(len(runs), "run")}')
  return '\n'.join(lines) + '\n'


def seeds_report(run_dirs: Sequence[RunDir]) -> str:
  """Returns the table of all runs and, for each experiment among them, its hop sentences.

  Runs of one experiment differ in the part of their name that begins with `-seed`.

  Raises:
    UserError: a run was not monitored.
  """
  runs = read_seed_runs(run_dirs)
  groups: dict[str, list[SeedRun]] = {}
  for run, run_dir in zip(runs, run_dirs, strict=True):
    groups.setdefault(run_dir.path.name.partition('-seed')[0], []).append(run)
  sentences = [f'{name}:\n{hop_sentences(members)}' for name, members in groups.items()]
  return '\n'.join([seeds_table(runs), *sentences])


def _line(cells):
  return '| ' + ' | '.join(cells) + ' |'


def _dataset_cell(dataset: Dataset | None):
  if dataset is None:
    return 'not scored'
  last = f'last {dataset.accuracy.mean[-1]:.2f}'
  if dataset.judged is None:
    return f'too little to say; {last}'
  judged = dataset.judged
  hops = words.count(dataset.n_hops, 'hop')
  if dataset.n_hops:
    found = ', '.join(f'{one.n_agreeing} of {one.n_variants}' for one in judged.confirmed)
    hops += f' (in {found} variants)'
  if len(judged.hops) > dataset.n_hops:
    hops += f', {len(judged.hops) - dataset.n_hops} more with restless controls'
  return (f'{hops}; generalizing {judged.occupancy[State.GENERALIZING]:.0%}, pattern '
          f'{judged.occupancy[State.PATTERN]:.0%}; {last}')


def _control_cell(analysis):
  state = analysis.controls
  if state is None:
    return 'none'
  if state.settled_step is None:
    return f'never settled at {state.level:.3f}'
  verdict = 'calm' if state.calm else f'{len(state.outside_steps)} snapshots outside'
  return (f'{verdict}: at most {state.largest_deviation:.3f} off {state.level:.3f} from step '
          f'{state.settled_step:,} (tolerance {state.tolerance:.3f}, {state.n_items:,} items)')


def _loss(records):
  for table, key in ((records.evals, 'heldout_loss'), (records.metrics, 'loss')):
    if key in table:
      return f'{table[key].values[-1]:.3f} {"held out" if key == "heldout_loss" else "training"}'
  return 'not recorded'
