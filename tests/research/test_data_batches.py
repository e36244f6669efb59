"""The source over text: batches as a pure function of (config, k), and what they contain."""

import dataclasses
import json

import numpy as np
import pytest

from research.data import shards, tokenizers
from research.data.batches import (
  batch_at, batches, heldout_batches, make_source, window_documents)
from research.data.config import DataConfig, TextConfig, TokensConfig
from research.data.errors import DataError
from research.data.text_corpus import read_texts

STORIES = [f'story {i}: ' + ' '.join(f'{w}{i}' for w in ('fox', 'crow', 'ox') * (i % 5 + 1)) + '.\n'
           for i in range(60)]


@pytest.fixture
def config(tmp_path):
  (tmp_path / 'long.txt').write_text(''.join(STORIES) * 2, encoding='utf-8')
  lines = [json.dumps({'text': s}) for s in STORIES]
  (tmp_path / 'short.jsonl').write_text('\n'.join(lines) + '\n', encoding='utf-8')
  text = TextConfig(paths=(str(tmp_path / 'long.txt'), str(tmp_path / 'short.jsonl')),
                    weights=(0.25, 0.75))
  return DataConfig(kind='text', sequence_length=32, batch_size=8, seed=5, text=text,
                    cache_dir=str(tmp_path / 'cache'))


def open_source(config):
  return make_source(config, 100, 'unused')


def same(a, b):
  return a.keys() == b.keys() and all((a[k] == b[k]).all() and a[k].dtype == b[k].dtype for k in a)


def test_any_batch_by_any_route(config, tmp_path):
  source = open_source(config)
  reference = [batch_at(source, 8, k) for k in range(40)]
  assert {k: (v.shape, v.dtype.name) for k, v in reference[0].items()} == {
    'tokens': ((8, 32), 'int32'), 'targets': ((8, 32), 'int32'),
    'segment_ids': ((8, 32), 'int32'), 'positions': ((8, 32), 'int32'),
    'loss_mask': ((8, 32), 'float32')}
  # Another cache, another order of asking.
  fresh = open_source(dataclasses.replace(config, cache_dir=str(tmp_path / 'other')))
  for k in reversed(range(40)):
    assert same(reference[k], batch_at(fresh, 8, k))
  for prefetch in (0, 1, 7):  # threads, and a start in the middle
    stream = batches(source, 8, 11, prefetch=prefetch)
    for k in range(11, 31):
      assert same(reference[k], next(stream))
  # Three hosts together hold what one would.
  hosts = [batches(source, 8, 0, rows) for rows in ([0, 1, 2], [3, 4], [5, 6, 7])]
  for k in range(10):
    parts = [next(host) for host in hosts]
    assert same(reference[k], {n: np.concatenate([p[n] for p in parts]) for n in parts[0]})
  other = batch_at(open_source(dataclasses.replace(config, seed=6)), 8, 0)
  assert not same(reference[0], other)


def test_cache_is_used_and_survives_moving(config, tmp_path):
  source = open_source(config)
  entries = {p: p.stat().st_mtime_ns for p in (tmp_path / 'cache').rglob('*')}
  assert same(source.row(9), open_source(config).row(9))
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / 'cache').rglob('*')} == entries
  moved = tmp_path / 'moved.txt'
  (tmp_path / 'long.txt').rename(moved)
  text = dataclasses.replace(config.text, paths=(str(moved), config.text.paths[1]))
  again = open_source(dataclasses.replace(config, text=text))
  assert again.hash == source.hash and same(source.row(9), again.row(9))
  assert {p: p.stat().st_mtime_ns for p in (tmp_path / 'cache').rglob('*')} == entries
  moved.write_text(''.join(STORIES) * 2 + 'x')
  assert open_source(dataclasses.replace(config, text=text)).hash != source.hash


def test_an_epoch_holds_every_row_once(config):
  text = TextConfig(paths=config.text.paths[:1])
  source = open_source(dataclasses.replace(config, text=text))
  raw = ''.join(STORIES).encode() * 2
  stream = np.frombuffer(raw[:len(raw) - round(len(raw) * 0.1)], np.uint8).astype(int)
  stream = np.concatenate([[257], stream, [257]])  # byte ids, EOS around
  expected = sorted(tuple(stream[a:a + 32]) for a in range(0, len(stream) - 32, 32))
  n = source.n_rows
  epochs = [[tuple(source.row(j)['tokens_L']) for j in range(e * n, (e + 1) * n)] for e in (0, 1)]
  assert sorted(epochs[0]) == sorted(epochs[1]) == expected
  assert epochs[0] != epochs[1] and epochs[0] != expected
  for j in range(source.n_rows):
    row = source.row(j)
    assert (row['tokens_L'][1:] == row['targets_L'][:-1]).all() and row['loss_mask_L'].all()


def test_documents_of_a_window_are_what_the_rows_hold(config):
  source = open_source(config)
  texts = {f'{f.path}#{i}': text for _, files in read_texts(config.text)
           for f in files for i, text in enumerate(f.train)}
  described = list(window_documents(source, 8, 2, 6))
  for step in range(2, 6):
    batch = batch_at(source, 8, step)
    for r in range(8):
      row = batch['tokens'][r]
      mine = [d for d in described if (d['step'], d['row']) == (step, r)]
      spelled = b''.join(
        texts[d['id']].encode()[slice(*d['tokens'])] for d in mine)
      assert bytes(int(t) for t in row if t < 256) == spelled
  short = [d for d in described if d['file'].endswith('.jsonl')]
  share = len({(d['step'], d['row']) for d in short}) / 32
  assert 0.5 < share < 0.95 and {d['epoch'] for d in described} == {0}


def test_heldout_rows_score_every_token_once(config):
  source = open_source(config)
  rows = list(source.heldout_rows())
  assert len(rows) == len(source.heldout_rows())
  seen = np.concatenate([r['targets_L'][r['loss_mask_L'] > 0] for r in rows])
  expected = [t for _, files in read_texts(config.text) for f in files for d in f.heldout
              for t in (*d.encode(), 257)]
  assert seen.tolist() == expected
  assert all((r['segment_ids_L'] == 0).tolist() == (r['loss_mask_L'] == 0).tolist() for r in rows)
  with pytest.raises(IndexError):
    source.heldout_rows()[len(rows)]
  documents = source.heldout_documents()
  assert [bytes(d.ids.tolist()).decode() for d in documents] == [
    t for _, files in read_texts(config.text) for f in files for t in f.heldout]
  assert all(d.n_bytes == len(d.ids) for d in documents)
  assert [d.number for d in documents if d.file.endswith('jsonl')] == list(range(54, 60))


def test_heldout_batches_are_spread_over_all_files(config):
  source = open_source(config)
  rows = source.heldout_rows()
  some = heldout_batches(source, 4, 2)
  expected = [rows[i * len(rows) // 8]['tokens_L'].tolist() for i in range(8)]
  assert [r for b in some for r in b['tokens'].tolist()] == expected
  everything = heldout_batches(source, 8, 100)
  assert sum(b['loss_mask'].sum() for b in everything) == sum(r['loss_mask_L'].sum() for r in rows)
  assert all(b['tokens'].shape == (8, 32) for b in everything)
  mine = heldout_batches(source, 8, 100, rows=[2, 5])
  for b, m in zip(everything, mine, strict=True):
    assert same(m, {name: values[[2, 5]] for name, values in b.items()})
  text = dataclasses.replace(config.text, heldout_fraction=0.0)
  assert heldout_batches(open_source(dataclasses.replace(config, text=text)), 8, 4) == []


def test_bpe_is_trained_on_the_training_part_only(config, tmp_path):
  secret = 'zzqq' * 400  # only in the held-out end
  path = tmp_path / 'secret.txt'
  path.write_text(''.join(STORIES) * 4 + secret, encoding='utf-8')
  n_bytes = path.stat().st_size
  text = TextConfig(paths=(str(path),), tokenizer='bpe', bpe_vocab_size=300,
                    heldout_fraction=(len(secret) + 1) / n_bytes)
  source = open_source(dataclasses.replace(config, text=text))
  assert source.tokenizer.vocab_size == 300
  assert 'zz' not in source.tokenizer.backend.get_vocab()
  assert source.heldout_documents()[0].n_bytes == len(secret) + 1
  facts = source.facts()
  assert facts['tokenizer_hash'] == source.tokenizer.hash
  assert facts['components'][0]['files'][0]['heldout_bytes'] == len(secret) + 1
  json.dumps(facts)


def test_schedule_changes_shares_at_its_step(config):
  text = dataclasses.replace(config.text, weights=(), schedule=((0, 1, 0), (3, 0, 1)))
  source = open_source(dataclasses.replace(config, text=text))
  files = [[d['file'][-4:] for d in window_documents(source, 8, k, k + 1)] for k in range(6)]
  assert all(set(f) == {'.txt'} for f in files[:3]) and all(set(f) == {'sonl'} for f in files[3:])
  n_rows = source.facts()['components'][0]['rows']
  assert source.epochs(24) == {text.paths[0]: 24 / n_rows, text.paths[1]: 0}
  with pytest.raises(DataError, match=r'data.text.schedule\[1\] starts at step 3'):
    make_source(dataclasses.replace(config, text=text), 3, 'unused')


@pytest.mark.parametrize('name', ['a.npy', 'a.bin', 'a.arrayrecord'])
def test_shards_are_read_as_the_text_is(config, tmp_path, name):
  tokenizer = tokenizers.byte_tokenizer()
  shards.write_shard(tmp_path / name, [tokenizer.encode(s) for s in STORIES], tokenizer)
  settings = TokensConfig(paths=(str(tmp_path / name),))
  tokens = dataclasses.replace(config, kind='tokens', tokens=settings)
  text = TextConfig(paths=config.text.paths[1:], heldout_fraction=0.0)
  source, witness = open_source(tokens), open_source(dataclasses.replace(config, text=text))
  assert source.n_rows == witness.n_rows
  for j in range(source.n_rows + 3):
    assert same(source.row(j), witness.row(j))
    assert ([(d['document'], d['tokens']) for d in source.documents(j)]
            == [(d['document'], d['tokens']) for d in witness.documents(j)])
  cut = dataclasses.replace(tokens.tokens, heldout_fraction=0.5)
  halves = open_source(dataclasses.replace(tokens, tokens=cut))
  assert 0.3 < halves.n_rows / source.n_rows < 0.7 and len(halves.heldout_rows())
  with pytest.raises(DataError, match='text is unknown'):
    halves.heldout_documents()


def test_shards_of_several_files(config, tmp_path):
  tokenizer = tokenizers.byte_tokenizer()
  ids = [tokenizer.encode(s) for s in STORIES]
  for i in range(3):
    shards.write_shard(tmp_path / f's{i}.npy', ids[20 * i:20 * i + 20], tokenizer)
  tokens = TokensConfig(paths=(str(tmp_path / 's*.npy'),))
  source = open_source(dataclasses.replace(config, kind='tokens', tokens=tokens))
  streams = [np.load(tmp_path / f's{i}.npy').astype(int) for i in range(3)]
  expected = sorted(tuple(s[a:a + 33]) for s in streams for a in range(0, len(s) - 32, 32))
  rows = [source.row(j) for j in range(source.n_rows)]
  assert sorted((*r['tokens_L'], r['targets_L'][-1]) for r in rows) == expected


def test_shards_that_do_not_fit(config, tmp_path):
  tokenizer = tokenizers.byte_tokenizer()
  path = tmp_path / 'a.npy'
  tokens = dataclasses.replace(config, kind='tokens', tokens=TokensConfig(paths=(str(path),)))

  def refused(problem):
    with pytest.raises(DataError, match=problem) as error:
      open_source(tokens)
    assert str(path) in str(error.value)

  other = tokenizers.train_bpe(STORIES, 300)
  shards.write_shard(path, [other.encode(s) for s in STORIES], other)
  refused('was made with tokenizer .* but data.tokens.tokenizer')
  shards.write_shard(path, [tokenizer.encode(s) for s in STORIES], tokenizer)
  np.save(path, np.full(100, 259, np.uint16))
  refused('holds token 259, but its tokenizer has only 259 ids')
  np.save(path, np.zeros(100, np.int64))
  refused(r'holds int64\[100\]')
  path.write_bytes(b'nonsense')
  refused('not a readable .npy')
  shards.sidecar(path).write_text('{"dtype": "uint16"}')
  refused("'tokenizer_hash'")
  shards.sidecar(path).unlink()
  refused('has no a.npy.json')


def test_too_little_text(config, tmp_path):
  (tmp_path / 'tiny.txt').write_text('short')
  text = TextConfig(paths=(config.text.paths[0], str(tmp_path / 'tiny.txt')), heldout_fraction=0.2)
  with pytest.raises(DataError, match=r'data.text.paths\[1\].* has 6 training tokens.* the 33'):
    open_source(dataclasses.replace(config, text=text))


def test_tokenizer_without_end_token(config, tmp_path):
  path = tmp_path / 'tokenizer.json'
  document = json.loads(tokenizers.byte_tokenizer().backend.to_str())
  document['added_tokens'] = []
  path.write_text(json.dumps(document))
  text = dataclasses.replace(config.text, tokenizer=str(path))
  with pytest.raises(DataError, match='no end-of-text token'):
    open_source(dataclasses.replace(config, text=text))


def test_damaged_cache_is_named(config, tmp_path):
  open_source(config)
  for stream in (tmp_path / 'cache').rglob('train.npy'):
    stream.write_bytes(b'')
  with pytest.raises(DataError, match='is damaged .* delete it'):
    open_source(config)


def test_failed_tokenization_leaves_nothing(config, tmp_path):
  (tmp_path / 'bad.jsonl').write_text('{"text": "a"}\n{"text"')
  text = TextConfig(paths=(str(tmp_path / 'bad.jsonl'),))
  with pytest.raises(DataError, match='bad.jsonl, line 2'):
    open_source(dataclasses.replace(config, text=text))
  assert list((tmp_path / 'cache').iterdir()) == []


def test_microworld_through_the_same_door():
  config = DataConfig(sequence_length=64, batch_size=4)
  source = make_source(config, 10, 'unused')
  stream = batches(source, 4, 3)
  for k in (3, 4):
    assert same(next(stream), batch_at(source, 4, k))
  assert next(window_documents(source, 4, 3, 4))['step'] == 3
