"""Monitor items: what is asked, and which answers tell a general rule from a shallow one."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from research.errors import UserError

ITEM_SUFFIXES = ('.jsonl', '.parquet')
MATCHED = '_control'  # ends the name of a dataset's own control: the same asked without a rival rule
SHOWN = 20  # ids that are printed per reason, and reasons


class UnusableItem(UserError):
  """An item that cannot be scored; `reason` says why."""

  def __init__(self, item_id: str, reason: str):
    super().__init__(f'monitor item {item_id!r}: {reason}')
    self.reason = reason


class LeftOut(NamedTuple):
  """Something that is not scored, and why."""

  item_id: str
  reason: str


@dataclasses.dataclass(frozen=True)
class MonitorItem:
  """One question with two rival answers.

  The scored text is `prompt` directly followed by an answer: a space between the two belongs to
  the answer (or to the prompt, though then the tokens may straddle the boundary).

  Attributes:
    item_id: unique name.
    family: what the item probes, such as 'flipped'.
    dataset: the set within the family that is summarized as one curve.
    seed: number of the demonstration context (or of the draw, where there is none).
    variant: name of the wording.
    prompt: demonstrations and question.
    generalizing: the answer of the general rule.
    shortcut: the answer of the shallow rule.
    is_control: whether the item is ordinary: expected to be learned once and kept.
  """

  item_id: str
  family: str
  dataset: str
  seed: int
  variant: str
  prompt: str
  generalizing: str
  shortcut: str
  is_control: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if type(value) is not field.type:
        raise UnusableItem(self.item_id, f'{field.name}={value!r} must be of type '
                           f'{field.type.__name__}')
    for field in ('item_id', 'prompt', 'generalizing', 'shortcut'):
      if not getattr(self, field):
        raise UnusableItem(self.item_id, f'{field} is empty')
    if self.generalizing == self.shortcut:
      raise UnusableItem(self.item_id, f'both answers are {self.shortcut!r}; they must differ')


SCHEMA = pa.schema([
    ('item_id', pa.string()), ('family', pa.string()), ('dataset', pa.string()),
    ('seed', pa.int32()), ('variant', pa.string()), ('prompt', pa.string()),
    ('generalizing', pa.string()), ('shortcut', pa.string()), ('is_control', pa.bool_())])


def check_items(items: Sequence[MonitorItem]) -> None:
  """Raises UserError when there are no items, two share an id, or a dataset is not of one kind."""
  if not items:
    raise UserError('there are no monitor items; a suite needs at least one')
  seen, kinds = set(), {}
  for item in items:
    kind = item.family, item.is_control
    if kinds.setdefault(item.dataset, kind) != kind:
      raise UserError(f'monitor item {item.item_id!r}: dataset {item.dataset!r} has '
                      f'(family, is_control) {kind} here and {kinds[item.dataset]} before; a '
                      'dataset is one curve, name them apart')
    if item.item_id in seen:
      raise UserError(f'monitor item {item.item_id!r} occurs twice; ids must be unique')
    seen.add(item.item_id)


def write_items(items: Sequence[MonitorItem], path: str | pathlib.Path) -> None:
  """Writes items as JSON lines or Parquet, by the suffix of `path`.

  Raises UserError where they cannot be written; a file that was there is then as it was.
  """
  check_items(items)
  check_path(path)
  path = pathlib.Path(path)
  rows = [dataclasses.asdict(item) for item in items]
  temporary = path.with_name(path.name + '.tmp')
  try:
    if path.suffix == '.jsonl':
      temporary.write_text(
          ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows), encoding='utf-8')
    else:
      pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), temporary)
    os.replace(temporary, path)
  except OSError as error:
    raise UserError(f'item file {path} cannot be written: {error.strerror or error}') from error


def sound_items(path: str | pathlib.Path) -> tuple[list[MonitorItem], list[LeftOut]]:
  """Returns the well-formed items of a .jsonl or .parquet file, and all others.

  Of items of one id the first is kept, and of a dataset what is of the first one's family and
  kind. What has no id goes by file and line (row of a Parquet file). Raises UserError when the file
  is missing or damaged as a whole.
  """
  path = pathlib.Path(path)
  suffix = _suffix(path)
  if not path.is_file():
    raise UserError(f'item file {path} does not exist')
  items, left_out, seen, kinds = [], [], set(), {}
  for where, row in (_parquet_rows if suffix == '.parquet' else _json_rows)(path):
    item_id = row.get('item_id') if isinstance(row, dict) else None
    named = item_id if isinstance(item_id, str) and item_id else where
    try:
      item = _item(row, named)
      if item.item_id in seen:
        raise UnusableItem(named, 'an item before it has the same id')
      kind = item.family, item.is_control
      if kinds.setdefault(item.dataset, kind) != kind:
        raise UnusableItem(named, f'dataset {item.dataset!r} began with another family or '
                           'is_control; name them apart')
      seen.add(item.item_id)
      items.append(item)
    except UnusableItem as error:
      left_out.append(LeftOut(named, error.reason))
  return items, left_out


def _parquet_rows(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
  """Yields (file:row, object) of every row."""
  try:
    rows = pq.read_table(path).to_pylist()
  except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
    raise UserError(f'item file {path} is not readable Parquet: {error}') from error
  for number, row in enumerate(rows, start=1):
    yield f'{path.name}:{number}', row


def _json_rows(path: pathlib.Path) -> Iterator[tuple[str, Any]]:
  """Yields (file:line, value) of every line that is not blank, an error for what is no JSON.

  Raises UserError for a file in another encoding: of its lines those in ASCII would be left.
  """
  with path.open('rb') as lines:
    for number, line in enumerate(lines, start=1):
      try:
        text = line.decode('utf-8-sig')  # Some editors begin files with a mark.
      except UnicodeDecodeError as error:
        raise UserError(f'item file {path} is not UTF-8 in line {number} '
                        f'(0x{line[error.start]:02x}: {error.reason}); convert it to UTF-8'
                        ) from error
      if text.strip():
        try:
          yield f'{path.name}:{number}', json.loads(text)
        except ValueError as error:
          yield f'{path.name}:{number}', error


def _item(row: Any, named: str) -> MonitorItem:
  """Returns the item of one row; columns that items don't have are refused."""
  if not isinstance(row, dict):
    raise UnusableItem(named, f'not valid JSON: {row}' if isinstance(row, Exception) else
                       'not a JSON object')
  names = {field.name for field in dataclasses.fields(MonitorItem)}
  missing, unknown = names - {'is_control'} - set(row), set(row) - names
  if missing or unknown:
    raise UnusableItem(named, f'missing fields {sorted(missing)}, unknown fields {sorted(unknown)}')
  return MonitorItem(**row)


def listed(left_out: Sequence[LeftOut]) -> Iterator[str]:
  """Yields a line for each reason with the ids of its items; what is beyond SHOWN is counted."""
  reasons: dict[str, list[str]] = {}
  for item_id, reason in left_out:
    reasons.setdefault(reason, []).append(item_id)
  for reason, ids in list(reasons.items())[:SHOWN]:
    more = f' and {len(ids) - SHOWN} more' if len(ids) > SHOWN else ''
    yield f'{reason}: {", ".join(ids[:SHOWN])}{more}'
  if rest := list(reasons.values())[SHOWN:]:
    yield f'{sum(map(len, rest))} more for {len(rest)} other reasons'


def refusal(left_out: Sequence[LeftOut], n_all: int) -> str:
  """Returns what is said where items cannot be scored and were not chosen to be left out."""
  lines = '\n'.join(f'  {line}' for line in listed(left_out))
  return (f'{len(left_out)} of {n_all} monitor items cannot be scored:\n{lines}\ncorrect them, or '
          'score the others with --config.monitors.bad_items=leave_out')


def check_path(path: str | pathlib.Path) -> None:
  """Raises UserError where items cannot be written to such a path."""
  path = pathlib.Path(path)
  _suffix(path)
  if path.is_dir():
    raise UserError(f'item file {path} is a folder; name a file in it')
  if not path.parent.is_dir():
    what = 'is a file' if path.parent.exists() else 'does not exist'
    raise UserError(f'the folder {path.parent} of item file {path.name} {what}')
  if not os.access(path.parent, os.W_OK):
    raise UserError(f'the folder {path.parent} of item file {path.name} is not writable')


def _suffix(path: pathlib.Path) -> str:
  if path.suffix not in ITEM_SUFFIXES:
    raise UserError(f'item file {path} must end in .jsonl or .parquet')
  return path.suffix
