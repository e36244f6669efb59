"""Scores equal a slow, obvious reference to 1e-5: one text at a time, full forward, no cache.

Nothing is compiled after the first checkpoint. Every family of the micro-world, prefixes and rows
alone, one token and several, one device and eight, sliding windows and experts, and published
tokenizers of which tokens cross the boundary of prompt and answer.
"""

import contextlib
import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from models import transformer
from models.config import ModelConfig, MoEConfig
from parallelism.mesh import MeshConfig, make_mesh
from research import build as build_lib
from research.data import tokenizers
from research.data.microworld import MicroworldConfig
from research.data.microworld.words import WORDS
from research.monitors.items import MonitorItem
from research.monitors.microworld_items import FAMILIES, microworld_items
from research.monitors.watch import make_scorer, score_snapshot
from tests.research.conftest import short_config

pytestmark = pytest.mark.usefixtures('quick_compilation')
WORD = tokenizers.word_tokenizer(WORDS)
BYTES = tokenizers.byte_tokenizer()
TINY = dict(n_layers=2, d_model=16, n_heads=4, n_kv_heads=2, d_head=8, d_ff=32)
MODELS = {
    'plain': {},
    'sliding': dict(layer_pattern=('sliding', 'full'), window=8),
    'experts': dict(moe=MoEConfig(n_experts=4, top_k=2, d_expert=16))}
ONE, EIGHT = MeshConfig(data=1), MeshConfig(data=2, fsdp=2, tensor=2)


@functools.cache
def items_of_every_family(n: int) -> list[MonitorItem]:
  """Returns n items of two contexts of every dataset."""
  of_context = lambda item: (item.dataset, item.seed)
  groups = itertools.groupby(
      sorted(microworld_items(MicroworldConfig(), 64), key=of_context), of_context)
  items = [item for (_, seed), group in groups if seed < 2 for item in list(group)[:n]]
  assert {item.family for item in items} == {*FAMILIES, 'zero_shot'}
  return items


def short_items() -> list[MonitorItem]:
  """Returns items whose prompts are too short to be shared, with answers of many lengths."""
  answers = [(' a', ' b'), (' 雪', ' snow'), ('c', ' cold'), (' long answer', ' longer')]
  return [MonitorItem(f'short/{i}', 'f', 'short', 0, 'v', prompt, *pair)
          for i, (prompt, pair) in enumerate(zip(['is', 'why', 'x', 'go'], answers))]


def scored_texts(item, tokenizer, start_id) -> tuple[list[list[int]], int]:
  """Returns the tokens of both texts, and where the first differs or reaches into an answer."""
  whole = [tokenizer.backend.encode(item.prompt + answer, add_special_tokens=False)
           for answer in (item.generalizing, item.shortcut)]
  start = 0
  while (whole[0].ids[start] == whole[1].ids[start]
         and all(text.offsets[start][1] <= len(item.prompt) for text in whole)):
    start += 1
  added = [] if start_id is None else [start_id]
  return [added + text.ids for text in whole], len(added) + start


def reference(model: ModelConfig, params, items, tokenizer, start_id) -> np.ndarray:
  """Returns [items, 2] log-probabilities in float32, one text at a time."""
  graphdef = transformer.build(model)

  @jax.jit
  def logp_LV(params, row_1L):
    network = transformer.apply(graphdef, params)
    return jax.nn.log_softmax(network.logits(network(row_1L)[0]))[0]

  sums = []
  for item in items:
    texts, start = scored_texts(item, tokenizer, start_id)
    for ids in texts:
      row_1L = np.zeros((1, model.context_length), np.int32)  # what stands after a text is not seen
      row_1L[0, :len(ids)] = ids
      logps = np.asarray(logp_LV(params, row_1L))
      sums.append(sum(logps[t - 1, ids[t]] for t in range(start, len(ids))))
  return np.reshape(sums, (-1, 2))


def check(items, tokenizer, context_length: int, kind: str = 'plain', mesh: MeshConfig = ONE,
          start_id: int | None = None, batch_rows: int = 24):
  """Compares the scores of a production build with the reference; returns the scorer."""
  model = ModelConfig(vocab_size=-(-tokenizer.vocab_size // 8) * 8, context_length=context_length,
                      **TINY, **MODELS[kind])
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda leaf: leaf + rng.normal(0, 0.25, leaf.shape).astype(np.float32),
                        jax.device_get(transformer.init(model, 0)))
  config = dataclasses.replace(short_config(**{'monitors.batch_rows': str(batch_rows)}),
                               model=model, mesh=mesh)
  devices = make_mesh(mesh, jax.devices()[:mesh.data * mesh.fsdp * mesh.tensor])
  built = build_lib.build(config, devices, build_lib.resolve_numerics(config, devices))
  scorer = make_scorer(config, tokenizer, start_id, built, items)
  scores = lambda params: np.stack(score_snapshot(scorer, built, built.place_params(params)), 1)
  got = scores(params)
  with compilations() as compiled:
    later = [scores(jax.tree.map(lambda leaf: factor * leaf, params)) for factor in (0.5, 1)]
  assert not compiled
  assert (later[0] != got).any() and later[1].tobytes() == got.tobytes()
  expected = reference(model, params, items, tokenizer, start_id)
  assert got.dtype == np.float32 and np.std(expected) > 0.5
  np.testing.assert_array_less(np.abs(got - expected), 1e-5 * np.maximum(1, np.abs(expected)))
  return scorer


@contextlib.contextmanager
def compilations():
  """Gives a list that grows by what is compiled inside the block."""
  compiled = []

  def listen(event: str, *unused_times, **unused_facts):
    if 'compile' in event:
      compiled.append(event)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    yield compiled
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_compilations_are_seen():
  with compilations() as compiled:
    jax.jit(lambda x: 3 * x)(np.ones(3))
  assert compiled


def kinds(scorer) -> set[tuple[bool, bool]]:
  """Returns (has a shared prefix, reads several tokens) of all buckets."""
  return {(bool(b.prefix_ZCP.shape[2]), b.places_ZBT.shape[2] > 1) for b in scorer.buckets}


CASES = [('sliding', EIGHT), ('experts', EIGHT)]
MORE = [('plain', ONE), ('sliding', ONE), ('experts', ONE), ('plain', EIGHT)]


@pytest.mark.parametrize('kind, mesh', [
    *CASES, *[pytest.param(*case, marks=pytest.mark.slow) for case in MORE]],
    ids=lambda x: x if isinstance(x, str) else f'{x.data * x.fsdp * x.tensor}')
def test_every_family_in_words(kind, mesh):
  scorer = check(items_of_every_family(2), WORD, 64, kind, mesh)
  assert kinds(scorer) == {(True, False), (False, False)}


@pytest.mark.parametrize('kind, mesh', [
    ('plain', ONE), *[pytest.param(*case, marks=pytest.mark.slow)
                      for case in (('sliding', EIGHT), ('experts', ONE))]],
    ids=lambda x: x if isinstance(x, str) else f'{x.data * x.fsdp * x.tensor}')
def test_every_family_in_bytes(kind, mesh):
  items = items_of_every_family(2) + short_items()
  scorer = check(items, BYTES, 320, kind, mesh, BYTES.bos_id)
  assert kinds(scorer) >= {(True, True), (False, True)}


MERGES = [('The answer is ', 'unbelievable', 'no'), ('The answer is ', 'good', 'goods'),
          ('x = 12345\nprint(x)\nOutput:', ' 12345', ' 7'), ('It costs $', '0.05', '0.10'),
          ('count the letters:\n\n', '\nthree', 'eleven'), ('Ein Wort\t', '雪国', 'é'),
          ('in the inter', 'national', 'esting'), ('Is it so', ' Yes', ' No')]


@pytest.mark.parametrize('name, start', [('gpt_neox_20B_tokenizer', False),
                                         ('allenai_dolma2', True)])
def test_items_whose_tokens_cross_the_boundary(name, start, shared_data):
  tokenizer = tokenizers.load(shared_data / f'tokenizers/{name}.json')
  items = [MonitorItem(f'{context}/{i}', 'f', 'd', context, 'v',
                       f'Context {context}. ' * 24 * context + prompt, good, short)
           for context in (0, 1) for i, (prompt, good, short) in enumerate(MERGES)]
  scorer = check(items, tokenizer, 160, start_id=tokenizer.encode('the')[0] if start else None)
  assert sum(encoded.straddles for encoded in scorer.encoded) >= 6
  assert kinds(scorer) == {(True, True), (False, True)}
