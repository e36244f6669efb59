"""Text files: every format, the held-out cut, and one sentence for each kind of broken file."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from research.data import text_files
from research.data.errors import DataError


def read(path, fraction=0.25, field='text'):
  return text_files.read_text_file(path, fraction, field)


def test_txt_is_cut_by_bytes_at_a_character(tmp_path):
  path = tmp_path / 'a.txt'
  raw = ('é' * 10).encode()  # 20 bytes
  path.write_bytes(raw)
  file = read(path, 0.25)  # byte 15 is inside a character
  assert file.train[0].encode() == raw[:14] and file.heldout[0].encode() == raw[14:]
  assert file.cut == 'byte 14 of 20'
  whole = read(path, 0.0)
  assert whole.train == ('é' * 10,) and whole.heldout == ()


def test_line_ends_stay(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_bytes(b'\xef\xbb\xbfa\r\nb\n\rc\r\n')
  file = read(path, 0.0)
  assert file.train[0].encode() == path.read_bytes()


@pytest.mark.parametrize('pack,suffix', [
  (lambda b: b, ''), (gzip.compress, '.gz'), (zstandard.ZstdCompressor().compress, '.zst'),
  (lambda b: b''.join(zstandard.ZstdCompressor().compress(x) for x in (b[:7], b[7:])), '.zst')])
def test_compressed_files_read_alike(tmp_path, pack, suffix):
  texts = ['one', 'two\n2', '三', 'four']
  raw = b'\n'.join(json.dumps({'text': t}).encode() for t in texts) + b'\n\n'
  path = tmp_path / f'a.jsonl{suffix}'
  path.write_bytes(pack(raw))
  file = read(path)
  assert file.train == ('one', 'two\n2', '三') and file.heldout == ('four',)
  assert file.cut == 'document 3 of 4'
  path = tmp_path / f'a.txt{suffix}'
  path.write_bytes(pack(b'some plain text!'))
  assert read(path).train == ('some plain t',)


def test_parquet(tmp_path):
  path = tmp_path / 'a.parquet'
  pyarrow.parquet.write_table(pyarrow.table({'body': ['a', 'b', 'c'], 'n': [1, 2, 3]}), path)
  file = read(path, 0.3, 'body')
  assert file.train == ('a', 'b') and file.heldout == ('c',)
  for field, problem in (('text', "no column 'text'"), ('n', 'holds int64')):
    with pytest.raises(DataError, match=problem):
      read(path, 0.3, field)


BAD = [
  ('a.txt', b'', 'is empty'),
  ('a.txt', b'x', 'too small'),
  ('a.txt', b'abcdefg\xffabc', r'not UTF-8 at byte 7 \(0xff'),
  ('a.txt', b'abcdefgabc\xe9', r'not UTF-8 at byte 10 \(0xe9'),
  ('a.txt.gz', b'not gzip', 'not a whole .gz'),
  ('a.txt.gz', gzip.compress(b'abcdefgh' * 9, mtime=0)[:-9], 'not a whole .gz'),
  ('a.txt.zst', b'not zstd', 'not a whole .zst'),
  ('a.jsonl', b'{"text": "a"}\n\n{"text": \n', 'a.jsonl, line 3 is not valid JSON'),
  ('a.jsonl', b'{"text": "a"}\n{"txt": "b"}\n', "a.jsonl, line 2 has no string field 'text'"),
  ('a.jsonl', b'{"text": "a"}\n["text"]\n', 'line 2 has no string field'),
  ('a.jsonl', b'{"text": "a"}\n{"text": "\xc3"}', 'not UTF-8 at byte 24'),
  ('a.jsonl', b'{"text": "\\ud800"}', 'lone surrogate'),
  ('a.jsonl', b'{"text": "alone"}', 'too small'),
  ('a.parquet', b'PAR1', 'not a readable parquet'),
]


@pytest.mark.parametrize('name,raw,problem', BAD)
def test_broken_files_are_named(tmp_path, name, raw, problem):
  path = tmp_path / name
  path.write_bytes(raw)
  with pytest.raises(DataError, match=problem) as error:
    read(path)
  assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_listing(tmp_path):
  for name in ('b.txt', 'a.jsonl.gz', 'c.md', '.hidden.txt', 'deep/d.parquet'):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('x')

  def listed(entry):
    files = text_files.list_files(str(entry), text_files.text_suffixes(), 'data.text.paths[0]')
    return [str(f.relative_to(tmp_path)) for f in files]

  assert listed(tmp_path) == ['a.jsonl.gz', 'b.txt', 'deep/d.parquet']
  assert listed(tmp_path / 'b.txt') == ['b.txt']
  assert listed(tmp_path / '*' / '*.parquet') == ['deep/d.parquet']
  for entry, problem in ((tmp_path / 'c.md', 'does not end in'), (tmp_path / 'e.txt', 'no file')):
    with pytest.raises(DataError, match=problem) as error:
      listed(entry)
    assert 'data.text.paths[0]' in str(error.value)


def test_real_books_are_cut_once(shared_data):
  folder = shared_data / 'public_domain_books'
  for path in text_files.list_files(str(folder / '[bw]*.txt'), ('.txt',), 'here'):
    file, size = read(path, 0.1), path.stat().st_size
    assert ''.join((*file.train, *file.heldout)).encode() == path.read_bytes()
    assert abs(len(file.heldout[0].encode()) - size / 10) < 4
