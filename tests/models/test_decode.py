"""Decoding with a cache. Witness: the whole model run again on every longer row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import transformer
from models.decode import Prompts, generate, make_prompts, prefill, step
from models.sampling import Sampling
from tests.models import witness
from tests.models.variants import TINY, VARIANTS, tiny

LENGTHS = (1, 9, 4)
STEPS = 8
pytestmark = pytest.mark.usefixtures('quick_compilation')


@functools.cache
def model_of(config):
  """Returns the static half of a model and random parameters."""
  params = witness.randomized(transformer.abstract_params(config), scale=0.5)
  return transformer.build(config), jax.tree.map(jnp.asarray, params)


def some_rows(n_tokens=max(LENGTHS) + STEPS, seed=0):
  """Returns random tokens [B, L]."""
  return np.random.default_rng(seed).integers(0, TINY.vocab_size, (len(LENGTHS), n_tokens))


@functools.cache
def forward(graphdef):
  """Returns the jitted logits [B, L, V] of whole rows."""

  def logits(params, tokens_BL):
    model = transformer.apply(graphdef, params)
    return model.logits(model(tokens_BL)[0])

  return jax.jit(logits)


def relative(a, b):
  """Returns ||a - b|| / ||b||."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


MODELS = {**VARIANTS, 'unrolled': tiny(scan_layers='unroll', layer_pattern=('sliding', 'full'))}


@pytest.mark.parametrize('name', MODELS)
def test_prefill_and_steps_equal_the_whole_model_at_every_position(name):
  graphdef, params = model_of(MODELS[name])
  rows_BL = some_rows()
  whole_BLV = np.asarray(forward(graphdef)(params, rows_BL))
  prompts = make_prompts([row[:n] for row, n in zip(rows_BL, LENGTHS)])
  logits_BV, cache = prefill(graphdef, params, prompts, capacity=max(LENGTHS) + STEPS)
  for t in range(STEPS + 1):
    for b, n in enumerate(LENGTHS):
      assert relative(logits_BV[b], whole_BLV[b, n + t - 1]) < 1e-5, (b, t)
    if t < STEPS:
      next_B = rows_BL[np.arange(3), np.array(LENGTHS) + t]
      logits_BV, cache = step(graphdef, params, next_B, cache)
  np.testing.assert_array_equal(cache.lengths_B, np.array(LENGTHS) + STEPS)


def recomputed(graphdef, params, prompt, n_tokens, stop=()):
  """Returns greedy tokens after a prompt, the whole row run again for each."""
  tokens = list(prompt)
  while len(tokens) < len(prompt) + n_tokens:
    row_1L = np.zeros((1, len(prompt) + n_tokens), int)
    row_1L[0, : len(tokens)] = tokens
    token = int(np.argmax(forward(graphdef)(params, row_1L)[0, len(tokens) - 1]))
    if token in stop:
      break
    tokens.append(token)
  return tokens[len(prompt):]


def texts(generated):
  """Returns the counted tokens of each row."""
  return [list(map(int, row[:n])) for row, n in zip(generated.tokens_BT, generated.lengths_B)]


@pytest.mark.parametrize('name', ['unrolled', 'olmo3', 'bloom', 'mixtral'])
def test_greedy_generation_equals_recomputation(name):
  graphdef, params = model_of(MODELS[name])
  prompts = [list(row[:n]) for row, n in zip(some_rows(), LENGTHS)]
  expected = [recomputed(graphdef, params, prompt, STEPS) for prompt in prompts]
  got = generate(graphdef, params, make_prompts(prompts), max_tokens=STEPS,
                 sampling=Sampling(temperature=0.0))
  assert texts(got) == expected
  assert not got.stopped_B.any()
  # Now stop at a token that some row generates late and another row not at all, or later.
  stop = [expected[1][STEPS // 2]]
  want = [recomputed(graphdef, params, prompt, STEPS, stop) for prompt in prompts]
  got = generate(graphdef, params, make_prompts(prompts), max_tokens=STEPS, stop=stop,
                 sampling=Sampling(temperature=0.0))
  assert texts(got) == want
  assert list(got.stopped_B) == [len(row) < STEPS for row in want]
  assert got.stopped_B[1]


def test_a_row_draws_the_same_whatever_it_is_batched_with():
  graphdef, params = model_of(TINY)
  prompts = [list(row[:n]) for row, n in zip(some_rows(), LENGTHS)]
  options = dict(max_tokens=STEPS, sampling=Sampling(temperature=2.0, top_p=0.9), seed=3)
  together = generate(graphdef, params, make_prompts(prompts), **options)
  again = generate(graphdef, params, make_prompts(prompts), **options)
  assert texts(together) == texts(again)
  for b in (2, 0):
    alone = generate(graphdef, params, make_prompts([prompts[b]], rows=[b]), **options)
    assert texts(alone) == [texts(together)[b]]
  reordered = make_prompts(prompts[::-1], rows=[2, 1, 0], multiple=13)
  assert texts(generate(graphdef, params, reordered, **options)) == texts(together)[::-1]
  # The number of a row and the seed matter.
  same = make_prompts([prompts[1]] * 3)
  assert len({tuple(row) for row in texts(generate(graphdef, params, same, **options))}) == 3
  other = generate(graphdef, params, make_prompts(prompts), **{**options, 'seed': 4})
  assert texts(other) != texts(together)


def test_what_stands_in_the_padding_is_inert():
  graphdef, params = model_of(VARIANTS['mixtral'])
  clean = make_prompts([list(row[:n]) for row, n in zip(some_rows(), LENGTHS)])
  beyond_BL = np.arange(clean.tokens_BL.shape[1]) >= clean.lengths_B[:, None]
  dirty = clean._replace(tokens_BL=np.where(beyond_BL, 7, clean.tokens_BL).astype(np.int32))
  results = []
  for prompts in (clean, dirty):
    logits_BV, cache = prefill(graphdef, params, prompts, capacity=20)
    results.append((logits_BV, step(graphdef, params, np.array([1, 2, 3]), cache)[0]))
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_generation_ends_when_all_rows_have_stopped():
  graphdef, params = model_of(TINY)
  everything = range(TINY.vocab_size)
  got = generate(graphdef, params, make_prompts([[1], [2, 3]]), max_tokens=5, stop=everything)
  assert texts(got) == [[], []] and got.stopped_B.all()


def test_steps_are_in_the_caches_own_memory():
  graphdef, params = model_of(TINY)
  _, cache = prefill(graphdef, params, make_prompts([[1, 2]]), capacity=8)
  step(graphdef, params, np.array([3]), cache)
  assert all(x.is_deleted() for x in jax.tree.leaves(cache))


def test_a_step_copies_nothing_of_the_cache():
  config = tiny(scan_layers='unroll', context_length=8192)
  graphdef, params = model_of(config)
  _, cache = prefill(graphdef, params, make_prompts([[1, 2], [3]]), capacity=8192)
  compiled = step.lower(graphdef, params, np.array([3, 4]), cache).compile()
  one_layers_keys = cache.k_NBKME[0].nbytes
  assert compiled.memory_analysis().temp_size_in_bytes < one_layers_keys


def test_what_does_not_fit_is_refused_in_a_sentence():
  graphdef, params = model_of(TINY)
  with pytest.raises(ValueError, match='prompt of 20 tokens and 5 new ones.*context_length=24'):
    generate(graphdef, params, make_prompts([[1] * 20, [1]]), max_tokens=5)
  fitting = generate(graphdef, params, make_prompts([[1] * 20]), max_tokens=4)
  assert fitting.tokens_BT.shape == (1, 4)
  with pytest.raises(ValueError, match='prompt of 25 tokens.*model.context_length=24'):
    prefill(graphdef, params, make_prompts([[1] * 25]), capacity=30)
  with pytest.raises(ValueError, match='capacity=3 is less than the longest prompt, 4 tokens'):
    prefill(graphdef, params, make_prompts([[1] * 4]), capacity=3)
  with pytest.raises(ValueError, match='max_tokens=0 must be at least 1'):
    generate(graphdef, params, make_prompts([[1]]), max_tokens=0)
  with pytest.raises(ValueError, match='prompt 1 has no tokens'):
    make_prompts([[1], []])


def test_prompts_are_padded_to_few_shapes():
  prompts = make_prompts([[5], [6, 7]], multiple=4)
  np.testing.assert_array_equal(prompts.tokens_BL, [[5, 0, 0, 0], [6, 7, 0, 0]])
  assert isinstance(prompts, Prompts) and list(prompts.rows_B) == [0, 1]
