"""Captures: hops that were suspected while a run went on, bracketed to one step by replay after it.

The interval between the two snapshots is made again from the nearest full checkpoint in a directory
of its own, with a snapshot of every step, and bisected. A budget limits how many: hops that the
detector confirms come first, then the greatest changes.
"""

import dataclasses
import json
import time

from research.dynamics.analysis import analyze
from research.dynamics.bisect import above, bisect
from research.dynamics.curves import read_variants
from research.dynamics.original import Original, open_original
from research.monitors import table
from research.monitors.suspects import Suspect, Suspects
from research.run_dir import RunDir, write_whole
from research.training.logs import duration


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
  analysis = analyze(read_variants(run_dir.monitor_items, run_dir.monitor_scores))
  hops = {(dataset.name, int(analysis.steps[called.hop.before]))
          for dataset in analysis.datasets if dataset.judged for called in dataset.judged.confirmed}
  judged = [(one, any(name == one.dataset and one.before <= step < one.after
                      for name, step in hops)) for one in suspects_of(run_dir)]
  return sorted(judged, key=lambda pair: (not pair[1], -abs(pair[0].change)))[:budget]


def capture(run_dir: RunDir, budget: int) -> list[Capture]:
  """Brackets suspected hops of a finished run, prints and stores what was found.

  Repeating it makes nothing again.

  Args:
    run_dir: of the run, which only gains captures.json.
    budget: captures, at most.
  """
  if not run_dir.monitor_items.exists():
    return []
  original, done = open_original(str(run_dir.whole)), []
  for suspect, is_confirmed in chosen(run_dir, budget):
    done.append(_captured(original, suspect, is_confirmed))
    print(done[-1], flush=True)
  total = sum(one.seconds for one in done)
  print(f'{len(done)} of at most {budget} captures in {duration(total)}', flush=True)
  write_whole(run_dir.captures_json, json.dumps(
      [{**dataclasses.asdict(one), 'suspect': one.suspect._asdict()} for one in done], indent=1)
      + '\n')
  return done


def _captured(original: Original, suspect: Suspect, is_confirmed: bool) -> Capture:
  began = time.perf_counter()
  between = suspect.before, suspect.after
  replayed = RunDir(f'{original.path}-capture-{suspect.before}-{suspect.after}')
  found = bisect(original, replayed, between, suspect.dataset, above('margin')).found
  return Capture(suspect, found, is_confirmed,
                 suspect.after - original.nearest_state(suspect.before),
                 time.perf_counter() - began, str(replayed.whole))
