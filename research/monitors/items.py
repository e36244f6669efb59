"""Monitor items: what is asked, and which answers tell a general rule from a shallow one."""

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from research.errors import UserError

ITEM_SUFFIXES = ('.jsonl', '.parquet')


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
        raise UserError(f'monitor item {self.item_id!r}: {field.name}={value!r} must be of type '
                        f'{field.type.__name__}')
    for field in ('item_id', 'prompt', 'generalizing', 'shortcut'):
      if not getattr(self, field):
        raise UserError(f'monitor item {self.item_id!r}: {field} is empty')
    if self.generalizing == self.shortcut:
      raise UserError(f'monitor item {self.item_id!r}: both answers are {self.shortcut!r}; '
                      'they must differ')


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
  """Writes items as JSON lines or Parquet, by the suffix of `path`."""
  check_items(items)
  path = pathlib.Path(path)
  rows = [dataclasses.asdict(item) for item in items]
  if _suffix(path) == '.jsonl':
    path.write_text(
        ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in rows), encoding='utf-8')
  else:
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path)


def read_items(path: str | pathlib.Path) -> list[MonitorItem]:
  """Returns the items of a .jsonl or .parquet file.

  Raises UserError naming the file (and the line of a .jsonl) when it is missing or malformed.
  """
  path = pathlib.Path(path)
  suffix = _suffix(path)
  if not path.is_file():
    raise UserError(f'item file {path} does not exist')
  if suffix == '.parquet':
    try:
      rows = [(str(path), row) for row in pq.read_table(path).to_pylist()]
    except pa.ArrowInvalid as error:
      raise UserError(f'item file {path} is not readable Parquet: {error}') from error
  else:
    rows = _json_rows(path)
  items = [_item(row, where) for where, row in rows]
  check_items(items)
  return items


def _json_rows(path: pathlib.Path) -> list[tuple[str, dict]]:
  """Returns (file:line, object) for every line that is not blank."""
  rows = []
  with path.open(encoding='utf-8') as lines:
    for number, line in enumerate(lines, start=1):
      if line.strip():
        try:
          rows.append((f'{path}:{number}', json.loads(line)))
        except json.JSONDecodeError as error:
          raise UserError(f'{path}:{number} is not valid JSON: {error}') from error
  return rows


def _item(row: dict, where: str) -> MonitorItem:
  """Returns the item of one row; columns that items don't have are refused."""
  if not isinstance(row, dict):
    raise UserError(f'{where} is not a JSON object')
  names = {field.name for field in dataclasses.fields(MonitorItem)}
  missing = names - {'is_control'} - set(row)
  if missing or set(row) - names:
    raise UserError(f'{where}: missing fields {sorted(missing)}, unknown fields '
                    f'{sorted(set(row) - names)}; an item has {sorted(names)}')
  try:
    return MonitorItem(**row)
  except UserError as error:
    raise UserError(f'{where}: {error}') from error


def _suffix(path: pathlib.Path) -> str:
  if path.suffix not in ITEM_SUFFIXES:
    raise UserError(f'item file {path} must end in .jsonl or .parquet')
  return path.suffix
