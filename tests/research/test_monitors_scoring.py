"""Scores of items. Witness: every text alone through the whole model, softmax in NumPy float64."""

import functools

import jax
import numpy as np
import pytest

from models import transformer
from models.config import ModelConfig
from research.data import tokenizers
from research.data.microworld import MicroworldConfig
from research.data.microworld.words import WORDS
from research.errors import UserError
from research.monitors.encoding import encode_items
from research.monitors.items import MonitorItem
from research.monitors.microworld_items import microworld_items
from research.monitors.scoring import Scorer

WORD = tokenizers.word_tokenizer(WORDS)
BYTES = tokenizers.byte_tokenizer()
TINY = dict(n_layers=2, d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_ff=32)
MODELS = {
    'plain': dict(),
    'sliding': dict(layer_pattern=('sliding', 'full'), window=8, final_softcap=5.0),
    'alibi': dict(positions='alibi', norm='layernorm', tie_embeddings=False)}


@functools.cache
def model(vocab_size: int, context_length: int, kind: str = 'plain'):
  """Returns (config, graphdef, params) of a tiny model with weights large enough to matter."""
  config = ModelConfig(vocab_size=vocab_size, context_length=context_length, **TINY, **MODELS[kind])
  rng = np.random.default_rng(0)
  params = jax.tree.map(
      lambda leaf: rng.normal(0.3, 0.3, leaf.shape).astype(np.float32),
      transformer.abstract_params(config))
  return config, transformer.build(config), params


@functools.cache
def word_items() -> list[MonitorItem]:
  """Returns a few items of the micro-world: two contexts with shared prefixes, and zero-shot."""
  chosen = [('successive', 0), ('repetitive', 1), ('single_hop', 0)]
  return [item for item in microworld_items(MicroworldConfig(), 64)
          if (item.dataset, item.seed) in chosen and int(item.item_id[-3:]) < 6
          and item.variant not in ('redrawn', 'rearranged', 'five')]


def text_items() -> list[MonitorItem]:
  """Returns items with answers of several tokens and contexts of several lengths."""
  words = [' good', ' 雪', '!']
  return [
      MonitorItem(f'{seed}/{i}', 'f', 'd', seed, 'v', 'Question and answer. ' * seed + f'item {i}:',
                  words[i], words[(i + 1) % 3])
      for seed in (0, 2) for i in range(3)]


def alone(config, graphdef, params, items, tokenizer, start_id=None) -> np.ndarray:
  """Returns [items, 2] log-probabilities from each text on its own, padded at the end."""
  encoded = encode_items(items, tokenizer, config.context_length, start_id)
  rows = np.zeros((2 * len(items), config.context_length), np.int32)
  texts = [text for e in encoded for text in (e.generalizing, e.shortcut)]
  for row, text in zip(rows, texts):
    row[:len(text) - 1] = text[:-1]
  forward = jax.jit(lambda p, t: (lambda m: m.logits(m(t)[0]))(transformer.apply(graphdef, p)))
  logits_BLV = np.asarray(forward(params, rows), np.float64)
  top = logits_BLV.max(-1, keepdims=True)
  logp_BLV = logits_BLV - top - np.log(np.exp(logits_BLV - top).sum(-1, keepdims=True))
  starts = [e.n_prompt for e in encoded for _ in range(2)]
  sums = [sum(logp[t - 1, text[t]] for t in range(start, len(text)))
          for logp, text, start in zip(logp_BLV, texts, starts)]
  return np.reshape(sums, (-1, 2))


def assert_close(scores, expected):
  got = np.stack(scores, axis=1)
  assert got.dtype == np.float32
  assert np.std(expected) > 0.5
  np.testing.assert_array_less(np.abs(got - expected), 1e-4 * np.maximum(1, np.abs(expected)))


@pytest.mark.parametrize('kind', ['plain', 'sliding', 'alibi'])
def test_micro_world_scores_are_those_of_the_texts_alone(kind):
  items = word_items()
  config, graphdef, params = model(300, 64, kind)
  scorer = Scorer(items, WORD, graphdef, context_length=64)
  assert any(b.prefix_ZCP.shape[2] for b in scorer.buckets)
  assert_close(scorer.score(params), alone(config, graphdef, params, items, WORD))


@pytest.mark.parametrize('batch_rows, row_multiple, kind', [(3, 1, 'plain'), (6, 4, 'sliding')])
def test_answers_of_many_tokens(batch_rows, row_multiple, kind):
  config, graphdef, params = model(260, 96, kind)
  items = text_items()
  scorer = Scorer(items, BYTES, graphdef, context_length=96, batch_rows=batch_rows,
                  row_multiple=row_multiple, start_id=BYTES.bos_id)
  assert_close(
      scorer.score(params), alone(config, graphdef, params, items, BYTES, BYTES.bos_id))


def test_scores_are_the_same_bits_whatever_was_scored_before():
  items = word_items()
  _, graphdef, params = model(300, 64)
  other = jax.tree.map(lambda x: 2 * x, params)
  scorer = Scorer(items, WORD, graphdef, context_length=64)
  first, between, again = scorer.score(params), scorer.score(other), scorer.score(params)
  fresh = Scorer(items, WORD, graphdef, context_length=64).score(params)
  for a, b, c, d in zip(first, again, fresh, between, strict=True):
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(a, c)
    assert (a != d).any()
  assert scorer._score._cache_size() == 1  # one compilation serves all snapshots


def test_rows_are_offered_to_the_constraint():
  seen = []

  def constrain(x, names):
    seen.append((x.shape, names))
    return x

  _, graphdef, params = model(300, 64)
  items = word_items()
  scorer = Scorer(items, WORD, graphdef, context_length=64, row_multiple=8, constrain=constrain)
  plain = Scorer(items, WORD, graphdef, context_length=64)
  np.testing.assert_allclose(
      np.stack(scorer.score(params)), np.stack(plain.score(params)), atol=1e-4)
  *rows, result = seen
  assert rows and all(names == ('batch', 'length') for _, names in rows)
  assert all(shape[0] % 8 == 0 for shape, _ in rows)
  assert result == ((2 * len(items),), (None,))  # every host reads all scores


def test_an_item_longer_than_the_context_is_refused_before_anything_runs():
  _, graphdef, _ = model(300, 64)
  with pytest.raises(UserError, match='model.context_length=32'):
    Scorer(word_items(), WORD, graphdef, context_length=32)
