"""Edited windows of data, row by row, and the tables of what windows contain."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from research.data.batches import batch_at, batches, make_source
from research.data.config import DataConfig, SftConfig, TextConfig
from research.data.edits import check_edits, edited, parse_edit
from research.data.errors import DataError
from research.data.windows import document_rows, write_documents

BATCH = 4
MICROWORLD = DataConfig(sequence_length=64, batch_size=BATCH, seed=3)


@pytest.fixture(scope='module')
def source():
  return make_source(MICROWORLD, 100, 'unused')


def same(a, b) -> bool:
  return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def steps_of(source, steps) -> list[dict]:
  return [batch_at(source, BATCH, step) for step in steps]


@pytest.mark.parametrize('text, order', [
    ('swap 2:5 7:10', [0, 1, 7, 8, 9, 5, 6, 2, 3, 4, 10, 11]),
    ('swap 7:9 2:4', [0, 1, 7, 8, 4, 5, 6, 2, 3, 9, 10, 11]),
    ('swap 2:5 2:5', list(range(12))),
    ('replace 2:4 9:11', [0, 1, 9, 10, *range(4, 12)]),
    ('replace 3:5 2:4', [0, 1, 2, 2, 3, *range(5, 12)]),
])
def test_windows_lie_where_the_edit_puts_them(source, text, order):
  stream = batches(edited(source, BATCH, [parse_edit(text)]), BATCH, 0, prefetch=2)
  for step, expected in enumerate(steps_of(source, order)):
    assert same(next(stream), expected), step
  assert str(parse_edit(text)) == text


def test_edits_follow_each_other(source):
  changed = edited(source, BATCH, [parse_edit('swap 0:1 2:3'), parse_edit('replace 1:2 0:1')])
  for step, old in enumerate([2, 2, 0, 3]):  # What step 1 is fed is what step 0 now is.
    assert same(batch_at(changed, BATCH, step), batch_at(source, BATCH, old))


def test_a_window_is_permuted_by_its_seed(source):
  changed, other = (edited(source, BATCH, [parse_edit(f'reorder 2:6 {seed}')]) for seed in (7, 8))
  rows = [[tuple(s.row(j)['tokens_L']) for j in range(8 * BATCH)] for s in (source, changed, other)]
  inside, outside = slice(2 * BATCH, 6 * BATCH), [*range(2 * BATCH), *range(6 * BATCH, 8 * BATCH)]
  assert sorted(rows[0][inside]) == sorted(rows[1][inside]) == sorted(rows[2][inside])
  assert rows[0][inside] != rows[1][inside] != rows[2][inside]
  assert all(rows[0][j] == rows[1][j] for j in outside)
  again = edited(source, BATCH, [parse_edit('reorder 2:6 7')])
  assert rows[1] == [tuple(again.row(j)['tokens_L']) for j in range(8 * BATCH)]


@pytest.mark.parametrize('kinds', [(), ('arithmetic',), ('arithmetic', 'flipped')])
def test_masks_take_kinds_out_of_the_loss_and_nothing_else(source, kinds):
  changed = edited(source, BATCH, [parse_edit(' '.join(['mask 3:9', *kinds]))])
  n_masked = 0
  for j in range(12 * BATCH):
    row, old, family = changed.row(j), source.row(j), source.page(j)[0]
    masked = 3 * BATCH <= j < 9 * BATCH and (not kinds or family in kinds)
    n_masked += masked
    assert row['loss_mask_L'].sum() == (0 if masked else old['loss_mask_L'].sum())
    assert {d.get('masked', False) for d in changed.documents(j)} == {masked}
    assert same({**row, 'loss_mask_L': 0}, {**old, 'loss_mask_L': 0})
  assert 0 < n_masked <= 6 * BATCH and (kinds == ()) == (n_masked == 6 * BATCH)


@pytest.mark.parametrize('text, words', [
    ('', 'must be one of: swap A:B C:D'), ('drop 1:2', 'must be one of'),
    ('swap 1:2', 'must have the form swap A:B C:D'), ('swap 1:2 3:4 5:6', 'must have the form'),
    ('reorder 1:2 x', r'must have the form reorder A:B \[SEED\]'),
    ('mask 5:3', "'5:3' is no range of steps"), ('mask 5-3', 'write A:B with A < B'),
])
def test_what_is_no_edit(text, words):
  with pytest.raises(DataError, match=words):
    parse_edit(text)


def test_unknown_kinds_and_steps_are_named():
  with pytest.raises(DataError, match="no kind 'sums' in this data; it has arithmetic, successive"):
    check_edits([parse_edit('mask 1:2 sums')], MICROWORLD, 10)
  with pytest.raises(DataError, match='the run has steps 0:10, not 9:11'):
    check_edits([parse_edit('replace 1:3 9:11')], MICROWORLD, 10)


def test_packed_rows_of_several_files_are_masked_whole_or_not_at_all():
  def config(*paths, pack):
    return DataConfig(kind='sft', sft=SftConfig(paths=paths, pack=pack))
  with pytest.raises(DataError, match="'mask 1:2 a.jsonl': rows hold examples of several entries .* "
                                      'data.sft.pack=false, or mask all kinds'):
    check_edits([parse_edit('mask 1:2 a.jsonl')], config('a.jsonl', 'b.jsonl', pack=True), 10)
  check_edits([parse_edit('mask 1:2')], config('a.jsonl', 'b.jsonl', pack=True), 10)
  check_edits([parse_edit('mask 1:2 a.jsonl')], config('a.jsonl', 'b.jsonl', pack=False), 10)
  check_edits([parse_edit('mask 1:2 a.jsonl')], config('a.jsonl', pack=True), 10)


def test_documents_of_microworld_windows_are_what_rows_hold(source, tmp_path):
  changed = edited(source, BATCH, [parse_edit('swap 2:3 6:7'), parse_edit('mask 3:4')])
  n_documents = write_documents(tmp_path / 'a' / 'window.parquet', changed, BATCH, 2, 4)
  rows = pq.read_table(tmp_path / 'a' / 'window.parquet').to_pylist()
  assert len(rows) == n_documents and rows == list(document_rows(changed, BATCH, 2, 4))
  assert {row['step'] for row in rows} == {3, 4}  # Of the rows of metrics that they entered.
  for row in rows:
    batch_row = changed.row((row['step'] - 1) * BATCH + row['row'])
    tokens = batch_row['tokens_L'][row['position']:row['position'] + row['n_tokens']]
    assert source.tokenizer.decode(tokens) == row['text']
    old_step = 6 if row['step'] == 3 else 3
    assert row['kind'] == source.page(old_step * BATCH + row['row'])[0]
    assert row['masked'] == (row['step'] == 4) and row['source'] == 'microworld'
  write_documents(tmp_path / 'window.jsonl', changed, BATCH, 2, 4)
  assert [json.loads(line) for line in (tmp_path / 'window.jsonl').open()] == rows
  with pytest.raises(DataError, match='must end in .parquet or .jsonl'):
    write_documents(tmp_path / 'window.csv', changed, BATCH, 2, 4)


def test_documents_of_text_windows_are_what_rows_hold(tmp_path):
  files = {'one': ['a fox', 'two owls sat', 'x'] * 30, 'two': ['snow fell all night long'] * 40}
  for name, texts in files.items():
    (tmp_path / f'{name}.jsonl').write_text(
        ''.join(json.dumps({'text': text}) + '\n' for text in texts))
  paths = tuple(str(tmp_path / f'{name}.jsonl') for name in files)
  config = DataConfig(kind='text', sequence_length=32, batch_size=BATCH, seed=1,
                      cache_dir=str(tmp_path / 'cache'), text=TextConfig(paths=paths))
  source = make_source(config, 10, 'unused')
  rows = list(document_rows(source, BATCH, 0, 5))
  for row in rows:
    tokens = source.row((row['step'] - 1) * BATCH + row['row'])['tokens_L']
    part = tokens[row['position']:row['position'] + row['n_tokens']]
    assert bytes(part.tolist()).decode() == row['text']
    whole = files['one' if row['source'] == paths[0] else 'two']
    assert any(row['text'] in text for text in whole) and row['kind'] == row['source']
  assert {row['kind'] for row in rows} == set(paths)
  mask = edited(source, BATCH, [parse_edit(f'mask 0:5 {paths[1]}')])
  for row in document_rows(mask, BATCH, 0, 5):
    j = (row['step'] - 1) * BATCH + row['row']
    assert row['masked'] == (row['kind'] == paths[1]) == (mask.row(j)['loss_mask_L'].sum() == 0)
