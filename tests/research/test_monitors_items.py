"""Item files and what they refuse. Witness: the files' own text, read by json and pandas."""

import json

import pandas as pd
import pytest

from research.errors import UserError
from research.monitors.items import (
    LeftOut, MonitorItem, check_items, read_items, refusal, write_items)

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
    ((GOOD, '{broken'), r'1 of 2 .*\n  not valid JSON in UTF-8: .*: items.jsonl:2\n'),
    ((GOOD, [1]), r'not a JSON object: items.jsonl:2\n'),
    ((dict(GOOD, answer='g'),), r"unknown fields \['answer'\]: x\n"),
    (({k: v for k, v in GOOD.items() if k != 'seed'},), r"missing fields \['seed'\], .*: x\n"),
    (({k: v for k, v in GOOD.items() if k != 'item_id'},),
     r"missing fields \['item_id'\], .*: items.jsonl:1\n"),
    ((dict(GOOD, seed='0'),), "seed='0' must be of type int: x\n"),
    ((dict(GOOD, shortcut='g'),), "both answers are 'g'; they must differ: x\n"),
    ((dict(GOOD, prompt=''),), 'prompt is empty: x\n'),
    ((dict(GOOD, shortcut=''),), 'shortcut is empty: x\n'),
    ((GOOD, GOOD), 'an item before it has the same id: x\n'),
    ((GOOD, dict(GOOD, item_id='y', family='g')),
     "dataset 'd' began with another family or is_control; name them apart: y\n"),
    ((GOOD, dict(GOOD, item_id='y', is_control=True)), 'name them apart: y\n'),
    ((), 'no monitor items'),
])
def test_bad_item_files_are_refused_by_name(tmp_path, rows, message):
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


def test_all_bad_items_are_listed_and_the_first_shown():
  left_out = [LeftOut(f'item {i}', 'prompt is empty') for i in range(25)]
  left_out += [LeftOut(f'odd {i}', f'seed={i}.0 must be of type int') for i in range(22)]
  lines = refusal(left_out, 1000).splitlines()
  assert lines[0] == '47 of 1000 monitor items cannot be scored:'
  assert lines[1] == ('  prompt is empty: ' + ', '.join(f'item {i}' for i in range(20))
                      + ' and 5 more')
  assert lines[2:21] == [f'  seed={i}.0 must be of type int: odd {i}' for i in range(19)]
  assert lines[21] == '  3 more for 3 other reasons' and 'bad_items=leave_out' in lines[-1]
