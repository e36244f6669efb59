"""Data settings: each bad one is refused in one sentence that names the field."""

import pytest

from research.data.config import DataConfig, TextConfig, TokensConfig

BAD = [
  (lambda: DataConfig(kind='texts'), "data.kind='texts'"),
  (lambda: DataConfig(sequence_length=0), 'data.sequence_length=0'),
  (lambda: DataConfig(batch_size=-1), 'data.batch_size=-1'),
  (lambda: DataConfig(seed=-1), 'data.seed=-1'),
  (lambda: DataConfig(kind='text'), 'data.text.paths is empty'),
  (lambda: DataConfig(kind='tokens'), 'data.tokens.paths is empty'),
  (lambda: TextConfig(heldout_fraction=1.0), 'data.text.heldout_fraction=1.0'),
  (lambda: TextConfig(tokenizer='bpe', bpe_vocab_size=258), 'bpe_vocab_size=258 is below 259'),
  (lambda: TextConfig(paths=('a', 'b'), weights=(1.0,)), 'data.text.weights has 1 weights for 2'),
  (lambda: TextConfig(paths=('a',), weights=(-1.0,)), 'none negative'),
  (lambda: TextConfig(paths=('a',), weights=(float('nan'),)), 'finite'),
  (lambda: TextConfig(paths=('a',), weights=(0.0,)), 'not all zero'),
  (lambda: TextConfig(paths=('a',), schedule=((0, 1.0), (0, 1.0))), r'schedule\[1\] starts at'),
  (lambda: TextConfig(paths=('a',), schedule=((5, 1.0),)), r'schedule\[0\] starts at step 5'),
  (lambda: TextConfig(paths=('a',), schedule=((0.0, 1.0), (2.5, 1.0))), 'starts at step 2.5'),
  (lambda: TextConfig(paths=('a',), schedule=((0, 1.0, 1.0),)), '2 weights for 1'),
  (lambda: TextConfig(paths=('a',), weights=(1.0,), schedule=((0, 1.0),)), 'both set'),
  (lambda: TokensConfig(paths=('a',), tokenizer='bpe'), 'data.tokens.tokenizer'),
]


@pytest.mark.parametrize('make,problem', BAD)
def test_bad_settings(make, problem):
  with pytest.raises(ValueError, match=problem) as error:
    make()
  assert '\n' not in str(error.value)


def test_good_settings():
  TextConfig(paths=('a', 'b'), schedule=((0, 1.0, 0.0), (60, 0.5, 0.5)))
  DataConfig(kind='text', text=TextConfig(paths=('a',)))
