"""Exact answer boundaries and padding. Witness: the decoded text and plain string arithmetic."""

import dataclasses
import random

import numpy as np
import pytest

from research.data import tokenizers
from research.data.microworld import MicroworldConfig
from research.data.microworld.words import WORDS
from research.errors import UserError
from research.monitors.buckets import make_buckets
from research.monitors.encoding import encode_item, encode_items, read_together
from research.monitors.items import MonitorItem
from research.monitors.microworld_items import microworld_items

CORPUS = ['the answer is good . the answer is bad . answers are goodness and badness .'] * 50
BYTES = tokenizers.byte_tokenizer()
BPE = tokenizers.train_bpe(CORPUS, 300)
WORD = tokenizers.word_tokenizer(WORDS)


def item(prompt: str, good: str, short: str, i: int = 0, seed: int = 0) -> MonitorItem:
  return MonitorItem(f'item {i}', 'family', 'dataset', seed, 'plain', prompt, good, short)


TEXTS = [
    ('the answer is', ' good', ' bad'), ('the answer is ', 'good', 'bad'),
    ('the answer is', ' good', ' goodness'), ('the ans', 'wer', 'wers are'),
    ('snow is 雪', '雪', '山'), ('the answer is good', 'ness', ' and'), ('x', ' 12', ' 1')]


@pytest.mark.parametrize('tokenizer', [BYTES, BPE], ids=['bytes', 'bpe'])
@pytest.mark.parametrize('prompt, good, short', TEXTS)
def test_scored_spans_complete_the_texts(tokenizer, prompt, good, short):
  try:
    encoded = encode_item(item(prompt, good, short), tokenizer)
  except UserError as error:  # only where the prompt has no token of its own
    assert 'no whole token' in str(error) and tokenizer is BPE and prompt == 'x'
    return
  n = encoded.n_prompt
  assert tokenizer.decode(encoded.generalizing) == prompt + good
  assert tokenizer.decode(encoded.shortcut) == prompt + short
  assert encoded.generalizing[:n] == encoded.shortcut[:n]
  assert prompt.startswith(tokenizer.decode(encoded.generalizing[:n]))
  # maximal: the next token differs or reaches into the answer
  same = encoded.generalizing[n] == encoded.shortcut[n]
  assert not same or len(tokenizer.decode(encoded.generalizing[:n + 1])) > len(prompt)
  assert encoded.straddles == (tokenizer.decode(encoded.generalizing[:n]) != prompt)


def test_a_token_across_the_boundary_belongs_to_both_answers():
  clean = encode_item(item('the answer is', ' good', ' bad'), BPE)
  across = encode_item(item('the answer is ', 'good', 'bad'), BPE)
  assert not clean.straddles and len(read_together(clean.texts)) == 1
  assert across.straddles
  # the same text in the end, so the same tokens are scored
  assert (across.generalizing, across.shortcut, across.n_prompt) == (
      clean.generalizing, clean.shortcut, clean.n_prompt)


def test_bytes_of_one_character_are_not_torn():
  # 雪 is e9 9b aa, 鰯 e9 b0 af: the common first byte is part of the answers, not of the prompt
  encoded = encode_item(item('snow ', '雪', '鰯'), BYTES)
  assert encoded.n_prompt == 5 and not encoded.straddles
  assert len(encoded.generalizing) == len(encoded.shortcut) == 8


def test_start_token_and_refusals():
  bare = encode_item(item('the answer is', ' good', ' bad'), BPE)
  started = encode_item(item('the answer is', ' good', ' bad'), BPE, start_id=BPE.bos_id)
  assert started.generalizing == (BPE.bos_id, *bare.generalizing)
  assert started.n_prompt == bare.n_prompt + 1 and started.straddles == bare.straddles
  with pytest.raises(UserError, match="'item 0': no whole token"):
    encode_item(item(' ', 'good', 'bad'), BPE)
  with pytest.raises(UserError, match='an answer adds no token'):
    encode_item(item('the soup', ' ', ' was'), WORD)
  with pytest.raises(UserError, match='both answers are the same tokens'):
    encode_item(item('the soup', ' was', ' was '), WORD)
  with pytest.raises(UserError) as refused:
    encode_items([item('abcd', 'e', 'f'), item('ab', 'e', 'f', i=1), item('abc', 'e', 'ff', i=2)],
                 BYTES, context_length=3)
  assert str(refused.value).splitlines()[:2] == [
      '2 of 3 monitor items cannot be scored:',
      '  prompt and answer are longer than model.context_length=3: item 0, item 2']


def sums_in(buckets, encoded):
  """Returns, per item and answer, the text that the buckets would score, rebuilt from arrays."""
  found = {}
  for b in buckets:
    (Z, B, S), C = b.tokens_ZBS.shape, b.prefix_ZCP.shape[1]
    for z in range(Z):
      for row in range(B):
        c = row // (B // C)
        prefix = b.prefix_ZCP[z, c, :b.prefix_lengths_ZC[z, c]].tolist()
        for r, slot in enumerate(b.slots_ZBR[z, row]):
          counts = b.counts_ZBTR[z, row, :, r]
          if slot >= 0:
            assert slot not in found
            places, targets = b.places_ZBT[z, row, counts], b.targets_ZBTR[z, row, counts, r]
            read = [(tuple(prefix + b.tokens_ZBS[z, row, :p + 1].tolist()), int(t))
                    for p, t in zip(places, targets)]
            found[slot] = read
          else:
            assert not counts.any()
  return found


def assert_buckets_score_everything(buckets, encoded):
  found = sums_in(buckets, encoded)
  assert set(found) == set(range(2 * len(encoded)))
  for i, e in enumerate(encoded):
    for slot, text in ((2 * i, e.generalizing), (2 * i + 1, e.shortcut)):
      assert found[slot] == [(text[:t], text[t]) for t in range(e.n_prompt, len(text))]


@pytest.mark.parametrize('batch_rows, row_multiple', [(512, 1), (40, 1), (7, 4)])
def test_buckets_hold_every_answer_in_its_own_context(batch_rows, row_multiple):
  items = microworld_items(MicroworldConfig(), 64)
  encoded = encode_items(items, WORD, 64)
  buckets = make_buckets(encoded, context_length=64, batch_rows=batch_rows,
                         row_multiple=row_multiple)
  assert_buckets_score_everything(buckets, encoded)
  for b in buckets:
    assert b.prefix_ZCP.shape[1] % row_multiple == 0
    assert b.prefix_ZCP.shape[2] + b.tokens_ZBS.shape[2] <= 64
    if row_multiple == 1:
      assert b.tokens_ZBS.shape[1] <= batch_rows


@pytest.mark.parametrize('tokens, reads', [(400, 10**6), (10**6, 48), (150, 12)])
def test_what_runs_at_a_time_is_bounded_on_every_device(tokens, reads):
  rng, n_devices = random.Random(0), 4
  items = [item(f'a context that some share {i % 3} ' * (i % 2) + f'and {i}' * rng.randint(1, 9),
                *(answer * rng.randint(1, 12) for answer in 'xy'), i=i) for i in range(120)]
  encoded = encode_items(items, BYTES, 128)
  buckets = make_buckets(encoded, context_length=128, row_multiple=n_devices, tokens=tokens,
                         reads=reads)
  assert_buckets_score_everything(buckets, encoded)
  for b in buckets:
    n_chunks, n_contexts, _ = b.prefix_ZCP.shape
    n_here = n_chunks * n_devices
    assert n_contexts % n_devices == 0
    assert b.n_tokens <= n_here * tokens or b.tokens_ZBS.shape[1] == n_devices
    assert b.places_ZBT.size <= n_here * reads or b.tokens_ZBS.shape[1] == n_devices
  unbounded = make_buckets(encoded, context_length=128, row_multiple=n_devices)
  assert any(b.n_tokens > len(b.tokens_ZBS) * n_devices * tokens
             or b.places_ZBT.size > len(b.tokens_ZBS) * n_devices * reads for b in unbounded)
  assert len(buckets) < sum(len(b.tokens_ZBS) for b in buckets)


def test_buckets_of_answers_of_many_lengths():
  rng = random.Random(0)
  words = ['snow', 'rain', 'sunshine', '雪', 'a', 'thunderstorms']
  items = [
      item(f'context {seed} ' * (3 * seed) + ' '.join(rng.choices(words, k=rng.randint(1, 4))),
           *(' ' + word for word in rng.sample(words, 2)), i=10 * seed + i, seed=seed)
      for seed in range(4) for i in range(6)]
  for tokenizer in (BYTES, BPE):
    encoded = encode_items(items, tokenizer, 128)
    buckets = make_buckets(encoded, context_length=128, batch_rows=16)
    assert_buckets_score_everything(buckets, encoded)
    assert any(b.prefix_ZCP.shape[2] for b in buckets)


def test_the_micro_world_suite_is_cheap():
  items = microworld_items(MicroworldConfig(), 64)
  encoded = encode_items(items, WORD, 64)
  assert all(len(read_together(e.texts)) == 1 and not e.straddles for e in encoded)
  buckets = make_buckets(encoded, context_length=64, batch_rows=256)
  # a forward token costs a third of a training token: 10k of these are 30k here
  n_tokens = sum(b.n_tokens for b in buckets)
  assert n_tokens <= 30_000
  alone = sum(e.n_prompt for e in encoded)
  assert n_tokens < 0.25 * alone
  assert len(buckets) <= 9
  assert np.concatenate([b.slots_ZBR.ravel() for b in buckets]).max() == 2 * len(items) - 1


def n_tokens(buckets) -> int:
  return sum(b.n_tokens for b in buckets)


def test_labels_do_not_matter_for_what_is_shared():
  items = microworld_items(MicroworldConfig(), 64)
  shuffled = [dataclasses.replace(item, family='f', dataset='d', seed=0, variant='v',
                                  is_control=False) for item in items]
  random.Random(0).shuffle(shuffled)
  counts = [n_tokens(make_buckets(encode_items(suite, WORD, 64), context_length=64, batch_rows=256))
            for suite in (items, shuffled)]
  assert counts[0] == counts[1]


def test_two_contexts_under_one_label_are_two_prefixes():
  words = ['red', 'green', 'blue', 'gray']
  items = [item(f'{context} ' * 20 + f'and number {i}:', *answers, i=10 * c + i)
           for c, context in enumerate(words) for i, answers in enumerate([
               (' a', ' bb'), (' ccc', ' d'), ('e', 'f'), (' five', ' four')])]
  encoded = encode_items(items, BYTES, 256)
  bucket, = make_buckets(encoded, context_length=256, batch_rows=64)
  assert_buckets_score_everything([bucket], encoded)
  assert bucket.prefix_ZCP.shape[:2] == (1, len(words))
  assert {BYTES.decode(prefix[:4]) for prefix in bucket.prefix_ZCP[0]} == {
      'blue', 'gray', 'gree', 'red '}


def test_answers_share_what_they_can():
  # one row: an answer of one token, and answers that differ in their last token alone
  encoded = encode_items([item('why', 'x', 'abc'), item('how', 'abc', 'abd', i=1)], BYTES, 64)
  buckets = make_buckets(encoded, context_length=64, batch_rows=8)
  assert_buckets_score_everything(buckets, encoded)
  assert [b.tokens_ZBS.shape for b in buckets] == [(1, 2, 5)]
  # two rows behind their prompt
  prompt = 'a prompt that is long enough to be shared'
  encoded = encode_items([item(prompt, 'xyz', 'abc')], BYTES, 64)
  bucket, = make_buckets(encoded, context_length=64, batch_rows=8)
  assert_buckets_score_everything([bucket], encoded)
  assert bucket.prefix_lengths_ZC.tolist() == [[len(prompt) - 1]]
  assert bucket.tokens_ZBS.shape == (1, 2, 3)


def test_prompts_that_share_nothing_are_padded_little():
  rng = random.Random(0)
  lengths = [rng.randint(128, 512) for _ in range(600)]
  items = [item(''.join(rng.choices('abcdefgh', k=n)), 'x', 'y', i) for i, n in enumerate(lengths)]
  encoded = encode_items(items, BYTES, 512)
  buckets = make_buckets(encoded, context_length=512, batch_rows=32)
  assert_buckets_score_everything(buckets, encoded)
  assert len(buckets) <= 13 and n_tokens(buckets) < 1.1 * sum(lengths)


def test_every_beginning_may_be_a_prompt():
  items = [item('a' * i, 'x', 'y', i) for i in range(1, 1100)]
  encoded = encode_items(items, BYTES, 1100)
  buckets = make_buckets(encoded, context_length=1100, batch_rows=64)
  assert set(sums_in(buckets, encoded)) == set(range(2 * len(items)))


def test_short_questions_do_not_wait_for_a_long_one():
  asked = ['?'] * 99 + ['a long question that one item has and the others do not, ' * 3]
  items = [item(f'the context of all, {i:02d}'[:18] + text + f'{i:02d}:', 'x', 'y', i)
           for i, text in enumerate(asked)]
  encoded = encode_items(items, BYTES, 256)
  buckets = make_buckets(encoded, context_length=256, batch_rows=128)
  assert_buckets_score_everything(buckets, encoded)
  assert n_tokens(buckets) < 1500
