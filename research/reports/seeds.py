"""Several runs of one experiment side by side: swings per family and seed, as Markdown."""

import dataclasses
from collections.abc import Sequence

from research.dynamics.analysis import Analysis, Family, analyze
from research.dynamics.curves import read_curves
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
  """Returns the runs with their swings, labeled by directory.

  Raises:
    UserError: a run was not monitored, or there is no run.
  """
  if not run_dirs:
    raise UserError('a comparison needs at least one run directory')
  runs = []
  for run_dir in run_dirs:
    analysis = analyze(read_curves(run_dir.monitor_items, run_dir.monitor_scores))
    if not len(analysis.steps):
      raise UserError(f'{run_dir.path} has no monitor scores in {run_dir.monitor_scores}')
    runs.append(SeedRun(run_dir.path.name, analysis, read_records(run_dir)))
  return runs


def family_names(runs: Sequence[SeedRun]) -> list[str]:
  """Returns the names of the families that any run scored, controls left out."""
  return sorted({family.name for run in runs for family in run.analysis.families})


def seeds_table(runs: Sequence[SeedRun]) -> str:
  """Returns a Markdown table: one row per run, one column per family, then the controls.

  A cell holds the swings after the first rise, how many of them came with calm controls where
  that is fewer, the steps and levels of the first rise, and the last accuracy.
  """
  names = family_names(runs)
  heads = ['run', *(words.title(name) for name in names), 'controls', 'loss']
  lines = [_line(heads), _line(['---'] * len(heads))]
  for run in runs:
    families = {family.name: family for family in run.analysis.families}
    cells = [_family_cell(families.get(name)) for name in names]
    lines.append(_line([run.label, *cells, _control_cell(run.analysis), _loss(run.records)]))
  return '\n'.join(lines) + '\n'


def swings_table(runs: Sequence[SeedRun]) -> str:
  """Returns a Markdown table of every swing of every run, in order of family, run and time."""
  heads = ['family', 'run', 'towards', 'steps', 'accuracy', 'contexts', 'controls', 'counts as']
  lines = [_line(heads), _line(['---'] * len(heads))]
  for name in family_names(runs):
    for run in runs:
      for family in run.analysis.families:
        if family.name == name:
          lines += [_line(_swing_cells(family, run.label, judged)) for judged in family.swings]
  return '\n'.join(lines) + '\n'


def n_runs_with_hops(runs: Sequence[SeedRun], family: str, least: int = 3) -> int:
  """Returns how many runs made at least `least` swings after the first rise of a family.

  A family with too few items or demonstration contexts does not count.
  """
  return sum(
      any(f.name == family and f.is_large_enough and len(f.hops) >= least
          for f in run.analysis.families)
      for run in runs)


def hop_sentences(runs: Sequence[SeedRun], least: int = 3) -> str:
  """Returns, per family, on how many runs it made at least `least` swings, and calm controls."""
  lines = [
      f'- {words.title(name)}: at least {words.count(least, "swing")} after the first rise on '
      f'{n_runs_with_hops(runs, name, least)} of {words.count(len(runs), "run")}'
      for name in family_names(runs)]
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


def _family_cell(family: Family | None):
  if family is None:
    return 'not scored'
  claimed = sum(judged.claimed is True for judged in family.hops)
  hops = words.count(len(family.hops), 'swing')
  if any(judged.claimed is False for judged in family.hops):
    hops += f' ({claimed} with calm controls)'
  rise = 'never rose by 0.4'
  if family.first_rise:
    swing = family.first_rise.swing
    rise = (f'rose {swing.from_level:.2f} to {swing.to_level:.2f} in steps {swing.leave_step:,} '
            f'to {swing.arrive_step:,}')
  return f'{hops}; {rise}; last {family.accuracy.mean[-1]:.2f}'


def _control_cell(analysis):
  state = analysis.controls
  if state is None:
    return 'none'
  if state.settled_step is None:
    return f'never settled at {state.level:.3f}'
  verdict = 'calm' if state.calm else f'{len(state.outside_steps)} snapshots outside'
  return (f'{verdict}: at most {state.largest_deviation:.3f} off {state.level:.3f} from step '
          f'{state.settled_step:,} (tolerance {state.tolerance:.3f}, {state.n_items:,} items)')


def _swing_cells(family, label, judged):
  swing = judged.swing
  role = 'hop' if judged.is_after_first_rise else 'first rise' if judged.is_first_rise else 'fall'
  return [
      words.title(family.name), label,
      'generalizing' if swing.direction == 'up' else 'shortcut',
      f'{swing.leave_step:,} to {swing.arrive_step:,}',
      f'{swing.from_level:.2f} to {swing.to_level:.2f}',
      f'{judged.n_contexts_moved} of {len(family.contexts)}',
      {None: 'none', True: 'calm', False: 'restless'}[judged.claimed], role]


def _loss(records):
  for table, key in ((records.evals, 'heldout_loss'), (records.metrics, 'loss')):
    if key in table:
      return f'{table[key].values[-1]:.3f} {"held out" if key == "heldout_loss" else "training"}'
  return 'not recorded'
