"""Decoder against a NumPy float64 witness, and the invariances that any decoder has."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import loss, transformer
from models.config import MoEConfig
from tests.models import witness
from tests.models.variants import TINY, VARIANTS, tiny

LENGTH = 11


@functools.cache
def random_params(config):
  """Returns parameters of a config with every leaf random."""
  zeros = jax.tree.map(
    lambda x: np.zeros(x.shape, x.dtype), transformer.abstract_params(config)
  )
  params = witness.randomized(zeros, scale=0.5)
  return jax.tree.map(jnp.asarray, params)


def logits_of(config, params, tokens_BL, **inputs):
  """Returns logits [B, L, V] through the jitted production path."""
  graphdef = transformer.build(config)

  @jax.jit
  def forward(params, tokens_BL, inputs):
    model = transformer.apply(graphdef, params)
    return model.logits(model(tokens_BL, **inputs)[0])

  return np.asarray(forward(params, tokens_BL, inputs))


def some_tokens(n_rows=2, length=LENGTH, seed=0):
  """Returns random tokens [B, L]."""
  return np.random.default_rng(seed).integers(0, TINY.vocab_size, (n_rows, length))


def relative(a, b):
  """Returns ||a - b|| / ||b||."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def scalar_loss(config, params, tokens_BL, **inputs):
  """Returns a loss that touches every parameter: cross-entropy and auxiliary losses."""
  model = transformer.apply(transformer.build(config), params)
  hidden, aux = model(tokens_BL, **inputs)
  sums = loss.cross_entropy(
    hidden.reshape(-1, config.d_model), model.unembedding_VD(),
    jnp.roll(tokens_BL, -1, axis=1).reshape(-1), jnp.ones(tokens_BL.size),
    softcap=config.final_softcap,
  )
  return sums.loss_sum / tokens_BL.size + 0.1 * aux.balance + 0.01 * aux.router_z


def gradients(config, params, tokens_BL, **inputs):
  """Returns the gradient tree of `scalar_loss`."""
  loss_of = functools.partial(scalar_loss, config, **inputs)
  return jax.jit(jax.grad(loss_of))(params, tokens_BL)


@pytest.mark.parametrize('name', VARIANTS)
def test_logits_equal_numpy_witness(name):
  config = VARIANTS[name]
  params, tokens_BL = random_params(config), some_tokens()
  segments_BL = np.array([[1] * LENGTH, [3] * 4 + [1] * 5 + [0] * 2])
  positions_BL = np.array([np.arange(LENGTH), [*range(4), *range(5), 0, 0]])
  got = logits_of(
    config, params, tokens_BL, segment_ids_BL=segments_BL, positions_BL=positions_BL
  )
  for b in range(2):
    expected = witness.logits(config, params, tokens_BL[b], segments_BL[b], positions_BL[b])
    assert relative(got[b], expected) < 2e-5, f'row {b}'


def test_default_positions_and_segments_equal_numpy_witness():
  params, tokens_BL = random_params(TINY), some_tokens()
  got = logits_of(TINY, params, tokens_BL)
  assert relative(got[0], witness.logits(TINY, params, tokens_BL[0])) < 2e-5


@pytest.mark.parametrize('name', ['llama', 'bloom', 'mixtral'])
def test_a_token_never_changes_earlier_logits(name):
  config = VARIANTS[name]
  tokens_BL = some_tokens(1)
  changed_BL = tokens_BL.copy()
  changed_BL[0, 6] = (changed_BL[0, 6] + 1) % TINY.vocab_size
  before = logits_of(config, random_params(config), tokens_BL)
  after = logits_of(config, random_params(config), changed_BL)
  np.testing.assert_array_equal(before[0, :6], after[0, :6])
  assert np.abs(before[0, 6:] - after[0, 6:]).max(axis=-1).min() > 1e-4


@pytest.mark.parametrize('name', ['olmo3', 'gpt2', 'bloom', 'mixtral'])
def test_packed_documents_equal_documents_alone(name):
  config = VARIANTS[name]
  params, tokens_BL = random_params(config), some_tokens(1)
  segments_BL = np.array([[1] * 5 + [2] * 4 + [0] * 2])
  positions_BL = np.array([[*range(5), *range(4), 0, 0]])
  packed = logits_of(
    config, params, tokens_BL, segment_ids_BL=segments_BL, positions_BL=positions_BL
  )
  assert relative(packed[:, :5], logits_of(config, params, tokens_BL[:, :5])) < 1e-5
  assert relative(packed[:, 5:9], logits_of(config, params, tokens_BL[:, 5:9])) < 1e-5
  assert np.isfinite(packed).all()


def test_padding_is_inert_in_auxiliary_losses_and_gradients():
  config = VARIANTS['mixtral']
  params, tokens_BL = random_params(config), some_tokens(1)
  segments_BL = np.array([[1] * 8 + [0] * 3])
  model = transformer.apply(transformer.build(config), params)
  _, padded = model(tokens_BL, segments_BL)
  _, alone = model(tokens_BL[:, :8])
  np.testing.assert_allclose(padded, alone, rtol=1e-5)


def test_grouped_heads_equal_repeated_heads():
  config, params = TINY, random_params(TINY)
  repeated = dataclasses.replace(config, n_kv_heads=config.n_heads)
  attention = dict(params['blocks']['attention'])
  for name in 'kv':
    attention[name] = jnp.repeat(attention[name], 2, axis=2)
  expanded = {**params, 'blocks': {**params['blocks'], 'attention': attention}}
  got = logits_of(repeated, expanded, some_tokens())
  assert relative(got, logits_of(config, params, some_tokens())) < 1e-5


@pytest.mark.parametrize('name', VARIANTS)
def test_every_leaf_has_a_gradient_and_remat_and_scan_keep_it(name):
  config = VARIANTS[name]
  params, tokens_BL = random_params(config), some_tokens()
  expected = gradients(dataclasses.replace(config, scan_layers='unroll'), params, tokens_BL)
  for path, leaf in jax.tree.leaves_with_path(expected):
    if 'k_bias' not in jax.tree_util.keystr(path) or config.positions == 'rope':
      assert np.abs(leaf).max() > 1e-7, jax.tree_util.keystr(path)
  remat = 'full' if name in ('llama', 'mixtral') else 'dots'
  other = dataclasses.replace(config, scan_layers='scan', remat=remat)
  got = gradients(other, params, tokens_BL)
  errors = jax.tree.map(relative, got, expected)
  for path, error in jax.tree.leaves_with_path(errors):
    assert error < 2e-5, (jax.tree_util.keystr(path), error)


@pytest.mark.parametrize('name', ['olmo3', 'bloom', 'gemma2', 'gpt2', 'pythia', 'mixtral'])
def test_shared_prefix_equals_whole_sequences(name):
  config = VARIANTS[name]
  params, lengths_C = random_params(config), np.array([7, 4])
  prefixes_CP, rows_BS = some_tokens(2, 8, seed=1), some_tokens(6, 5, seed=2)
  model = transformer.apply(transformer.build(config), params)
  kv = model.prefix(prefixes_CP, lengths_C)
  got = model.with_prefix(rows_BS, kv, lengths_C)
  for b in range(6):
    context = prefixes_CP[b // 3, : lengths_C[b // 3]]
    whole = np.concatenate([context, rows_BS[b]])[None]
    expected = model(whole)[0][0, len(context) :]
    assert relative(got[b], expected) < 1e-5, f'row {b}'


def test_an_empty_prefix_is_none():
  model = transformer.apply(transformer.build(TINY), random_params(TINY))
  kv = model.prefix(np.zeros((2, 0), int), np.zeros(2, int))
  got = model.with_prefix(some_tokens(4), kv, np.zeros(2, int))
  np.testing.assert_array_equal(got, model(some_tokens(4))[0])


def test_bfloat16_is_close_to_float32():
  params, tokens_BL = random_params(TINY), some_tokens()
  half = dataclasses.replace(TINY, compute_dtype='bfloat16')
  got = logits_of(half, params, tokens_BL)
  assert got.dtype == np.float32
  error = relative(got, logits_of(TINY, params, tokens_BL))
  assert 1e-4 < error < 0.05
  grads = gradients(half, params, tokens_BL)
  assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {np.dtype('float32')}


def test_dropout_acts_only_with_a_key_and_keeps_the_mean():
  config = tiny(dropout=0.5, scan_layers='scan', n_layers=3)
  model = transformer.apply(transformer.build(config), random_params(config))
  plain, _ = model(some_tokens())
  np.testing.assert_array_equal(plain, model(some_tokens())[0])
  one, _ = model(some_tokens(), dropout_key=jax.random.key(1))
  two, _ = model(some_tokens(), dropout_key=jax.random.key(2))
  assert relative(one, plain) > 0.05 and relative(one, two) > 0.05
  ones = jnp.ones((200, 200))
  dropped = transformer.dropped(ones, 0.25, jax.random.key(0))
  np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
  assert abs(float(dropped.mean()) - 1) < 0.02  # standard error 0.003


def test_dropout_gradients_flow_unrolled():
  config = tiny(dropout=0.5, scan_layers='unroll')
  grads = gradients(
    config, random_params(config), some_tokens(), dropout_key=jax.random.key(0)
  )
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))


def test_initialization_has_the_declared_spreads():
  config = tiny(d_model=64, d_ff=96, n_layers=8, init_std=0.02, tie_embeddings=False)
  params = jax.jit(transformer.init, static_argnums=0)(config, 3)
  blocks = params['blocks']
  residual = 0.02 / np.sqrt(2 * 8)
  for leaf, std in [
    (params['embedding']['tokens'], 0.02), (params['embedding']['output'], 0.02),
    (blocks['attention']['q'], 0.02), (blocks['mlp']['up'], 0.02),
    (blocks['attention']['o'], residual), (blocks['mlp']['down'], residual),
  ]:
    assert abs(float(jnp.std(leaf)) / std - 1) < 0.05
  assert float(jnp.abs(jnp.corrcoef(blocks['mlp']['up'].reshape(8, -1)) - jnp.eye(8)).max()) < 0.1
  np.testing.assert_array_equal(blocks['mlp_norm']['scale'], 1)
  again = transformer.init(config, 3)
  jax.tree.map(np.testing.assert_array_equal, params, again)
  assert relative(transformer.init(config, 4)['blocks']['mlp']['up'], blocks['mlp']['up']) > 1
  fan_in = transformer.init(dataclasses.replace(config, init_std=0.0), 3)
  assert abs(float(jnp.std(fan_in['blocks']['mlp']['up'])) * np.sqrt(64) - 1) < 0.05


def test_logical_axes_match_the_parameters():
  for config in VARIANTS.values():
    shapes = transformer.abstract_params(config)
    names = transformer.logical_axes(config)
    is_names = lambda x: isinstance(x, tuple)  # noqa: E731
    pairs = zip(
      jax.tree.leaves_with_path(shapes), jax.tree.leaves_with_path(names, is_leaf=is_names),
      strict=True,
    )
    for (path, shape), (names_path, axes) in pairs:
      assert path == names_path and len(shape.shape) == len(axes)
      assert (axes[:1] == ('layers',)) == ('blocks' in jax.tree_util.keystr(path))
  attention = transformer.logical_axes(TINY)['blocks']['attention']
  assert attention['q'] == ('layers', 'embed', 'heads', 'head')
  assert attention['o'] == ('layers', 'heads', 'head', 'embed')
  moe = transformer.logical_axes(tiny(moe=MoEConfig(n_experts=3)))['blocks']['mlp']
  assert moe['down'] == ('layers', 'experts', 'mlp', 'embed')


def test_seams_are_called_with_logical_names():
  seen, attended = set(), []

  def constrain(x, names):
    assert x.ndim == len(names)
    seen.add(names)
    return x

  def attend(q_BLHE, k_BMKE, v_BMKE, **options):
    attended.append(options['window'])
    return jnp.zeros_like(q_BLHE)

  config = tiny(layer_pattern=('sliding', 'full'), window=3, scan_layers='unroll')
  graphdef = transformer.build(config, transformer.Seams(constrain=constrain, attend=attend))
  model = transformer.apply(graphdef, random_params(config))
  model.logits(model(some_tokens())[0])
  assert attended == [3, 0]
  assert ('batch', 'length', 'vocab_act') in seen and ('batch', 'length', 'embed_act') in seen
  assert ('batch', 'length', 'heads_act', None) in seen


def test_a_sequence_beyond_the_context_is_refused():
  model = transformer.apply(transformer.build(TINY), random_params(TINY))
  with pytest.raises(ValueError, match='sequence of 25 tokens.*model.context_length=24'):
    model(some_tokens(1, 25))
  kv = model.prefix(some_tokens(1, 20), np.array([20]))
  with pytest.raises(ValueError, match='sequence of 25 tokens'):
    model.with_prefix(some_tokens(1, 5), kv, np.array([20]))
  with pytest.raises(ValueError, match='3 rows do not divide over 2 prefixes'):
    model.with_prefix(some_tokens(3, 2), model.prefix(some_tokens(2, 4), np.array([4, 4])),
                      np.array([4, 4]))
