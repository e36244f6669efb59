"""Our models in lm-evaluation-harness.

Witnesses: one request at a time, softmax in float64 NumPy; and the harness's own backend.
"""

import functools
import json
import math
import pathlib
import re

import datasets
import jax
from lm_eval.api.instance import Instance
import numpy as np
import pytest

from models import transformer
from models.config import ModelConfig
from parallelism.mesh import MeshConfig, make_mesh
from research import build as build_lib
from research.data import tokenizers
from research.dynamics import benchmarks
from research.dynamics.public_trajectory import config_of
from research.errors import UserError
from research.evals import continuations, generation, harness_tasks
from research.evals.continuations import Request, make_plan
from research.evals.harness import HarnessModel, evaluated
from research.run_dir import RunDir
from tests.research import harness_witness
from tests.research.harness_tasks_folder import write_choices, write_questions, write_texts

pytestmark = pytest.mark.usefixtures('quick_compilation')
GOLDEN = pathlib.Path(__file__).resolve().parents[1] / 'golden'
CONTEXT = 24
MODEL = ModelConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=2, d_head=8, d_ff=32,
                    vocab_size=320, context_length=CONTEXT, compute_dtype='float32')
TEXT = 'the good soup was good and the other soup was better than the good bread. ' * 3
TOKENIZER = tokenizers.train_bpe([TEXT], 300)
START = TOKENIZER.bos_id
CHOICES = [
    {'q': 'the soup was', 'choices': ['good', 'better than the bread', 'bad'], 'gold': 0},
    {'q': 'the bread was ', 'choices': ['good', 'soup'], 'gold': 1},
    {'q': 'the', 'choices': ['good', 'other', 'soup', 'b'], 'gold': 2},
    # Longer than the model's context, for both choices.
    {'q': 'zzyx ' * 8 + 'was', 'choices': ['good', 'bad'], 'gold': 1},
    {'q': 'was', 'choices': ['a', 'b', 'c'], 'gold': 1}]
TEXTS = ['the soup', 'the soup was good', TEXT[:150], 'bread ' * 40]
UNTIL = ['e', '\n']
N_LONG = generation.STRIDE + 2  # tokens: longer than what is made between looks for a stop text


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
  """Keeps datasets in a folder of the test."""
  monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', tmp_path / 'cache')


@functools.cache
def built(n_devices: int):
  mesh = MeshConfig() if n_devices == 1 else MeshConfig(data=2, fsdp=2, tensor=2)
  devices = jax.devices()[:n_devices]
  return build_lib.build(config_of(MODEL, 'tiny', 1), make_mesh(mesh, devices), {})


@functools.cache
def params(seed: int):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: rng.normal(0.1, 0.4, leaf.shape).astype(np.float32),
                      transformer.abstract_params(MODEL))


def harness_model(n_devices: int = 1, seed: int = 0) -> HarnessModel:
  model = HarnessModel(built(n_devices), TOKENIZER, START)
  model.params = built(n_devices).place_params(params(seed))
  return model


@functools.cache
def forward():
  graphdef = transformer.build(MODEL)
  return jax.jit(lambda p, t: (lambda m: m.logits(m(t)[0]))(transformer.apply(graphdef, p)))


def witness(tokens: list[int], seed: int = 0) -> np.ndarray:
  """Returns the log-probabilities after each of at most CONTEXT tokens, one row alone, [L, V]."""
  assert len(tokens) <= CONTEXT
  row_1L = np.zeros((1, CONTEXT), np.int32)
  row_1L[0, :len(tokens)] = tokens
  logits_LV = np.asarray(forward()(params(seed), row_1L), np.float64)[0, :len(tokens)]
  top_L1 = logits_LV.max(-1, keepdims=True)
  return logits_LV - top_L1 - np.log(np.exp(logits_LV - top_L1).sum(-1, keepdims=True))


def scored(before: list[int], after: list[int], seed: int = 0) -> tuple[float, bool]:
  """Returns log-probability and greediness of tokens after others, of which the last are seen."""
  logps_LV = witness((before + after)[-CONTEXT - 1:][:-1], seed)[-len(after):]
  return (sum(logps_LV[i, token] for i, token in enumerate(after)),
          bool((logps_LV.argmax(-1) == after).all()))


def parted(context: str, continuation: str) -> tuple[list[int], list[int]]:
  """Returns the tokens of both: spaces at the context's end belong to what follows."""
  whole = TOKENIZER.encode(context + continuation)
  n = len(TOKENIZER.encode(context.rstrip()))
  return [START, *whole[:n]], whole[n:]


def rolled(text: str, seed: int = 0) -> float:
  """Returns the log-probability of a text, in windows that predict each token once."""
  tokens, total = TOKENIZER.encode(text), 0.0
  for start in range(0, len(tokens), CONTEXT):
    end = min(start + CONTEXT, len(tokens))
    inputs = [START, *tokens][max(0, end - CONTEXT):end]
    total += witness(inputs, seed)[start - end:][np.arange(end - start), tokens[start:end]].sum()
  return total


def written(prompt: str, n: int, seed: int = 0) -> str:
  """Returns the greedy text after a prompt, whole recomputation for every token."""
  tokens, new = [START, *TOKENIZER.encode(prompt)][-(CONTEXT - n):], []
  while len(new) < n:
    logps_V = witness(tokens + new, seed)[-1, :TOKENIZER.vocab_size]
    if logps_V.argmax() == TOKENIZER.eos_id:
      break
    new.append(int(logps_V.argmax()))
  return re.split('|'.join(UNTIL), TOKENIZER.decode(new))[0]


def request(kind: str, *arguments, document: int = 0) -> Instance:
  return Instance(kind, {}, arguments, 0, ('task', document, 1))


def assert_close(found, expected):
  assert abs(found - expected) <= 1e-5 * max(1, abs(expected)), (found, expected)


def write_folder(folder, answers):
  write_choices(folder, 'choices', CHOICES)
  write_texts(folder, 'texts', TEXTS)
  write_questions(folder, 'questions', answers, until=UNTIL, max_gen_toks=7)


@pytest.mark.parametrize('n_devices', [1, pytest.param(8, marks=pytest.mark.slow)])
def test_three_kinds_of_task_equal_hand_computed_values(tmp_path, n_devices):
  questions = ['the soup', 'was', 'bread and', TEXT[:100], 'good']
  texts = [written(question, 7) for question in questions]
  assert len(set(texts)) > 2
  write_folder(tmp_path / 'tasks', [
      {'q': question, 'a': text if i % 2 else 'no'}
      for i, (question, text) in enumerate(zip(questions, texts))])
  loaded = harness_tasks.load(['choices', 'texts', 'questions'], str(tmp_path / 'tasks'))
  model = harness_model(n_devices)
  found, n_cut = {}, {}
  for name, tasks in loaded.items():
    found |= evaluated(model, tasks, limit=None, bootstrap_iters=100)['results']
    n_cut |= model.n_truncated
  right, right_by_length = [], []
  for document in CHOICES:
    logps = np.array([scored(*parted(document['q'], ' ' + choice))[0]
                      for choice in document['choices']])
    right.append(logps.argmax() == document['gold'])
    lengths = np.array([len(choice) for choice in document['choices']])
    right_by_length.append((logps / lengths).argmax() == document['gold'])
  assert 0 < sum(right) < len(right)
  assert found['choices']['acc,none'] == np.mean(right)
  assert found['choices']['acc_norm,none'] == np.mean(right_by_length)
  error = np.std(right, ddof=1) / math.sqrt(len(right))
  assert found['choices']['acc_stderr,none'] == pytest.approx(error)
  logp = sum(map(rolled, TEXTS))
  n_words = sum(len(re.split(r'\s+', text)) for text in TEXTS)
  assert_close(found['texts']['word_perplexity,none'], math.exp(-logp / n_words))
  assert_close(found['texts']['bits_per_byte,none'],
               -logp / math.log(2) / sum(map(len, TEXTS)))
  assert found['questions']['exact_match,none'] == np.mean([i % 2 for i in range(5)])
  assert n_cut == {'choices': 2, 'questions': 1}


def test_answers_equal_one_request_at_a_time():
  model = harness_model()
  pairs = [(d['q'], ' ' + choice) for d in CHOICES for choice in d['choices']]
  pairs += [('', 'the soup'), ('the soup ', 'was'), ('  ', 'good')]
  found = model.loglikelihood([request('loglikelihood', *pair) for pair in pairs])
  for (context, continuation), (logp, greedy) in zip(pairs, found, strict=True):
    expected, is_greedy = scored(*parted(context, continuation))
    assert_close(logp, expected)
    assert greedy == is_greedy
  assert np.std([logp for logp, _ in found]) > 1
  sums = model.loglikelihood_rolling([request('loglikelihood_rolling', text) for text in TEXTS])
  for text, total in zip(TEXTS, sums, strict=True):
    assert_close(total, rolled(text))


def test_answers_are_those_of_the_harness_with_transformers(tmp_path):
  subject = benchmarks.open_subject(RunDir(tmp_path / 'run'), str(harness_witness.write(tmp_path)))
  model = HarnessModel(subject.built, subject.tokenizer, subject.start_id)
  model.params = subject.params(0)
  found = harness_witness.answers(model)
  theirs = json.loads((GOLDEN / 'harness_answers.json').read_text(encoding='utf-8'))
  assert found['prompts'] == theirs['prompts'] and len(set(found['prompts'])) > 1
  for mine, other in zip(found['texts'], theirs['texts'], strict=True):
    assert_close(mine, other)
  for (logp, greedy), (other, is_greedy) in zip(found['pairs'], theirs['pairs'], strict=True):
    assert_close(logp, other)
    assert greedy == is_greedy
  assert model.n_truncated == {'task': 3}


def test_greedy_tokens_are_known_as_such():
  context = [START, *TOKENIZER.encode('the soup')]
  greedy = []
  while len(greedy) < 3:
    greedy.append(int(witness(context + greedy)[-1].argmax()))
  other = [*greedy[:2], (greedy[2] + 1) % 300]
  pairs = [(('', ''), context, tokens) for tokens in (greedy, other, greedy[:1])]
  found = harness_model()._loglikelihood_tokens(pairs)
  assert [is_greedy for _, is_greedy in found] == [True, False, True]


def test_long_continuations_of_one_token_run_few_at_a_time(monkeypatch):
  """As first windows of rolling texts do: memory is bounded whatever their number."""
  monkeypatch.setattr(continuations, 'CHUNK_TOKENS', 200)
  # Of those that begin differently, none is read on the way to another.
  requests = [Request((START,), (i,) * n)
              for i, n in enumerate([*range(1, 25), *[CONTEXT] * 40])]
  requests += [Request((START, 1, 2), (i,) * n) for i, n in enumerate([*range(1, 23), *[22] * 40])]
  plan = make_plan(requests, built(1))
  assert max(chunk.tokens_BS.size for chunk in plan.chunks) <= 200
  assert sorted(np.concatenate([slots[slots >= 0] for slots in plan.slots])) == list(
      range(len(requests)))


def test_demonstrations_are_read_once_and_choices_of_one_token_together():
  shots = tuple(range(3, 17))
  requests = [Request((START, *shots, question, 20), (choice,))
              for question in (30, 31, 32) for choice in (40, 41, 42, 40)]
  requests += [Request((START, *shots, 30, 20), (50, 51)), Request((START, *shots, 33), (50, 51)),
               Request((START, *shots, 33), (52, 51))]
  plan = make_plan(requests, built(1))
  # As many as the demonstrations have, padded, and five rows of two or three tokens, padded.
  assert sum(chunk.prefix_CP.size for chunk in plan.chunks) == 16
  assert sum(chunk.tokens_BS.size for chunk in plan.chunks) <= 5 * 3
  model = harness_model()
  for request, (logp, is_greedy) in zip(
      requests, model._continuations.answers(plan, model.params), strict=True):
    expected, greedy = scored(list(request.context), list(request.continuation))
    assert_close(logp, expected)
    assert is_greedy == greedy


def test_nothing_is_compiled_again_for_other_parameters():
  model = harness_model()
  requests = [request('loglikelihood', d['q'], ' good') for d in CHOICES]
  kwargs = {'until': UNTIL, 'max_gen_toks': N_LONG}
  texts = [request('generate_until', d['q'], kwargs) for d in CHOICES[:3]]

  def ask():
    return (model.loglikelihood(requests), model.generate_until(texts),
            (model._continuations._run._cache_size(), generation._go_on._cache_size()))
  first = ask()
  model.params = built(1).place_params(params(1))
  other = ask()
  assert first[2] == other[2] and first[0] != other[0]
  expected = [scored(*parted(d['q'], ' good'), 1)[0] for d in CHOICES]
  for (logp, _), value in zip(other[0], expected):
    assert_close(logp, value)
  assert [first[1], other[1]] == [
      [written(d['q'], N_LONG, seed) for d in CHOICES[:3]] for seed in range(2)]


def test_a_sampled_text_is_drawn_anew_when_asked_again_and_the_same_for_the_same_seed():
  kwargs = {'do_sample': True, 'temperature': 1.5, 'top_k': 50, 'max_gen_toks': 12, 'until': []}
  requests = [request('generate_until', 'the soup', kwargs)] * 3
  model = harness_model()
  texts = model.generate_until(requests)
  assert len(set(texts)) == 3
  assert model.generate_until(requests[:2]) == texts[:2]


@pytest.mark.parametrize('ask, says', [
    (('generate_until', 'a', {'max_gen_toks': CONTEXT}),
     f'document 4: .*max_gen_toks={CONTEXT} leaves no room .* at most {CONTEXT - 1}'),
    (('generate_until', 'a', {'typical_p': .5}), 'generation_kwargs.typical_p is not known'),
    (('generate_until', 'a', {'do_sample': True, 'top_p': 2.0}), 'top_p=2.0 must be'),
    (('loglikelihood', 'a', ''), "task task, document 4: continuation '' adds no token"),
    (('loglikelihood', 'a', ' b' * 30), 'document 4: a continuation has .* tokens'),
])
def test_what_cannot_be_asked_is_said_of_its_document(ask, says):
  with pytest.raises(UserError, match=says):
    getattr(harness_model(), ask[0])([request(*ask, document=4)])


def test_demonstrations_are_those_of_every_checkpoint(tmp_path):
  many = [{'q': f'{i} is', 'choices': ['a', 'b'], 'gold': i % 2} for i in range(12)]
  write_choices(tmp_path, 'shots', many, fewshot_split='test')
  loaded = harness_tasks.load(['shots'], str(tmp_path), num_fewshot=2)['shots']
  model, asked = harness_model(), []
  for seed in range(2):
    model.params = built(1).place_params(params(seed))
    results = evaluated(model, loaded, limit=3, bootstrap_iters=0)
    asked.append(model.asked)
  assert asked[0] == asked[1] and results['n-shot'] == {'shots': 2}
  assert results['n-samples']['shots']['effective'] == 3 and model.n_requests == {'shots': 6}


def test_names_and_data_that_are_not_there_are_said(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='--tasks=hellaswg: no such task; the nearest are hellaswag'):
    harness_tasks.check_names(['hellaswg'], ['arc_easy', 'hellaswag', 'winogrande'])
  with pytest.raises(UserError, match='is no folder'):
    harness_tasks.load(['a'], str(tmp_path / 'none'))
  write_texts(tmp_path, 'gone', ['a'])
  (tmp_path / 'gone.jsonl').unlink()
  with pytest.raises(UserError, match='--tasks=gone: its data is not at hand .*gone.jsonl'):
    harness_tasks.load(['gone'], str(tmp_path))
  (tmp_path / 'far.yaml').write_text('{task: far, dataset_path: nobody/nothing, test_split: test, '
                                     'output_type: multiple_choice}')
  monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
  with pytest.raises(UserError, match="--tasks=far: its data is not at hand .*nobody/nothing.*; go "
                     'online once'):
    harness_tasks.load(['far'], str(tmp_path))


def test_a_harness_that_is_not_installed_is_one_sentence(monkeypatch):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"not installed; pip install -e '\.\[evals\]'"):
    harness_tasks.require_harness()
