"""Checkpoints of a series that are equal: copies of one another, or spliced from parts of another.

Equality where nothing could move is no fault: where the learning rate is 0, steps were skipped or
updates are below a grain of the stored dtype.
"""

import collections
from collections.abc import Callable, Sequence
import itertools

import numpy as np

from research.dynamics.audit_content import DETOUR, NEAR, Finding, Followed
from research.dynamics.series import Series

Reach = Callable[[int, int, float], float]
Histories = dict[str, Followed]

_RARELY = 0.9  # of a tensor's checkpoints differ, where two that are equal mean something
_GRAINS = 4.0  # movement between checkpoints that may well round to none


def equal_checkpoints(series: Series, histories: Histories, reach: Reach | None) -> list[Finding]:
  """Returns checkpoints that are another one over again (duplicate), or hold part of it (splice).

  Args:
    series: the checkpoints.
    histories: of all its tensors.
    reach: (step, later step, largest weight) -> farthest that updates can move an element in
      between, before it is rounded; None where it is not known.
  """
  alike = collections.defaultdict(list)
  known = {name: dict(zip(followed.steps, followed.digests, strict=True))
           for name, followed in histories.items()}
  for step in series.steps:
    digests = tuple(by_step.get(step) for by_step in known.values())
    # What cannot be read as a whole is like no other.
    alike[digests if None not in digests else step].append(step)
  found, kept = [], []
  for group in alike.values():
    units = _units(series, histories, group, reach)
    original = _original(series, histories, units) if len(units) > 1 else units[0]
    found += _copies(series, histories, units, original)
    kept.append(original[0])
  return found + _splices(series, histories, sorted(kept), reach)


def _units(series: Series, histories: Histories, group: Sequence[int], reach: Reach | None
           ) -> list[list[int]]:
  """Returns equal checkpoints in parts: each the stretch over which nothing could have moved."""
  units = [[group[0]]]
  for step in group[1:]:
    unit = units[-1]
    follows = series.steps.index(step) == series.steps.index(unit[-1]) + 1
    if follows and all(_unmoved(followed, unit[0], step, reach) for followed in histories.values()):
      unit.append(step)
    else:
      units.append([step])
  return units


def _unmoved(followed: Followed, first: int, last: int, reach: Reach | None) -> bool:
  """Returns whether equality of one tensor at two steps is no wonder: by the rates, else by how far
  it moves around there."""
  allowed = _allowed(followed, first, last, reach)
  if np.isfinite(allowed):
    return allowed < _grain(followed, first, last) / 2
  return _hardly_moves(followed, first, last)


def _grain(followed: Followed, first: int, last: int) -> float:
  i, j = followed.steps.index(first), followed.steps.index(last)
  return float(followed.grains[i:j + 1].max())


def _allowed(followed: Followed, first: int, last: int, reach: Reach | None) -> float:
  if reach is None:
    return np.inf
  i, j = followed.steps.index(first), followed.steps.index(last)
  return reach(first, last, float(followed.peaks[i:j + 1].max()))


def _hardly_moves(followed: Followed, first: int, last: int) -> bool:
  """Returns whether a tensor moves by a few grains at most between two steps and around them."""
  i, j = followed.steps.index(first), followed.steps.index(last)
  moved = followed.moved_most / np.maximum(followed.grains, 1e-300)
  if (moved[i + 1:j + 1] > _GRAINS).any():
    return False
  before, after = moved[1:i + 1], moved[j + 1:]
  near = [*before[before > 0][-NEAR:], *after[after > 0][:NEAR]]
  return bool(near) and float(np.median(near)) < _GRAINS


def _copies(series: Series, histories: Histories, units: list[list[int]], kept: list[int]
            ) -> list[Finding]:
  """Returns a finding for each of equal checkpoints that is not of the original's stretch."""
  steps = [step for unit in units for step in unit]
  if len(units) == 2:
    problem = f'has all the tensors of step {kept[0]}'
  else:
    problem = (f'is one of {len(steps)} checkpoints with the same tensors, the first of step '
               f'{steps[0]}; copies cannot be told apart, step {kept[0]} is taken for the original')
  name = next(iter(histories))
  return [Finding('duplicate', step, str(series.file_of(step, name).parent), '', problem)
          for step in steps if step not in kept]


def _original(series: Series, histories: Histories, units: list[list[int]]) -> list[int]:
  """Returns which of equal checkpoints is the original: of two the one that lies better on its
  neighbors' way; of more the one that fits its neighbors best, which are no copies, else the last.
  """
  names, firsts = list(histories), [unit[0] for unit in units]
  if len(units) == 2:
    first, second = (strangeness(histories, names, step) for step in firsts)
    return units[int(first > second)]
  members = {step for unit in units for step in unit}
  def misfit(unit: list[int]) -> float:
    i, j = series.steps.index(unit[0]), series.steps.index(unit[-1])
    if members & {*series.steps[max(i - 1, 0):i], *series.steps[j + 1:j + 2]}:
      return np.inf
    return strangeness(histories, names, unit[0])
  best = min(units, key=misfit)
  return best if misfit(best) < DETOUR * len(names) else units[-1]


def strangeness(histories: Histories, names: Sequence[str], step: int) -> float:
  """Returns how far off its neighbors' way a checkpoint lies in some tensors; about 1 is usual."""
  total = 0.0
  for name in names:
    followed = histories[name]
    i, last = followed.steps.index(step), len(followed.steps) - 1
    ratio = float(followed.detour[i])
    if i in (0, last) and last > 1:  # One neighbor only: how far that is away.
      usual = float(np.median(followed.moved[followed.moved > 0])) if followed.moved.any() else 0.0
      ratio = float(followed.moved[max(i, 1)]) / max(usual, 1e-30)
    total += min(1e6, ratio)
  return total


def _splices(series: Series, histories: Histories, steps: list[int], reach: Reach | None
             ) -> list[Finding]:
  """Returns those of different checkpoints that share tensors which move everywhere else."""
  moving, holders = {}, collections.defaultdict(list)
  for name, followed in histories.items():
    by_step = dict(zip(followed.steps, followed.digests, strict=True))
    by_step = {step: by_step[step] for step in steps if step in by_step}
    if len(set(by_step.values())) >= _RARELY * len(by_step) > 1:
      moving[name] = by_step
      for step, digest in by_step.items():
        holders[name, digest].append(step)
  shared: dict[tuple[int, int], list[str]] = collections.defaultdict(list)
  for (name, _), equal in holders.items():
    for first, last in itertools.combinations(equal, 2):
      followed = histories[name]
      # A small tensor may come back to where it was, within a few grains.
      if not (_hardly_moves(followed, first, last) or _unmoved(followed, first, last, reach)):
        shared[first, last].append(name)
  found = []
  for (first, last), names in shared.items():
    wrong, of = (first, last) if strangeness(histories, names, first) > strangeness(
        histories, names, last) else (last, first)
    n_both = sum(first in by_step and last in by_step for by_step in moving.values())
    found.append(Finding('splice', wrong, str(series.file_of(wrong, names[0])), names[0],
                         f'{len(names)} of {n_both} tensors are bit for bit those of step {of}'))
  return found
