"""The sentences of a report: how numbers, datasets and verdicts are put into words."""

from collections.abc import Sequence

import numpy as np

from research.dynamics.analysis import LEAST_CONTROL_ITEMS, Analysis, Dataset
from research.dynamics.detector import DWELL, LEAST_CONTEXTS
from research.dynamics.hops import least_checkpoints
from research.dynamics.states import State
from research.monitors.items import MATCHED
from research.reports.records import Records

MOST_NAMED = 8  # datasets in one sentence; the tables name them all

_NOTES = {  # short enough for one line of a panel
    'flipped': 'Labels are flipped in context: follow, or recall?',
    'repetitive': 'Answers all agree, the test breaks it.',
    'successive': 'Answers run in sequence, the test breaks it.',
    'truthy': 'Demonstrations look true or false, tests surprise.',
    'intuitive': 'A tempting first answer against the right one.',
    'multi': 'The answer joins facts from across the context.',
    'persona': 'The answer joins facts from across the context.',
    'zero_shot': 'No demonstrations say which kind of document this is.',
}


def title(name: str) -> str:
  """Returns the name of a family or dataset as a heading."""
  words = name.replace('_', ' ').strip()
  return words[:1].upper() + words[1:]


def note(family: str) -> str:
  """Returns what a well-known family tests; empty for families of other suites."""
  return next((text for start, text in _NOTES.items() if family.lower().startswith(start)), '')


def listing(parts: Sequence[str]) -> str:
  """Returns 'a', 'a and b' or 'a, b and c'."""
  parts = list(parts)
  return ' and '.join([', '.join(parts[:-1]), parts[-1]] if len(parts) > 2 else parts)


def named(names: Sequence[str]) -> str:
  """Returns a listing of datasets as headings, of many how many they are."""
  if len(names) > MOST_NAMED:
    return f'{len(names)} datasets'
  return listing([title(name) for name in names])


def count(number: int, noun: str) -> str:
  """Returns '1 hop' or '2 hops'."""
  return f'{number:,} {noun}{"" if number == 1 else "s"}'


def short(number: float) -> str:
  """Returns a number in at most four significant digits with K, M, B or T."""
  for size, letter in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'K')):
    if abs(number) >= size:
      return f'{number / size:.3g}{letter}'
  return f'{number:.3g}'


def duration(seconds: float) -> str:
  """Returns '48 s', '3 min 20 s' or '2 h 05 min'."""
  seconds = int(round(seconds))
  if seconds < 60:
    return f'{seconds} s'
  if seconds < 3600:
    return f'{seconds // 60} min {seconds % 60:02d} s'
  return f'{seconds // 3600} h {seconds % 3600 // 60:02d} min'


def held(dataset: Dataset) -> str:
  """Returns the state of most checkpoints in the run's last half, 'mixed' where none has most."""
  last = dataset.judged.states[len(dataset.judged.states) // 2:]
  for kind, state in (('generalizing', State.GENERALIZING), ('shortcut', State.PATTERN)):
    if np.mean(last == state) > 0.5:
      return kind
  return 'mixed'


def verdict(dataset: Dataset) -> tuple[str, str]:
  """Returns (kind, words) of one dataset: 'hopping', 'unsaid' or what `held` says."""
  if dataset.judged is None:
    return 'unsaid', 'too little to say'
  if dataset.n_hops:
    return 'hopping', count(dataset.n_hops, 'hop')
  phrases = {'generalizing': 'generalizes, no hop', 'shortcut': 'keeps to the pattern, no hop',
             'mixed': 'in between, no hop'}
  return held(dataset), phrases[held(dataset)]


def headline(analysis: Analysis) -> str:
  """Returns the one sentence that answers: did it hop, and in which dataset?"""
  if not len(analysis.steps):
    return 'No monitor scored this run, so nothing can be said about hopping.'
  if not analysis.datasets:
    return 'Only controls were scored in this run, so nothing can be said about hopping.'
  if not analysis.is_long_enough:
    return (f'{count(len(analysis.steps), "snapshot")} so far: too few to tell a hop, whose two '
            f'levels are held for {DWELL} snapshots each; {least_checkpoints()} are needed.')
  if not any(dataset.judged for dataset in analysis.datasets):
    return 'Every dataset has too few demonstration contexts to tell a hop.'
  hopping = [dataset for dataset in analysis.datasets if dataset.n_hops]
  if not hopping:
    return 'No dataset hopped.'
  total = sum(dataset.n_hops for dataset in hopping)
  numbers = (f'{total:,}' if len(hopping) > MOST_NAMED else
             listing([str(dataset.n_hops) for dataset in hopping]))
  noun = 'hop' if total == 1 else 'hops'
  while_calm = ' while the controls were calm' if analysis.controls else ''
  return f'{named([d.name for d in hopping])} hopped: {numbers} {noun}{while_calm}.'


def remarks(analysis: Analysis, records: Records) -> list[str]:
  """Returns the sentences below the headline, most important first."""
  said = []
  if records.n_steps and not records.is_finished:
    said.append(f'The run is in progress: step {records.last_step:,} of {records.n_steps:,}.')
  said += _variants(analysis) + _other_datasets(analysis) + _able(analysis) + _least(analysis)
  if len(analysis.steps) and analysis.datasets:
    said.append(control_sentence(analysis))
  restless = sum(len(d.judged.hops) - d.n_hops for d in analysis.datasets if d.judged)
  if restless:
    said.append(f'{count(restless, "more hop")} came while the controls were restless and '
                f'{"is" if restless == 1 else "are"} not confirmed.')
  if analysis.hops and analysis.hops.left_out:
    said.append(f'{named(analysis.hops.left_out)}: fewer than '
                f'{LEAST_CONTEXTS} demonstration contexts, too few to tell a hop.')
  return said


def control_sentence(analysis: Analysis) -> str:
  """Returns whether the controls were calm, with the numbers behind it."""
  controls = analysis.controls
  if controls is None:
    return 'There are no controls that could speak against a hop.'
  few = ''
  if controls.n_items < LEAST_CONTROL_ITEMS:
    few = f' They are only {count(controls.n_items, "item")}; a gate needs {LEAST_CONTROL_ITEMS:,}.'
  points = f'{100 * controls.tolerance:.1f} points of {100 * controls.level:.1f}%'
  if controls.settled_step is None:
    return f'The controls never came within {points}.{few}'
  outside = controls.outside_steps
  if not outside:
    return (f'Controls calm: {count(controls.n_items, "item")} within {points} from step '
            f'{controls.settled_step:,} on.{few}')
  return (f'Controls restless: after they settled at step {controls.settled_step:,}, '
          f'{count(len(outside), "snapshot")} beyond {points}, the first at step '
          f'{outside[0]:,}.{few}')


def _variants(analysis):
  """In how many prompt variants the confirmed hops are found."""
  called = [called for d in analysis.datasets if d.judged for called in d.judged.confirmed]
  if not called:
    return []
  counts = [f'{one.n_agreeing} of {one.n_variants}' for one in called]
  if len(counts) > MOST_NAMED:
    return ['The table of hops says in how many prompt variants each is found alone.']
  return [f'Prompt variants in which each hop is found alone: {listing(counts)}.']


def _other_datasets(analysis):
  """One sentence for each other course that datasets took."""
  groups = {}
  for dataset in analysis.datasets:
    if dataset.judged and not dataset.n_hops:
      groups.setdefault(held(dataset), []).append(dataset.name)
  phrases = {'generalizing': 'ended with the general rule, without a hop',
             'shortcut': 'ended with the pattern, without a hop',
             'mixed': 'ended in between, without a hop'}
  return [f'{named(groups[kind])} {phrase}.' for kind, phrase in phrases.items()
          if kind in groups]


def _able(analysis):
  """What the model can do where no shallow rule competes, of datasets with controls of their own."""
  own = [dataset for dataset in analysis.control_datasets if dataset.name.endswith(MATCHED)]
  able = [dataset.name.removesuffix(MATCHED) for dataset in own if dataset.accuracy.low[-1] > 0.5]
  if not own:
    return []
  names = f' ({listing([title(name) for name in able])})' if 0 < len(able) <= MOST_NAMED else ''
  return [f'{len(able)} of {len(own)} own controls end above chance by their 95% intervals{names}, '
          'as 2.5% of those at chance would.']


def _least(analysis):
  """What could have been seen."""
  judged = [dataset.judged for dataset in analysis.datasets if dataset.judged]
  least = [row.least_detectable for row in judged if not row.is_blind]
  blind = [row.name for row in judged if row.is_blind]
  return ([f'The least hop that would have been found with a power of 95% is {min(least):.2f} to '
           f'{max(least):.2f} in margin, by dataset.'] if least else []) + (
               [f'{named(blind)}: too much scatter for any hop to be seen with that power.']
               if blind else [])
