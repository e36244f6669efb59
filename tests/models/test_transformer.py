"""Decoder against a NumPy float64 witness, and the invariances that any decoder has."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import loss, transformer
from models.config import MoEConfig
from models.kernels.interface import Attended, Mask
from tests.models import programs, witness
from tests.models.variants import TINY, VARIANTS, tiny

LENGTH = 11
ROWS = 3
pytestmark = pytest.mark.usefixtures('quick_compilation')


@functools.cache
def random_params(config):
  """Returns parameters of a config with every leaf random."""
  params = witness.randomized(transformer.abstract_params(config), scale=0.5)
  return jax.tree.map(jnp.asarray, params)


def some_tokens(n_rows=ROWS, length=LENGTH, seed=0):
  """Returns random tokens [B, L]."""
  return np.random.default_rng(seed).integers(0, TINY.vocab_size, (n_rows, length))


def relative(a, b):
  """Returns ||a - b|| / ||b||."""
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def scalar_loss(config, params, tokens_BL, segments_BL, positions_BL, dropout_key=None):
  """Returns a loss that touches every parameter, and (logits [B, L, V], auxiliary losses)."""
  model = transformer.apply(transformer.build(config), params)
  dropout = None
  if dropout_key is not None:
    token_ids_BL = jnp.arange(tokens_BL.size).reshape(tokens_BL.shape)
    dropout = transformer.dropout_of(config, dropout_key, token_ids_BL)
  hidden, aux = model(tokens_BL, segments_BL, positions_BL, dropout=dropout)
  sums = loss.cross_entropy(
    hidden.reshape(-1, config.d_model), model.unembedding_VD(),
    jnp.roll(tokens_BL, -1, axis=1).reshape(-1), (segments_BL != 0).reshape(-1),
    softcap=config.final_softcap,
  )
  total = sums.loss_sum / tokens_BL.size + 0.1 * aux.balance + 0.01 * aux.router_z
  return total, (model.logits(hidden), aux)


@functools.cache
def compiled(config):
  """Returns the jitted gradient of `scalar_loss`: one program serves most tests."""
  return jax.jit(jax.grad(functools.partial(scalar_loss, config), has_aux=True))


def run(config, params, tokens_BL, segments_BL=None, positions_BL=None, **options):
  """Returns gradients, logits [B, L, V] and auxiliary losses."""
  if segments_BL is None:
    segments_BL = np.ones((ROWS, LENGTH), int)
  if positions_BL is None:
    positions_BL = np.broadcast_to(np.arange(LENGTH), (ROWS, LENGTH))
  gradient, (logits, aux) = compiled(config)(
    params, tokens_BL, segments_BL, positions_BL, **options
  )
  return gradient, np.asarray(logits), aux


@pytest.mark.parametrize('name', VARIANTS)
def test_logits_equal_numpy_witness_and_every_leaf_has_a_gradient(name):
  config = VARIANTS[name]
  params, tokens_BL = random_params(config), some_tokens()
  segments_BL = np.array([[1] * LENGTH, [3] * 4 + [1] * 5 + [0] * 2, [1] * LENGTH])
  positions_BL = np.array([np.arange(LENGTH), [*range(4), *range(5), 0, 0], np.arange(LENGTH)])
  gradient, got, _ = run(config, params, tokens_BL, segments_BL, positions_BL)
  for b in range(2):
    expected = witness.logits(config, params, tokens_BL[b], segments_BL[b], positions_BL[b])
    assert relative(got[b], expected) < 2e-5, f'row {b}'
  for path, leaf in jax.tree.leaves_with_path(gradient):
    path = jax.tree_util.keystr(path)
    # Softmax ignores a term common to all keys: without rotation the key bias is one.
    if config.positions == 'rope' or 'k_bias' not in path:
      assert np.abs(leaf).max() > 1e-7, path


def test_default_segments_and_positions_are_one_whole_sequence():
  params, tokens_BL = random_params(TINY), some_tokens()
  model = transformer.apply(transformer.build(TINY), params)
  got = model.logits(jax.jit(model)(tokens_BL)[0])
  assert relative(got[0], witness.logits(TINY, params, tokens_BL[0])) < 2e-5


@pytest.mark.parametrize('name', ['llama', 'bloom', 'mixtral'])
def test_a_token_never_changes_earlier_logits(name):
  config = VARIANTS[name]
  tokens_BL = np.repeat(some_tokens(1), ROWS, axis=0)
  tokens_BL[1, 6] = (tokens_BL[1, 6] + 1) % TINY.vocab_size
  _, logits, _ = run(config, random_params(config), tokens_BL)
  np.testing.assert_array_equal(logits[0, :6], logits[1, :6])
  assert np.abs(logits[0, 6:] - logits[1, 6:]).max(axis=-1).min() > 1e-4


@pytest.mark.parametrize('name', ['olmo3', 'gpt2', 'bloom', 'mixtral'])
def test_packed_documents_equal_documents_alone(name):
  config = VARIANTS[name]
  tokens_BL = np.repeat(some_tokens(1), ROWS, axis=0)
  tokens_BL[2, :4] = tokens_BL[0, 5:9]
  segments_BL = np.array([[1] * 5 + [2] * 4 + [0] * 2, [1] * 5 + [0] * 6, [1] * 4 + [0] * 7])
  positions_BL = np.array([[*range(5), *range(4), 0, 0], np.arange(11), np.arange(11)])
  _, logits, _ = run(config, random_params(config), tokens_BL, segments_BL, positions_BL)
  assert relative(logits[0, :5], logits[1, :5]) < 1e-5
  assert relative(logits[0, 5:9], logits[2, :4]) < 1e-5
  assert np.isfinite(logits).all()


def test_padding_is_inert_in_auxiliary_losses_and_gradients():
  config = VARIANTS['mixtral']
  tokens_BL, segments_BL = some_tokens(), np.ones((ROWS, LENGTH), int)
  segments_BL[:, 7:] = 0
  other_BL = tokens_BL.copy()
  other_BL[:, 8:] = (other_BL[:, 8:] + 5) % TINY.vocab_size  # the target of token 6 stays
  one, _, aux = run(config, random_params(config), tokens_BL, segments_BL)
  two, _, other_aux = run(config, random_params(config), other_BL, segments_BL)
  np.testing.assert_allclose(aux, other_aux, rtol=1e-6)
  assert max(jax.tree.leaves(jax.tree.map(relative, one, two))) < 1e-6


@pytest.mark.parametrize(
  'name, scan_layers, remat',
  [('olmo3', 'unroll', 'dots'), ('llama', 'unroll', 'none'), ('mixtral', 'scan', 'full')],
)
def test_unrolling_and_remat_keep_gradients(name, scan_layers, remat):
  config, params = VARIANTS[name], random_params(VARIANTS[name])
  other = dataclasses.replace(config, scan_layers=scan_layers, remat=remat)
  got, expected = run(other, params, some_tokens())[0], run(config, params, some_tokens())[0]
  for path, error in jax.tree.leaves_with_path(jax.tree.map(relative, got, expected)):
    assert error < 2e-5, (jax.tree_util.keystr(path), error)


def test_remat_policies_recompute_what_they_say():
  whole = np.ones((ROWS, LENGTH), int)

  def n_dots(remat):
    config = tiny(remat=remat, scan_layers='unroll', n_layers=3)
    gradient = jax.grad(functools.partial(scalar_loss, config), has_aux=True)
    args = (transformer.abstract_params(config), some_tokens(), whole, whole)
    return len(programs.dots(jax.make_jaxpr(gradient)(*args).jaxpr))

  # A block has seven projections and two attention products. 'dots' repeats the products,
  # 'full' everything but the last projection, whose output no gradient needs.
  assert n_dots('dots') - n_dots('none') == 3 * 2
  assert n_dots('full') - n_dots('none') == 3 * 8


@pytest.mark.parametrize('name', ['olmo3', 'bloom', 'gpt2', 'softcapped'])
def test_shared_prefix_equals_whole_sequences(name):
  config = VARIANTS[name]
  graphdef, lengths_C = transformer.build(config), np.array([7, 4])
  prefixes_CP, rows_BS = some_tokens(2, 8, seed=1), some_tokens(6, 5, seed=2)
  whole_BL = np.zeros((6, 12), int)
  for b in range(6):
    n = lengths_C[b // 3]
    whole_BL[b, : n + 5] = [*prefixes_CP[b // 3, :n], *rows_BS[b]]

  @jax.jit
  def both(params, prefixes_CP, lengths_C, rows_BS, whole_BL):
    model = transformer.apply(graphdef, params)
    _, kv = model.read(prefixes_CP, lengths_C)
    return model.with_prefix(rows_BS, kv, lengths_C), model(whole_BL)[0]

  got, expected = both(random_params(config), prefixes_CP, lengths_C, rows_BS, whole_BL)
  for b in range(6):
    n = lengths_C[b // 3]
    assert relative(got[b], expected[b, n : n + 5]) < 1e-5, f'row {b}'


def test_an_empty_prefix_is_none():
  model = transformer.apply(transformer.build(TINY), random_params(TINY))
  _, kv = model.read(np.zeros((2, 0), int), np.zeros(2, int))
  got = jax.jit(model.with_prefix)(some_tokens(4), kv, np.zeros(2, int))
  np.testing.assert_array_equal(got, jax.jit(model)(some_tokens(4))[0])


def test_bfloat16_is_close_to_float32():
  params, tokens_BL = random_params(TINY), some_tokens()
  half = dataclasses.replace(TINY, compute_dtype='bfloat16')
  gradient, got, _ = run(half, params, tokens_BL)
  assert got.dtype == np.float32
  assert 1e-4 < relative(got, run(TINY, params, tokens_BL)[1]) < 0.05
  assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {np.dtype('float32')}


@pytest.mark.parametrize('scan_layers', ['scan', 'unroll'])
def test_dropout_acts_only_with_a_key(scan_layers):
  config = tiny(dropout=0.5, scan_layers=scan_layers)
  params = random_params(config)
  plain = run(TINY, params, some_tokens())[1]
  gradient, one, _ = run(config, params, some_tokens(), dropout_key=jax.random.key(1))
  two = run(config, params, some_tokens(), dropout_key=jax.random.key(2))[1]
  assert relative(one, plain) > 0.05 and relative(one, two) > 0.05
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient))


def test_dropout_keeps_the_mean():
  token_ids_BL = jnp.arange(200).reshape(2, 100)
  dropped = transformer.dropped(
    jnp.ones((2, 100, 200)), 0.25, jax.random.key(0), token_ids_BL
  )
  np.testing.assert_allclose(np.unique(dropped), [0, 1 / 0.75], rtol=1e-6)
  assert abs(float(dropped.mean()) - 1) < 0.015  # standard error 0.003


def test_initialization_has_the_declared_spreads():
  config = tiny(d_model=64, d_ff=96, n_layers=8, init_std=0.02, tie_embeddings=False)
  init = jax.jit(transformer.init, static_argnums=0)
  params = init(config, 3)
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
  jax.tree.map(np.testing.assert_array_equal, params, init(config, 3))
  assert relative(init(config, 4)['blocks']['mlp']['up'], blocks['mlp']['up']) > 1
  fan_in = init(dataclasses.replace(config, init_std=0.0), 3)
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
  assert moe['down'] == ('layers', 'experts', 'expert_mlp', 'expert_embed')


def test_seams_are_called_with_logical_names():
  seen, attended = set(), []

  def constrain(x, names):
    assert x.ndim == len(names)
    seen.add(names)
    return x

  def attend(q_BLHE, k_BMKE, v_BMKE, **options):
    attended.append(options['mask'])
    return Attended(jnp.zeros_like(q_BLHE), jnp.zeros(()))

  config = tiny(layer_pattern=('sliding', 'full'), window=3, scan_layers='unroll')
  graphdef = transformer.build(config, transformer.Seams(constrain=constrain, attend=attend))
  model = transformer.apply(graphdef, random_params(config))
  model.logits(model(some_tokens())[0])
  assert attended == [Mask(window=3), Mask()]
  assert ('batch', 'length', 'vocab_act') in seen and ('batch', 'length', 'embed_act') in seen
  assert ('batch', 'length', 'heads_act', None) in seen


def test_a_sequence_beyond_the_context_is_refused():
  model = transformer.apply(transformer.build(TINY), random_params(TINY))
  with pytest.raises(ValueError, match='sequence of 25 tokens.*model.context_length=24'):
    model(some_tokens(1, 25))
  _, kv = model.read(some_tokens(1, 20), np.array([20]))
  with pytest.raises(ValueError, match='sequence of 25 tokens'):
    model.with_prefix(some_tokens(1, 5), kv, np.array([20]))
  with pytest.raises(ValueError, match='3 rows do not divide over 2 prefixes'):
    model.with_prefix(some_tokens(3, 2), model.read(some_tokens(2, 4), np.array([4, 4]))[1],
                      np.array([4, 4]))
