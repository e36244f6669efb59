"""Captures: hops that were called or suspected, bracketed to one step by replay after the run.

The interval between two neighboring snapshots is made again from the nearest full checkpoint in a
directory of its own, with a snapshot of every step, and bisected. A budget limits how many: hops
that the detector confirms come first, then what it cannot judge, as `Suspects.ranked` has it; a
change that it could judge and does not confirm is none. A capture begins less than
checkpoints.every steps before its interval or is not made: full checkpoints of what is suspected
stay (`Suspects.needed`), that of a hop which only the detector sees may be gone.
"""

import dataclasses
import json
import time
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from research.config import ExperimentConfig
from research.dynamics.analysis import Analysis, Dataset, analysis_of
from research.dynamics.bisect import above, bisect
from research.dynamics.hops import CalledHop
from research.dynamics.original import Original, open_original
from research.errors import UserError
from research.monitors.suspects import DWELL, Suspect, Suspects
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

  def told(self, every: int) -> str:
    """Returns it in words; `every` is the interval between full checkpoints."""
    kind = 'a hop' if self.is_confirmed else 'suspected, beyond what the detector can tell'
    more = self.n_replayed - every
    bound = f'no more than checkpoints.every={every:,}'
    if more > 0:
      bound = f'{more:,} more than checkpoints.every={every:,}, as one lies between the snapshots'
    return (f'captured: {self.suspect.dataset} ({kind}) changes sides between steps '
            f'{self.found[0]:,} and {self.found[1]:,}; {self.n_replayed:,} steps made again '
            f'({bound}) in {duration(self.seconds)}, {self.run_dir}')


def check_settings(config: ExperimentConfig) -> None:
  """Raises UserError, before a run begins, where its captures could not be made."""
  n, monitors = config.monitors.captures, config.monitors
  if n and (monitors.suite == 'none' or not config.checkpoints.snapshot_every):
    raise UserError(f'monitors.captures={n} captures what monitors see, but monitors.suite='
                    f'{monitors.suite!r} and checkpoints.snapshot_every='
                    f'{config.checkpoints.snapshot_every}; set both, or leave captures at 0')


def suspects_of(analysis: Analysis) -> list[Suspect]:
  """Returns the changes of side that training saw, as `Suspects.ranked`."""
  suspects = Suspects()
  for i, step in enumerate(analysis.steps.tolist()):
    suspects.add(step, {dataset.name: float(dataset.margin.mean[i])
                        for dataset in analysis.datasets})
  return suspects.ranked()


def chosen(run_dir: RunDir) -> list[tuple[Suspect, bool]]:
  """Returns what may be captured and whether each is a confirmed hop, the first of all first."""
  analysis = analysis_of(run_dir)
  suspects = suspects_of(analysis)
  judged: dict[Suspect, bool] = dict.fromkeys(suspects, False)
  for dataset in analysis.datasets:
    for called in dataset.judged.confirmed if dataset.judged else ():
      # The checkpoint in the middle of a hop may be on either side of the center.
      first, last = called.hop.before - 1, called.hop.after + 1
      seen = [one for one in suspects if one.dataset == dataset.name
              and one.before < analysis.steps[last] and analysis.steps[first] < one.after]
      judged |= dict.fromkeys(seen or [_unsuspected(dataset, called, analysis.steps)], True)
  open_ones = [(one, is_hop) for one, is_hop in judged.items()
               if is_hop or not _is_refuted(one, analysis)]
  return sorted(open_ones, key=lambda pair: not pair[1])


def _is_refuted(suspect: Suspect, analysis: Analysis) -> bool:
  """Returns whether the detector could have called a suspect that it does not call."""
  row = next(row for row in analysis.datasets if row.name == suspect.dataset).judged
  n_after = np.count_nonzero(analysis.steps >= suspect.after)
  return row is not None and not row.is_blind and n_after >= DWELL


def _unsuspected(dataset: Dataset, called: CalledHop, steps: np.ndarray) -> Suspect:
  """Returns a hop that nobody suspected, between the snapshots beside the center."""
  first, last = called.hop.before - 1, called.hop.after + 1
  is_above = dataset.margin.mean[first:last + 1] > 0
  crossed = np.flatnonzero(is_above[1:] != is_above[:-1])
  if len(crossed):
    first, last = first + crossed[-1], first + crossed[-1] + 1
  return Suspect(dataset.name, int(steps[first]), int(steps[last]), called.hop.change)


def capture(run_dir: RunDir, budget: int, overrides: Sequence[tuple[str, str]] = ()
            ) -> list[Capture]:
  """Brackets suspected hops of a finished run, prints and stores what was found.

  Repeating it makes nothing again, and what was captured before stays. What would take more than
  an interval between full checkpoints is left out and said. In several processes nothing is made,
  as a replay takes one; the checkpoints stay for it.

  Args:
    run_dir: of the run, which only gains captures.json.
    budget: captures, at most.
    overrides: placement settings of the replays, such as a mesh of fewer devices.

  Raises:
    UserError: nothing is monitored, or some could not be captured; the others are stored.
  """
  if not run_dir.monitor_items.exists():
    raise UserError(f'monitors.captures={budget}, but {run_dir.whole} has no monitors; set '
                    '--config.monitors.suite or leave captures at 0')
  if jax.process_count() > 1:
    print('captures are made by one process: repeat the command in one, with --config.mesh.* of '
          'its devices where they are others', flush=True)
    return []
  original, made, gone, failed = open_original(str(run_dir.whole)), [], [], []
  every, done = original.config.checkpoints.every, {one.suspect: one for one in _stored(run_dir)}
  for suspect, is_confirmed in chosen(run_dir):
    if len(made) + len(failed) == budget:
      break
    try:
      if suspect not in done:
        start = original.nearest_state(suspect.before)
        if suspect.before - start >= every:
          gone.append((suspect, is_confirmed, start))
          continue
        done[suspect] = _captured(original, suspect, is_confirmed, start, overrides)
        _store(run_dir, done.values())
      made.append(done[suspect])
      print(made[-1].told(every), flush=True)
    except UserError as error:
      between = f'between steps {suspect.before} and {suspect.after}'
      failed.append(f'{suspect.dataset} {between}: {error}')
  print(*_left_out(original, gone), f'{len(made)} of at most {budget} captures in '
        f'{duration(sum(one.seconds for one in made))}', sep='\n', flush=True)
  if failed:
    raise UserError('not captured: ' + '; '.join(failed))
  return made


def _left_out(original: Original, gone: Sequence[tuple[Suspect, bool, int]]) -> list[str]:
  """Returns in words what was not captured for want of a full checkpoint near it."""
  every = original.config.checkpoints.every
  said = [f'not captured: {one.dataset} (a hop) between steps {one.before:,} and {one.after:,}: no '
          f'full checkpoint less than checkpoints.every={every:,} steps before it was kept; from '
          f'the state of step {start:,} it takes {one.after - start:,} steps, which python -m '
          f'launchers.bisect --run_dir={original.name} --between={one.before}:{one.after} '
          f'--dataset={one.dataset} --measure=margin makes'
          for one, is_confirmed, start in gone if is_confirmed]
  n_suspected = sum(not is_confirmed for _, is_confirmed, _ in gone)
  if n_suspected:
    said.append(f'not captured: {n_suspected} that the detector cannot judge, for want of a full '
                'checkpoint near them; --config.checkpoints.keep=0 keeps all')
  return said


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


def _captured(original: Original, suspect: Suspect, is_confirmed: bool, start: int,
              overrides: Sequence[tuple[str, str]]) -> Capture:
  """Returns what a replay from the state of step `start` finds."""
  began = time.perf_counter()
  between = suspect.before, suspect.after
  replayed = RunDir(f'{original.path}-capture-{suspect.before}-{suspect.after}')
  _check_replay(original, replayed, suspect.before)
  found = bisect(original, replayed, between, suspect.dataset, above('margin'), overrides).found
  return Capture(suspect, found, is_confirmed, suspect.after - start,
                 time.perf_counter() - began, str(replayed.whole))


def _check_replay(original: Original, replayed: RunDir, step: int) -> None:
  """Raises UserError where a directory holds the replay of an earlier run of the same name."""
  then = SnapshotReader(replayed.snapshots).commits.get(step, {}).get('tensors')
  now = original.snapshots.commits[step].get('tensors')
  if then not in (None, now) and not open_original(str(replayed.whole)).own_differences():
    raise UserError(f'{replayed.path} is the replay of another run; remove or rename it')
