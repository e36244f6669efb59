"""Items that cannot be scored are listed by id: refused before anything runs, or left out."""

import json
import pathlib

import pytest

from research.data import tokenizers
from research.data.microworld.words import WORDS
from research.errors import UserError
from research.monitors.watch import read_suite
from research.run_dir import RunDir
from research.training.loop import train
from tests.research.conftest import short_config

GOOD = dict(item_id='good', family='f', dataset='d', seed=0, variant='v', prompt='3 + 4 =',
            generalizing=' 7', shortcut=' 8')
BAD = {
    'missing fields [\'seed\'], unknown fields []': {k: v for k, v in GOOD.items() if k != 'seed'},
    "both answers are ' 7'; they must differ": GOOD | {'shortcut': ' 7'},
    'generalizing is empty': GOOD | {'generalizing': ''},
    'an answer adds no token to its prompt': GOOD | {'generalizing': ' '},
    'both answers are the same tokens': GOOD | {'shortcut': ' 7 '},
    'prompt and answer are longer than model.context_length=64': GOOD | {'prompt': '3 + ' * 33},
    "text '3 + soup! 7' cannot be tokenized": GOOD | {'prompt': '3 + soup!'}}


def write_bad_items(path: pathlib.Path) -> pathlib.Path:
  """Writes bad items between two good ones; ids are bad 0, bad 1..."""
  rows = [row | {'item_id': f'bad {i}'} for i, row in enumerate(BAD.values())]
  lines = [json.dumps(row) for row in (GOOD, *rows, GOOD | {'item_id': 'too'}, GOOD)]
  path.write_text('\n'.join([*lines, '{"item_id": "torn']) + '\n')
  return path


@pytest.fixture
def item_file(tmp_path):
  return write_bad_items(tmp_path / 'items.jsonl')


def reasons() -> dict[str, str]:
  """Returns the beginning of every reason by item id."""
  return {f'bad {i}': reason for i, reason in enumerate(BAD)} | {
      'good': 'an item before it has the same id', 'items.jsonl:11': 'not valid JSON'}


def test_training_refuses_them_all_in_one_message_and_writes_nothing(item_file, tmp_path):
  with pytest.raises(UserError) as refused:
    train(short_config(**{'monitors.suite': str(item_file)}), RunDir(tmp_path / 'run'))
  first, *lines, last = str(refused.value).splitlines()
  assert first == '9 of 11 monitor items cannot be scored:'
  assert '--config.monitors.bad_items=leave_out' in last
  assert len(lines) == 9
  for item_id, reason in reasons().items():
    assert any(line.startswith(f'  {reason}') and line.endswith(f': {item_id}') for line in lines)
  assert not (tmp_path / 'run').exists()


def test_they_are_left_out_where_that_is_chosen_and_said(item_file, capsys):
  config = short_config(**{'monitors.suite': str(item_file), 'monitors.bad_items': 'leave_out'})
  suite = read_suite(config, tokenizers.word_tokenizer(WORDS), None)
  assert [item.item_id for item in suite.items] == ['good', 'too']
  left_out = dict(suite.left_out)
  assert left_out.keys() == reasons().keys() and len(suite.left_out) == 9
  assert all(left_out[item_id].startswith(reason) for item_id, reason in reasons().items())
  said = capsys.readouterr().out.splitlines()
  assert said[0] == 'monitors: 2 of 11 items are scored: f/d 2' and len(said) == 10
  assert 'monitors: left out, generalizing is empty: bad 2' in said


def test_a_suite_without_a_good_item_is_refused_whatever_was_chosen(tmp_path):
  path = tmp_path / 'items.jsonl'
  path.write_text(json.dumps(GOOD | {'prompt': ''}) + '\n')
  config = short_config(**{'monitors.suite': str(path), 'monitors.bad_items': 'leave_out'})
  with pytest.raises(UserError, match='1 of 1 monitor items cannot be scored:\n  prompt is empty'):
    read_suite(config, tokenizers.word_tokenizer(WORDS), None)


def test_another_choice_is_refused():
  with pytest.raises(ValueError, match="monitors.bad_items='drop' is not one of refuse, leave_out"):
    short_config(**{'monitors.bad_items': 'drop'})
