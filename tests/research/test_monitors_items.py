"""Item files and what they refuse. Witness: the files' own text, read by json and pandas."""

import json

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from research.errors import UserError
from research.monitors.items import (
    LeftOut, MonitorItem, check_items, refusal, sound_items, write_items)
from research.monitors.suite import Suite, settled

ITEMS = [
    MonitorItem('a/0', 'flipped', 'a', 0, 'plain', 'naïve 雪 :', ' good', ' bad'),
    MonitorItem('b/1', 'flipped', 'b', 1, 'plain', 'two\nlines :', ' bad', ' good', True)]


def read_items(path) -> list[MonitorItem]:
  """Returns the items of a file where none may be left out, as suites are read."""
  items = settled(Suite(*sound_items(path), []), 'refuse').items
  check_items(items)
  return items


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
    ((GOOD, '{broken'), r'1 of 2 .*\n  not valid JSON: .*: items.jsonl:2\n'),
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


ACCENTED = dict(GOOD, item_id='naïve', prompt='naïve')


@pytest.mark.parametrize('encoding, words', [
    ('latin-1', r'line 2 \(0xef: invalid continuation byte\); convert it to UTF-8$'),
    ('utf-16', r'line 1 \(0xff: invalid start byte\); convert it to UTF-8$')])
def test_a_file_in_another_encoding_is_refused_whole(tmp_path, encoding, words):
  """Nor are its lines in ASCII left as a suite, whatever may be left out."""
  text = ''.join(json.dumps(row, ensure_ascii=False) + '\n' for row in (GOOD, ACCENTED))
  path = tmp_path / 'items.jsonl'
  path.write_bytes(text.encode(encoding))
  with pytest.raises(UserError, match=f'^item file {path} is not UTF-8 in {words}'):
    sound_items(path)
  path.write_bytes(text.encode('utf-8-sig'))
  assert [item.prompt for item in read_items(path)] == ['p', 'naïve']


def test_damaged_parquet_is_one_sentence(tmp_path):
  path = tmp_path / 'items.parquet'
  columns = {name: [value] for name, value in (GOOD | {'is_control': False}).items()}
  bad = pa.array([b'na\xefve'], pa.binary()).view(pa.string())  # as a careless writer leaves it
  pq.write_table(pa.table(columns | {'prompt': bad}), path)
  with pytest.raises(UserError, match="items.parquet is not readable Parquet: 'utf-8' codec"):
    sound_items(path)
  pq.write_table(pa.table(columns), path)
  content = bytearray(path.read_bytes())
  content[4:40] = bytes(36)  # the first page; the footer is whole
  path.write_bytes(content)
  with pytest.raises(UserError, match='items.parquet is not readable Parquet: '):
    sound_items(path)


@pytest.mark.parametrize('name, words', [
    ('none/items.jsonl', 'the folder .*none of item file items.jsonl does not exist'),
    ('file/items.jsonl', 'the folder .*file of item file items.jsonl is a file'),
    ('folder.jsonl', 'item file .*folder.jsonl is a folder; name a file in it'),
    ('/proc/items.jsonl', 'item file /proc/items.jsonl cannot be written: |is not writable'),
    ('/proc/items.parquet', 'item file /proc/items.parquet cannot be written: |is not writable')])
def test_items_that_cannot_be_written_are_one_sentence(tmp_path, name, words):
  (tmp_path / 'file').write_text('mine')
  (tmp_path / 'folder.jsonl').mkdir()
  with pytest.raises(UserError, match=words) as error:
    write_items(ITEMS, tmp_path / name)
  assert '\n' not in str(error.value)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['file', 'folder.jsonl']


def test_all_bad_items_are_listed_and_the_first_shown():
  left_out = [LeftOut(f'item {i}', 'prompt is empty') for i in range(25)]
  left_out += [LeftOut(f'odd {i}', f'seed={i}.0 must be of type int') for i in range(22)]
  lines = refusal(left_out, 1000).splitlines()
  assert lines[0] == '47 of 1000 monitor items cannot be scored:'
  assert lines[1] == ('  prompt is empty: ' + ', '.join(f'item {i}' for i in range(20))
                      + ' and 5 more')
  assert lines[2:21] == [f'  seed={i}.0 must be of type int: odd {i}' for i in range(19)]
  assert lines[21] == '  3 more for 3 other reasons' and 'bad_items=leave_out' in lines[-1]
