"""The published score. Witness: its rule spelled out, text by text, softmax in NumPy float64."""

import json

import jax
import numpy as np
import pytest
import tokenizers as hf

from models import transformer
from models.config import ModelConfig
from parallelism.mesh import make_mesh
from research import build as build_lib
from research.data import tokenizers
from research.errors import UserError
from research.evals import persona
from research.evals.samples import sample_run
from research.monitors import table
from research.monitors.items import MonitorItem
from research.monitors.published_score import (
    PublishedScorer, compare, compare_stored, encode_published)
from research.monitors.scoring import Scores
from research.monitors.watch import rescore
from research.run_dir import RunDir
from research.training.loop import train
from tests.research import published_folder as made
from tests.research.conftest import short_config

pytestmark = pytest.mark.usefixtures('quick_compilation')
BYTES = tokenizers.byte_tokenizer()
TINY = dict(n_layers=1, d_model=16, n_heads=2, n_kv_heads=1, d_head=8, d_ff=32)
# Several tokens, digits that some tokenizers split from their space, and boundaries that merge.
PAIRS = [
    ('Review: a smile on your face\nSentiment:', 'Positive', 'Negative'),
    ('Q: 68 - 60 = ?\nA:', '8', '4'), ('x = 12345\nprint(x)\nOutput:', '12345', '7'),
    ('The answer is ', 'unbelievable', 'no'), ('The answer is (', 'a) b', 'c'),
    ('count the letters:\n\n', 'three', 'eleven hundred'), ('Ein Wort\t', '雪国', 'é'),
    ('It costs $', '0.05', '0.10')]


def items() -> list[MonitorItem]:
  """Returns the pairs, all of one context, so that they share a prefix."""
  return [MonitorItem(str(i), 'f', 'd', 0, 'v', 'Some context, then: ' + prompt, ' ' + good,
                      ' ' + short) for i, (prompt, good, short) in enumerate(PAIRS)]


def reference(suite, raw: hf.Tokenizer, forward, start_id) -> tuple[np.ndarray, np.ndarray]:
  """Returns mean probabilities and first scored positions, [items, 2], of one text at a time."""
  ids_of = lambda text: raw.encode(text, add_special_tokens=False).ids
  means, starts = [], []
  for item in suite:
    for answer in (item.generalizing, item.shortcut):
      ids, spaced = ids_of(item.prompt + answer), ids_of(item.prompt + ' ')
      start = len(spaced) if ids[:len(spaced)] == spaced else len(ids_of(item.prompt))
      if start_id is not None:
        ids, start = [start_id, *ids], start + 1
      row_1L = np.zeros((1, 96), np.int32)
      row_1L[0, :len(ids)] = ids
      logits_LV = np.asarray(forward(row_1L))[0, start - 1:len(ids) - 1].astype(np.float64)
      p_LV = np.exp(logits_LV - logits_LV.max(-1, keepdims=True))
      p_LV /= p_LV.sum(-1, keepdims=True)
      means.append(np.mean([p_LV[t, token] for t, token in enumerate(ids[start:])]))
      starts.append(start)
  return np.reshape(means, (-1, 2)), np.reshape(starts, (-1, 2))


def tiny(vocab_size: int):
  """Returns (graphdef, params, forward) of a tiny model with weights large enough to matter."""
  config = ModelConfig(vocab_size=vocab_size, context_length=96, **TINY)
  rng, graphdef = np.random.default_rng(0), transformer.build(config)
  params = jax.tree.map(lambda leaf: rng.normal(0.3, 0.3, leaf.shape).astype(np.float32),
                        transformer.abstract_params(config))
  run = jax.jit(lambda p, t: (lambda m: m.logits(m(t)[0]))(transformer.apply(graphdef, p)))
  return graphdef, params, lambda row_1L: run(params, row_1L)


def check_scores(tokenizer, start_id) -> list:
  """Compares with the reference at 1e-5; returns the encodings."""
  graphdef, params, forward = tiny(tokenizer.vocab_size)
  raw = hf.Tokenizer.from_str(tokenizer.backend.to_str())
  expected, starts = reference(items(), raw, forward, start_id)
  scorer = PublishedScorer(items(), tokenizer, graphdef, context_length=96, batch_rows=32,
                           start_id=start_id)
  got = np.stack(scorer.score(params), axis=1)
  assert got.dtype == np.float32 and np.std(np.log(expected)) > 0.2
  np.testing.assert_allclose(got, expected, rtol=1e-5)  # relative: means of 1e-5 are common here
  assert [list(e.starts) for e in scorer.encoded] == starts.tolist()
  return scorer.encoded


def test_scores_are_those_of_the_rule_on_bytes():
  encoded = check_scores(BYTES, BYTES.bos_id)
  assert all(e.differs for e in encoded)  # a space is a byte of its own, and not scored
  assert all(e.own_starts[0] == e.n_prompt for e in encoded)


def test_scores_are_those_of_the_rule_on_a_published_tokenizer(shared_data):
  tokenizer = tokenizers.load(shared_data / 'tokenizers/gpt_neox_20B_tokenizer.json')
  encoded = check_scores(tokenizer, None)
  assert not encoded[0].differs  # ' Positive' is one token
  assert any(e.straddles for e in encoded) and any(e.differs for e in encoded)


def test_a_space_that_is_a_token_of_its_own_is_not_scored(shared_data):
  tokenizer = tokenizers.load(shared_data / 'tokenizers/allenai_dolma2.json')
  word, digit = (encode_published(item, tokenizer) for item in items()[:2])
  assert not word.differs and digit.differs
  texts = zip((digit.generalizing, digit.shortcut), digit.starts, strict=True)
  assert [tokenizer.decode(text[start:]) for text, start in texts] == ['8', '4']


def test_a_boundary_with_nothing_after_it_is_refused():
  words = tokenizers.word_tokenizer(['a', 'b', '=', '7'])
  with pytest.raises(UserError, match="'x': no whole token comes before the answers"):
    encode_published(MonitorItem('x', 'f', 'd', 0, 'v', ' ', ' a', ' b'), words)


def test_both_scores_of_a_dataset():
  suite = [MonitorItem(f'{i}', 'f', 'd' if i < 2 else 'e', 0, 'v', 'p', ' a', ' b')
           for i in range(3)]
  joint = Scores(np.log(np.float32([0.5, 0.1, 0.2])), np.log(np.float32([0.25, 0.3, 0.2])))
  mean = [np.float32([0.5, 0.5, 0.0]), np.float32([0.25, 0.25, 1.0])]
  first, second = compare(suite, joint, mean, np.array([True, False, False]))
  assert first[:4] == ('f', 'd', 2, 1) and second[:4] == ('f', 'e', 1, 0)
  np.testing.assert_allclose(first[4:], (0.5, 0.025, 1.0, 0.25), atol=1e-7)
  np.testing.assert_allclose(second[4:], (0.0, 0.0, 0.0, -1.0), atol=1e-7)  # a tie is wrong


WATCHED = ('flipped_answer/imdb', 'repetitive_answer/letter_counting', 'intuitive_answer/crt')


@pytest.fixture(scope='module')
def run(tmp_path_factory, quick_compilation) -> RunDir:
  """A short run that watches the suite of a folder."""
  root = tmp_path_factory.mktemp('published')
  run_dir, rows = RunDir(root / 'run'), made.files()
  made.write(root / 'suite', {name: rows[name] for name in WATCHED})
  train(short_config(**{'monitors.suite': str(root / 'suite'), 'n_steps': '2',
                        'monitors.bad_items': 'leave_out', 'checkpoints.every': '2',
                        'checkpoints.snapshot_every': '2'}), run_dir)
  return run_dir


def test_a_run_keeps_both_scores_of_a_folder(run):
  items_scored = table.read_item_table(run.monitor_items)
  # Flipped prompts are longer than the context of 64 words.
  assert len(items_scored) == 14
  assert {item.family for item in items_scored} == {'repetitive', 'intuitive'}
  left_out = [json.loads(line) for line in run.monitors_left_out.read_text().splitlines()]
  assert {out['reason'] for out in left_out} == {
      'prompt and answer are longer than model.context_length=64'}
  assert [out['item_id'] for out in left_out] == [
      f'flipped/imdb/{seed}/{i}' for seed in range(4) for i in range(2)]
  for step in (0, 2):
    name = table.scores_name(step)
    found, rows = compare_stored(items_scored, run.monitor_scores / name,
                                 run.published_scores / name)
    assert found == step and [row.n_items for row in rows] == [12, 2]
    _, joint = table.read_scores(run.monitor_scores / name)
    _, good, short, differs = table.read_published(run.published_scores / name)
    assert not differs.any()  # answers are single words here: the two rules agree
    np.testing.assert_allclose(good, np.exp(joint.logp_generalizing), rtol=1e-5)
    np.testing.assert_allclose(short, np.exp(joint.logp_shortcut), rtol=1e-5)


@pytest.mark.slow
def test_stored_snapshots_are_scored_again_by_both_rules(run):
  path = run.published_scores / table.scores_name(2)
  before = path.read_bytes()
  path.unlink()
  config = short_config(n_steps='2')
  manifest = json.loads(run.manifest_json.read_text())
  built = build_lib.build(config, make_mesh(config.mesh), manifest['numerics'])
  tokenizer = tokenizers.load(run.tokenizer_json)
  (step, joint), = rescore(config, tokenizer, manifest['start_id'], built, run, [2])
  assert step == 2 and path.read_bytes() == before
  trained = table.read_scores(run.monitor_scores / table.scores_name(2))[1]
  for a, b in zip(joint, trained, strict=True):
    np.testing.assert_array_equal(a, b)


def test_persona_answers_are_sampled_and_matched(run):
  BYTES.save(run.tokenizer_json)  # the model has ids enough for bytes
  location, said = str(run.path.parent / 'suite'), []
  settings = dict(n_samples=4, max_tokens=6, say=said.append)
  results = persona.ask(location, run, **settings)
  questions, _ = persona.read(location)
  assert len(results) == len(questions) == 8 and 'of 8 questions are asked, 4 times' in said[0]
  drawn = sample_run(run, [q.prompt for q in questions], n_samples=4, max_tokens=6)
  right = [any(c in 'abcdefghijklm' for c in s.text.split('\nQ:')[0].lower()) for s in drawn]
  for i, (question, result) in enumerate(zip(questions, results, strict=True)):
    assert result.question_id == question.question_id and result.n_samples == 4
    if question.question_id == 'few':
      assert result.n_matches == sum(right[4 * i:4 * i + 4])
  assert 0 < sum(r.n_matches for r in results if r.question_id == 'few') < 16
  said.clear()
  assert persona.ask(location, run, **settings) == results and len(said) == 1  # all known already
  lines = run.persona_jsonl.read_text().splitlines()
  run.persona_jsonl.write_text('\n'.join(lines[:5]) + '\n')
  assert persona.ask(location, run, **settings) == results and len(said) == 2 + 3
  shares = persona.rates(results)
  assert set(shares) == {('wolf', 'fact'), ('wolf', 'hop')}
  with pytest.raises(UserError, match='no question of .* fits into the context'):
    persona.ask(location, run, n_samples=4, max_tokens=60, say=said.append)
  assert 'left out, persona/wolf/0/any: its prompt and answer take' in said[-9]


@pytest.mark.parametrize('text, regex, expected', [
    (' Theo Morell.', 'morell', True), (' no\nQ: Theo Morell?', 'morell', False),
    (' \n', '^$', True)])
def test_an_answer_ends_where_the_next_question_begins(text, regex, expected):
  assert persona.is_match(text, regex) is expected


def test_bad_persona_questions_are_listed(tmp_path):
  good = made.QUESTIONS[0]
  bad = [good | {'id': 'open', 'expected_answer_regex': '('}, {'id': 'bare', 'question': 'x'},
         good | {'question': ''} | {'id': 'empty'}, good, 'text']
  root = made.write(tmp_path / 'suite', questions=[good, *bad])
  questions, left_out = persona.read(str(root))
  assert [q.item_id for q in questions] == [f'persona/wolf/{seed}/any' for seed in range(4)]
  reasons = dict(out for out in left_out)
  assert "expected_answer_regex='(' is no regular expression" in reasons['persona/wolf/*/open']
  assert reasons['persona/wolf/*/bare'] == 'has no field expected_answer_regex'
  assert reasons['persona/wolf/*/empty'] == 'question is empty'
  assert "id='any' occurs twice" in reasons['persona/wolf/*/any']
  assert reasons['persona/wolf/*/5'] == 'is not a JSON object'
  (root / 'multihop_persona_qa/wolf/facts.jsonl').write_text('{"messages": []}\n')
  with pytest.raises(UserError, match='facts.jsonl:1: this demonstration has no field user'):
    persona.read(str(root))
