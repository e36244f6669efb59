"""Counts against the leaves of the model, published sizes and the dots of the program."""

import math

import jax
import numpy as np
import pytest

from models import transformer
from models.config import ModelConfig, MoEConfig
from models.counting import flops_per_token, mean_visible_keys, parameter_counts
from tests.models import programs
from tests.models.variants import VARIANTS, tiny


def config_of(vocab, d_model, n_layers, n_heads, n_kv_heads, d_head, d_ff, **fields):
  """Returns a configuration from the sizes that model cards list."""
  return ModelConfig(
    vocab_size=vocab, d_model=d_model, n_layers=n_layers, n_heads=n_heads,
    n_kv_heads=n_kv_heads, d_head=d_head, d_ff=d_ff, **{'tie_embeddings': False, **fields},
  )


PYTHIA = dict(
  norm='layernorm', mlp='gelu', parallel_residual=True, qkv_bias=True, out_bias=True,
  mlp_bias=True,
)
# Exact totals as the model cards or the papers' tables give them.
PUBLISHED = {
  'Llama-3-8B': (config_of(128256, 4096, 32, 32, 8, 128, 14336), 8_030_261_248),
  'Pythia-160M': (config_of(50304, 768, 12, 12, 12, 64, 3072, **PYTHIA), 162_322_944),
  'Pythia-70M': (config_of(50304, 512, 6, 8, 8, 64, 2048, **PYTHIA), 70_426_624),
  'Mistral-7B': (config_of(32000, 4096, 32, 32, 8, 128, 14336), 7_241_732_096),
  'Qwen3-0.6B': (
    config_of(151936, 1024, 28, 16, 8, 128, 3072, qk_norm='head', tie_embeddings=True),
    596_049_920,
  ),
  'OLMo-2-7B': (
    config_of(100352, 4096, 32, 32, 32, 128, 11008, qk_norm='projection',
              norm_placement='post'),
    7_298_617_344,
  ),
  'GPT-2': (
    ModelConfig(
      vocab_size=50257, context_length=1024, d_model=768, n_layers=12, n_heads=12,
      n_kv_heads=12, d_head=64, d_ff=3072, positions='learned', norm='layernorm',
      mlp='gelu_tanh', qkv_bias=True, out_bias=True, mlp_bias=True,
    ),
    124_439_808,
  ),
}


@pytest.mark.parametrize('name', VARIANTS)
def test_totals_equal_the_leaves(name):
  shapes = transformer.abstract_params(VARIANTS[name])
  total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))
  counts = parameter_counts(VARIANTS[name])
  assert counts.total == total
  embedding = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes['embedding']))
  assert counts.embedding == embedding


@pytest.mark.parametrize('name', PUBLISHED)
def test_totals_equal_published_ones(name):
  config, expected = PUBLISHED[name]
  counts = parameter_counts(config)
  assert counts.total == counts.active == expected


def test_mixtral_total_and_active():
  config = config_of(
    32000, 4096, 32, 32, 8, 128, 14336, moe=MoEConfig(n_experts=8, top_k=2, d_expert=14336)
  )
  counts = parameter_counts(config)
  assert round(counts.total / 1e9, 1) == 46.7
  assert round(counts.active / 1e9, 1) == 12.9


@pytest.mark.parametrize('length, window', [(7, 0), (7, 3), (7, 7), (7, 50), (1, 1)])
def test_visible_keys_equal_a_count(length, window):
  counted = [min(i + 1, window or length) for i in range(length)]
  assert math.isclose(mean_visible_keys(length, window), np.mean(counted))


def dot_flops(jaxpr):
  """Returns the FLOPs of all dots of a traced program, twice the products."""
  total = 0
  for equation in programs.dots(jaxpr):
    (contracted, _), _ = equation.params['dimension_numbers']
    depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
    total += 2 * depth * math.prod(equation.outvars[0].aval.shape)
  return total


@pytest.mark.parametrize('pattern', [('full',), ('sliding', 'full')])
def test_flops_equal_the_dots_of_the_program(pattern):
  # Blocks of one query row compute exactly the visible pairs.
  config = tiny(
    attention='unrolled', attention_block=1, scan_layers='unroll', layer_pattern=pattern, window=3
  )
  graphdef, length = transformer.build(config), 8

  def logits(params, tokens_BL):
    model = transformer.apply(graphdef, params)
    return model.logits(model(tokens_BL)[0])

  tokens_BL = jax.ShapeDtypeStruct((1, length), np.int32)
  traced = jax.make_jaxpr(logits)(transformer.abstract_params(config), tokens_BL)
  counted = dot_flops(traced.jaxpr) / length
  assert math.isclose(flops_per_token(config, length, backward=False), counted)
  assert math.isclose(flops_per_token(config, length), 3 * counted)


def test_expert_flops_count_the_chosen_experts_and_the_router():
  dense = tiny(d_ff=14)
  sparse = tiny(moe=MoEConfig(n_experts=5, top_k=2, d_expert=7))
  router = 2 * 3 * 2 * sparse.d_model * 5  # layers, forward and backward, multiply and add
  assert flops_per_token(sparse, 8) == flops_per_token(dense, 8) + router
