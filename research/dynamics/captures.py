"""Captures: hops that were called or suspected, bracketed to one step by replay after the run.

The interval between the two snapshots is made again from the nearest full checkpoint in a directory
of its own, with a snapshot of every step, and bisected. A budget limits how many: hops that the
detector confirms come first, then the greatest changes.
"""

import dataclasses
import json
import time
from collections.abc import Iterable

from research.dynamics.analysis import analysis_of
from research.dynamics.bisect import above, bisect
from research.dynamics.original import Original, open_original
from research.errors import UserError
from research.monitors import table
from research.monitors.suspects import Suspect, Suspects
from research.run_dir import RunDir, write_whole
from research.training.logs import duration
from research.training.snapshots import SnapshotReader


@dataclasses.dataclass(frozen=True)
class Capture:
  """One captured change of side.

  Attributes:
    suspect: what was seen in training.
    found: the two adjacent steps between which the mean margin changes its sign.
    is_confirmed: whether the detector calls it a hop.
    n_replayed: steps that were made again.
    seconds: that it took, scoring included.
    run_dir: of the replay.
  """

  suspect: Suspect
  found: tuple[int, int]
  is_confirmed: bool
  n_replayed: int
  seconds: float
  run_dir: str

  def __str__(self) -> str:
    kind = 'a hop' if self.is_confirmed else 'suspected, no hop'
    return (f'captured: {self.suspect.dataset} ({kind}) changes sides between steps '
            f'{self.found[0]:,} and {self.found[1]:,}; {self.n_replayed} steps made again in '
            f'{duration(self.seconds)}, {self.run_dir}')


def suspects_of(run_dir: RunDir) -> list[Suspect]:
  """Returns the changes of side in the stored scores of a run, in order of time."""
  items, suspects, found = table.read_item_table(run_dir.monitor_items), Suspects(), []
  for step in table.score_steps(run_dir.monitor_scores):
    _, scores = table.read_scores(run_dir.monitor_scores / table.scores_name(step))
    rows = [row for row in table.summary(items, step, scores) if not row.is_control]
    found += suspects.add(step, table.dataset_means(rows, 'margin'))
  return found


def chosen(run_dir: RunDir, budget: int) -> list[tuple[Suspect, bool]]:
  """Returns the suspects to capture and whether each is a confirmed hop, the first of all first."""
  analysis, suspects = analysis_of(run_dir), suspects_of(run_dir)
  judged: dict[Suspect, bool] = dict.fromkeys(suspects, False)
  for dataset in analysis.datasets:
    for called in dataset.judged.confirmed if dataset.judged else ():
      # The checkpoint in the middle of a hop may be on either side of the center.
      before, after = (int(analysis.steps[called.hop.before - 1]),
                       int(analysis.steps[called.hop.after + 1]))
      seen = [one for one in suspects if one.dataset == dataset.name
              and one.before < after and before < one.after]
      judged |= dict.fromkeys(
          seen or [Suspect(dataset.name, before, after, called.hop.change)], True)
  return sorted(judged.items(), key=lambda pair: (not pair[1], -abs(pair[0].change)))[:budget]


def capture(run_dir: RunDir, budget: int) -> list[Capture]:
  """Brackets suspected hops of a finished run, prints and stores what was found.

  Repeating it makes nothing again, and what was captured before stays.

  Args:
    run_dir: of the run, which only gains captures.json.
    budget: captures, at most.

  Raises:
    UserError: nothing is monitored, or some could not be captured; the others are stored.
  """
  if not run_dir.monitor_items.exists():
    raise UserError(f'monitors.captures={budget}, but {run_dir.whole} has no monitors; set '
                    '--config.monitors.suite or leave captures at 0')
  original, wanted, failed = open_original(str(run_dir.whole)), chosen(run_dir, budget), []
  done = {one.suspect: one for one in _stored(run_dir)}
  for suspect, is_confirmed in wanted:
    try:
      if suspect not in done:
        done[suspect] = _captured(original, suspect, is_confirmed)
        _store(run_dir, done.values())
      print(done[suspect], flush=True)
    except UserError as error:
      failed.append(f'{suspect.dataset} between steps {suspect.before} and {suspect.after}: {error}')
  made = [done[suspect] for suspect, _ in wanted if suspect in done]
  print(f'{len(made)} of at most {budget} captures in '
        f'{duration(sum(one.seconds for one in made))}', flush=True)
  if failed:
    raise UserError('not captured: ' + '; '.join(failed))
  return made


def _store(run_dir: RunDir, done: Iterable[Capture]) -> None:
  """Writes captures.json."""
  write_whole(run_dir.captures_json, json.dumps(
      [{**dataclasses.asdict(one), 'suspect': one.suspect._asdict()} for one in done], indent=1)
      + '\n')


def _stored(run_dir: RunDir) -> list[Capture]:
  """Returns the captures of a run that were made before and whose replays are still there."""
  if not run_dir.captures_json.exists():
    return []
  rows = json.loads(run_dir.captures_json.read_text(encoding='utf-8'))
  made = [Capture(**row | {'suspect': Suspect(**row['suspect']), 'found': tuple(row['found'])})
          for row in rows]
  return [one for one in made if RunDir(one.run_dir).done.exists()]


def _captured(original: Original, suspect: Suspect, is_confirmed: bool) -> Capture:
  began = time.perf_counter()
  between = suspect.before, suspect.after
  replayed = RunDir(f'{original.path}-capture-{suspect.before}-{suspect.after}')
  _check_replay(original, replayed, suspect.before)
  found = bisect(original, replayed, between, suspect.dataset, above('margin')).found
  return Capture(suspect, found, is_confirmed,
                 suspect.after - original.nearest_state(suspect.before),
                 time.perf_counter() - began, str(replayed.whole))


def _check_replay(original: Original, replayed: RunDir, step: int) -> None:
  """Raises UserError where a directory holds the replay of an earlier run of the same name."""
  then = SnapshotReader(replayed.snapshots).commits.get(step, {}).get('tensors')
  now = original.snapshots.commits[step].get('tensors')
  if then is not None and then != now:
    raise UserError(f'{replayed.path} is the replay of another run; remove or rename it')
