"""Counterfactual data: windows of steps swapped, replaced, reordered or masked, all else the same.

An edit is a function of row numbers, so edited batches are as much a pure function of the step as
the source's own.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import numpy as np

from research.data.batches import Source
from research.data.config import DataConfig
from research.data.errors import DataError
from research.data.microworld import FAMILIES
from research.data.packing import Row

FORMS = {
    'swap': 'swap A:B C:D', 'replace': 'replace A:B C:D', 'reorder': 'reorder A:B [SEED]',
    'mask': 'mask A:B [KIND ...]'}


@dataclasses.dataclass(frozen=True)
class Edit:
  """One change of the data that steps are fed.

  A window (a, b) is the data that takes the state of step a to that of step b, b - a batches.

  Attributes:
    action: 'swap' exchanges two windows, 'replace' feeds `other` in place of `window`, 'reorder'
      permutes the rows of `window`, 'mask' takes rows of it out of the loss. The loss is a mean
      over tokens, so those that are left in a batch weigh more than they did. A step of which
      nothing is left has zero gradients, but moments and weight decay still move parameters.
    other: the second window of 'swap' and 'replace'.
    kinds: families, or entries of the mixture, that 'mask' takes out; empty: all.
    seed: of the permutation of 'reorder'.
  """

  action: str
  window: tuple[int, int]
  other: tuple[int, int] | None = None
  kinds: tuple[str, ...] = ()
  seed: int = 0

  @property
  def windows(self) -> tuple[tuple[int, int], ...]:
    """The windows that it names."""
    return (self.window,) if self.other is None else (self.window, self.other)

  @property
  def changed(self) -> tuple[tuple[int, int], ...]:
    """The windows whose data it changes; none where a window takes its own place."""
    if self.other == self.window:
      return ()
    return self.windows if self.action == 'swap' else (self.window,)

  def __str__(self) -> str:
    more = [str(self.seed)] if self.action == 'reorder' else self.kinds
    return ' '.join([self.action, *(f'{a}:{b}' for a, b in self.windows), *more])


def parse_window(text: str, what: str) -> tuple[int, int]:
  """Returns the steps of 'A:B', 0 <= A < B; raises DataError naming `what` otherwise."""
  first, _, last = text.partition(':')
  if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
    raise DataError(f'{what}: {text!r} is no range of steps; write A:B with A < B, as in 600:660')
  return int(first), int(last)


def parse_edit(text: str) -> Edit:
  """Returns the edit that a text of one of FORMS names; raises DataError if it is none."""
  action, *parts = text.split() or ['']
  if action not in FORMS:
    raise DataError(f'edit {text!r} must be one of: {", ".join(FORMS.values())}')
  n_windows = 2 if action in ('swap', 'replace') else 1
  windows = [parse_window(part, f'edit {text!r}') for part in parts[:n_windows]]
  rest = parts[n_windows:]
  allowed = {'mask': len(rest), 'reorder': 1}.get(action, 0)
  if len(windows) < n_windows or len(rest) > allowed or (
      action == 'reorder' and rest and not rest[0].isdecimal()):
    raise DataError(f'edit {text!r} must have the form {FORMS[action]}')
  return Edit(action, *windows, kinds=tuple(rest) if action == 'mask' else (),
              seed=int(rest[0]) if action == 'reorder' and rest else 0)


def kinds_of(config: DataConfig) -> tuple[str, ...]:
  """Returns the kinds of rows that a source of this config has."""
  return FAMILIES if config.kind == 'microworld' else getattr(config, config.kind).paths


def check_edits(edits: Sequence[Edit], config: DataConfig, n_steps: int) -> None:
  """Raises DataError where an edit names data that is not there, or windows that do not fit."""
  for edit in edits:
    for a, b in edit.windows:
      if b > n_steps:
        raise DataError(f'edit {str(edit)!r}: the run has steps 0:{n_steps}, not {a}:{b}')
    if unknown := sorted(set(edit.kinds) - set(kinds_of(config))):
      raise DataError(f'edit {str(edit)!r}: no kind {unknown[0]!r} in this data; it has '
                      f'{", ".join(kinds_of(config))}')
    if edit.kinds and config.kind == 'sft' and config.sft.pack and len(config.sft.paths) > 1:
      raise DataError(f'edit {str(edit)!r}: rows hold examples of several entries of data.sft.paths; '
                      'train with data.sft.pack=false, or mask all kinds')
    if edit.other is None:
      continue
    (a, b), (c, d) = edit.windows
    if b - a != d - c:
      raise DataError(f'edit {str(edit)!r}: the windows have {b - a} and {d - c} steps; give both '
                      f'the same length, as in {a}:{b} {c}:{c + b - a}')
    if edit.action == 'swap' and a != c and max(a, c) < min(b, d):
      raise DataError(f'edit {str(edit)!r}: the windows overlap in steps {max(a, c)}:{min(b, d)}; '
                      'windows that are swapped must lie apart')


class EditedSource:
  """A source whose rows lie elsewhere or are masked; all else is the source's own."""

  def __init__(self, source: Source, place: Callable[[int], int], masks: Callable[[int], bool]):
    """`place` says which row of the source stands at row j, `masks` whether j has no loss."""
    self._source, self._place, self._masks = source, place, masks
    self.tokenizer, self.hash = source.tokenizer, source.hash
    self.n_rows, self.start_id = source.n_rows, source.start_id

  def row(self, j: int) -> Row:
    """Row j of the edited order."""
    row = self._source.row(self._place(j))
    return {**row, 'loss_mask_L': np.zeros_like(row['loss_mask_L'])} if self._masks(j) else row

  def documents(self, j: int) -> list[dict[str, Any]]:
    """What row j of the edited order contains; `masked` where it is out of the loss."""
    more = {'masked': True} if self._masks(j) else {}
    return [document | more for document in self._source.documents(self._place(j))]

  def heldout_rows(self) -> Sequence[Row]:
    """The source's held-out rows."""
    return self._source.heldout_rows()

  def facts(self) -> dict[str, Any]:
    """The source's facts."""
    return self._source.facts()


def edited(source: Source, batch_size: int, edits: Sequence[Edit]) -> Source:
  """Returns the source after all edits, each applied to what those before it made."""
  for edit in edits:
    place, masks = _ACTIONS[edit.action](source, batch_size, edit)
    source = EditedSource(source, place, masks)
  return source


def _inside(window: tuple[int, int], batch_size: int, j: int) -> bool:
  return window[0] * batch_size <= j < window[1] * batch_size


def _swap(source, batch_size, edit):
  offset = (edit.other[0] - edit.window[0]) * batch_size

  def place(j):
    if _inside(edit.window, batch_size, j):
      return j + offset
    return j - offset if _inside(edit.other, batch_size, j) else j
  return place, lambda j: False


def _replace(source, batch_size, edit):
  offset = (edit.other[0] - edit.window[0]) * batch_size
  return lambda j: j + offset if _inside(edit.window, batch_size, j) else j, lambda j: False


def _reorder(source, batch_size, edit):
  first, last = (step * batch_size for step in edit.window)
  order = np.random.default_rng((edit.seed, *edit.window)).permutation(last - first)
  place = lambda j: first + int(order[j - first]) if first <= j < last else j
  return place, lambda j: False


def _mask(source, batch_size, edit):
  @functools.lru_cache(maxsize=4096)
  def masks(j):
    if not _inside(edit.window, batch_size, j):
      return False
    return not edit.kinds or any(d['kind'] in edit.kinds for d in source.documents(j))
  return lambda j: j, masks


_ACTIONS = {'swap': _swap, 'replace': _replace, 'reorder': _reorder, 'mask': _mask}
