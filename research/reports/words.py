"""The sentences of a report: how numbers, families and verdicts are put into words."""

from collections.abc import Sequence

import numpy as np

from research.dynamics.analysis import (
    LEAST_CONTEXTS,
    LEAST_CONTROL_ITEMS,
    LEAST_ITEMS,
    Analysis,
    Family,
)
from research.dynamics.swings import LEAST_SNAPSHOTS
from research.reports.records import Records

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


def count(number: int, noun: str) -> str:
  """Returns '1 swing' or '2 swings'."""
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


def counted_hops(family: Family) -> int:
  """Returns the swings after the first rise that no restless control speaks against."""
  return sum(judged.claimed is not False for judged in family.hops)


def level_kind(family: Family) -> str:
  """Returns 'generalizing', 'shortcut' or 'mixed': where the last half of the curve lies."""
  level = float(np.median(family.accuracy.mean[len(family.accuracy.mean) // 2:]))
  return 'generalizing' if level >= 0.7 else 'shortcut' if level <= 0.3 else 'mixed'


def verdict(family: Family) -> tuple[str, str]:
  """Returns (kind, words) of one family: 'hopping', 'rose', 'generalizing', ..."""
  if len(family.accuracy.mean) < LEAST_SNAPSHOTS:
    return 'early', 'too early to say'
  if family.hops:
    return 'hopping', count(len(family.hops), 'hop')
  if family.first_rise:
    return 'rose', f'rose by step {family.first_rise.swing.arrive_step:,} and stayed'
  if family.swings:
    return 'fell', f'fell by step {family.swings[-1].swing.arrive_step:,}'
  words = {'generalizing': 'generalizes, no swing', 'shortcut': 'keeps to the shortcut, no swing',
           'mixed': 'in between, no swing'}
  return level_kind(family), words[level_kind(family)]


def headline(analysis: Analysis) -> str:
  """Returns the one sentence that answers: did it hop, and in which family?"""
  if not len(analysis.steps):
    return 'No monitor scored this run, so nothing can be said about hopping.'
  if not analysis.families:
    return 'Only controls were scored in this run, so nothing can be said about hopping.'
  if len(analysis.steps) < LEAST_SNAPSHOTS:
    return (f'{count(len(analysis.steps), "snapshot")} so far: too few to see a swing '
            '(its two levels are held for two snapshots each).')
  hopping = [f for f in analysis.families if counted_hops(f) and f.is_large_enough]
  if not hopping:
    return 'No family hopped.'
  names = listing([title(f.name) for f in hopping])
  numbers = listing([str(counted_hops(f)) for f in hopping])
  noun = 'swing' if sum(counted_hops(f) for f in hopping) == 1 else 'swings'
  while_calm = ' while the controls were calm' if analysis.controls else ''
  their = 'its' if len(hopping) == 1 else 'their'
  return f'{names} hopped: {numbers} {noun} after {their} first rise{while_calm}.'


def remarks(analysis: Analysis, records: Records) -> list[str]:
  """Returns the sentences below the headline, most important first."""
  said = []
  if records.n_steps and not records.is_finished:
    said.append(f'The run is in progress: step {records.last_step:,} of {records.n_steps:,}.')
  said += _other_families(analysis) if len(analysis.steps) >= LEAST_SNAPSHOTS else []
  if len(analysis.steps) and analysis.families:
    said.append(control_sentence(analysis))
  restless = sum(j.claimed is False for f in analysis.families for j in f.hops)
  if restless:
    said.append(f'{count(restless, "more swing")} came while the controls were restless and '
                f'{"is" if restless == 1 else "are"} not counted.')
  small = [f for f in analysis.families if not f.is_large_enough]
  if small:
    said.append(f'{listing([title(f.name) for f in small])}: fewer than {LEAST_ITEMS} items or '
                f'{LEAST_CONTEXTS} demonstration contexts, too few for a swing to count.')
  return said


def control_sentence(analysis: Analysis) -> str:
  """Returns whether the controls were calm, with the numbers behind it."""
  controls = analysis.controls
  if controls is None:
    return 'There are no controls, so no swing can be claimed.'
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


def _other_families(analysis):
  """One sentence for each other course that families took."""
  groups = {}
  for family in analysis.families:
    kind = verdict(family)[0]
    if kind != 'hopping':
      groups.setdefault(kind, []).append(title(family.name))
  phrases = {'rose': 'rose to the general rule once and stayed',
             'generalizing': 'followed the general rule without a swing',
             'mixed': 'stayed in between without a swing', 'fell': 'fell to the shortcut',
             'shortcut': 'kept to the shortcut without a swing'}
  return [f'{listing(groups[kind])} {phrase}.' for kind, phrase in phrases.items()
          if kind in groups]
