"""Bits per byte: every byte once, exact against closed forms and a NumPy bigram model."""

import dataclasses

import numpy as np
import pytest

from research.data import tokenizers
from research.data.batches import make_source
from research.data.config import DataConfig, TextConfig
from research.data.corpus import HeldoutDocument
from research.data.errors import DataError
from research.evals.bits_per_byte import bits_per_byte, windows

EOS, PAD = 257, 258
RNG = np.random.default_rng(0)


def document(n, file='a'):
  return HeldoutDocument(file, 0, RNG.integers(0, 256, n), n)


@pytest.mark.parametrize('length', [2, 3, 8, 64])
@pytest.mark.parametrize('n', [1, 7, 8, 9, 64, 65, 200])
def test_every_token_is_scored_once_with_half_a_window_behind_it(n, length):
  ids = RNG.integers(0, 256, n)
  stream = np.concatenate([[EOS], ids])
  scored = []
  for row in windows(ids, length, EOS, PAD):
    assert len(row['tokens_L']) == length
    for at in np.flatnonzero(row['loss_mask_L']):
      i = len(scored)
      assert row['targets_L'][at] == ids[i]
      context = row['tokens_L'][:at + 1]
      assert (context == stream[i - at:i + 1]).all()
      assert len(context) >= min(i + 1, length // 2)
      scored.append(ids[i])
  assert len(scored) == n


def test_uniform_bytes_cost_eight_bits():
  documents = [document(50), document(3, 'b'), document(129, 'b')]
  result = bits_per_byte(
    documents, lambda batch: np.full(batch['tokens'].shape, np.log(256), np.float32),
    length=16, batch_size=4, eos_id=EOS)
  assert {name: (r.n_bytes, r.n_tokens) for name, r in result.items()} == {
    'a': (50, 50), 'b': (132, 132), 'all': (182, 182)}
  for r in result.values():
    assert abs(r.bits_per_byte - 8) < 1e-6


@pytest.mark.parametrize('length,batch_size', [(2, 1), (16, 3), (512, 2)])
def test_bigram_model(length, batch_size):
  # A bigram model needs one token of context, so the sum can't depend on the windows.
  nats_VV = RNG.exponential(size=(259, 259))
  documents = [document(n) for n in (40, 1, 333)]
  expected = sum(nats_VV[np.concatenate([[EOS], d.ids[:-1]]), d.ids].sum() for d in documents)
  shapes = set()

  def score(batch):
    shapes.add(tuple(batch['tokens'].shape))
    return nats_VV[batch['tokens'], batch['targets']]

  result = bits_per_byte(
    documents, score, length=length, batch_size=batch_size, eos_id=EOS, pad_id=PAD)['all']
  assert shapes == {(batch_size, length)}
  assert abs(result.nats - expected) < 1e-9 * expected
  assert abs(result.bits_per_byte - expected / np.log(2) / 374) < 1e-9


def test_bytes_not_tokens_are_the_unit():
  text = 'the cat sat on the mat; 日本 ' * 20
  tokenizer = tokenizers.train_bpe([text], 280)
  ids = np.asarray(tokenizer.encode(text))
  documents = [HeldoutDocument('a', 0, ids, len(text.encode()))]
  result = bits_per_byte(documents, lambda b: np.full(b['tokens'].shape, np.log(2)), length=32,
                         batch_size=2, eos_id=tokenizer.eos_id)['all']
  assert abs(result.bits_per_byte - len(ids) / len(text.encode())) < 1e-9


def test_refusals():
  def broken(batch):
    return np.full(batch['tokens'].shape, np.nan)

  with pytest.raises(DataError, match='not finite in held-out document a#0'):
    bits_per_byte([document(5)], broken, length=8, batch_size=1, eos_id=EOS)
  with pytest.raises(DataError, match='no held-out text'):
    bits_per_byte([], broken, length=8, batch_size=1, eos_id=EOS)
  with pytest.raises(DataError, match='at least 2 tokens'):
    bits_per_byte([document(5)], broken, length=1, batch_size=1, eos_id=EOS)


def test_real_text_counts_every_raw_byte(shared_data, tmp_path):
  book = shared_data / 'public_domain_books/wagahaiwa_nekodearu_300k.txt'
  config = DataConfig(kind='text', sequence_length=128, cache_dir=str(tmp_path),
                      text=TextConfig(paths=(str(book),)))
  raw = book.read_bytes()
  for name in ('bytes', 'bpe'):
    text = dataclasses.replace(config.text, tokenizer=name, bpe_vocab_size=512)
    source = make_source(dataclasses.replace(config, text=text), 10, 'unused')
    documents = source.heldout_documents()
    restored = source.tokenizer.decode(np.concatenate([d.ids for d in documents])).encode()
    assert raw.endswith(restored) and abs(len(restored) - len(raw) / 10) < 4
    result = bits_per_byte(documents, lambda b: b['loss_mask'], length=128, batch_size=16,
                           eos_id=source.tokenizer.eos_id)['all']
    assert result.n_bytes == len(restored)
    assert result.nats == result.n_tokens == len(documents[0].ids)
