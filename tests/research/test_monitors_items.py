"""Item files and what they refuse. Witness: the files' own text, read by json and pandas."""

import json

import pandas as pd
import pytest

from research.errors import UserError
from research.monitors.items import MonitorItem, check_items, read_items, write_items

ITEMS = [
    MonitorItem('a/0', 'flipped', 'a', 0, 'plain', 'naïve 雪 :', ' good', ' bad'),
    MonitorItem('b/1', 'flipped', 'b', 1, 'plain', 'two\nlines :', ' bad', ' good', True)]


@pytest.mark.parametrize('name', ['items.jsonl', 'items.parquet'])
def test_items_survive_a_file(tmp_path, name):
  path = tmp_path / name
  write_items(ITEMS, path)
  assert read_items(path) == ITEMS
  frame = pd.read_json(path, lines=True) if name.endswith('l') else pd.read_parquet(path)
  assert frame['prompt'].tolist() == ['naïve 雪 :', 'two\nlines :']
  assert frame['is_control'].tolist() == [False, True]


def lines(*rows) -> str:
  return ''.join((row if isinstance(row, str) else json.dumps(row)) + '\n' for row in rows)


GOOD = dict(item_id='x', family='f', dataset='d', seed=0, variant='v', prompt='p',
            generalizing='g', shortcut='s')


@pytest.mark.parametrize('rows, message', [
    ((GOOD, '{broken'), r'items.jsonl:2 is not valid JSON'),
    ((GOOD, [1]), r'items.jsonl:2 is not a JSON object'),
    ((dict(GOOD, answer='g'),), r"items.jsonl:1: .*unknown fields \['answer'\]"),
    (({k: v for k, v in GOOD.items() if k != 'seed'},),
     r"items.jsonl:1: missing fields \['seed'\]"),
    ((dict(GOOD, seed='0'),), r"items.jsonl:1: .*seed='0' must be of type int"),
    ((dict(GOOD, shortcut='g'),), r"items.jsonl:1: .*both answers are 'g'"),
    ((dict(GOOD, prompt=''),), r"items.jsonl:1: .*prompt is empty"),
    ((GOOD, GOOD), "'x' occurs twice"),
    ((GOOD, dict(GOOD, item_id='y', family='g')),
     r"'y': dataset 'd' has .* \('g', False\) here and \('f', False\) before"),
    ((GOOD, dict(GOOD, item_id='y', is_control=True)), r"'y': dataset 'd' has .*name them apart"),
    ((), 'no monitor items'),
])
def test_bad_item_files_are_refused_by_line(tmp_path, rows, message):
  path = tmp_path / 'items.jsonl'
  path.write_text(lines(*rows))
  with pytest.raises(UserError, match=message):
    read_items(path)


def test_missing_and_unknown_files_are_refused(tmp_path):
  with pytest.raises(UserError, match='does not exist'):
    read_items(tmp_path / 'none.jsonl')
  with pytest.raises(UserError, match='must end in .jsonl or .parquet'):
    read_items(tmp_path / 'items.csv')
  (tmp_path / 'items.parquet').write_bytes(b'no parquet')
  with pytest.raises(UserError, match='not readable Parquet'):
    read_items(tmp_path / 'items.parquet')
  with pytest.raises(UserError, match='no monitor items'):
    check_items([])
