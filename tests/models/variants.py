"""Owns small configurations that together use every option of a model."""

import dataclasses

from models.config import ModelConfig, MoEConfig, RopeConfig

TINY = ModelConfig(
  vocab_size=19, context_length=24, n_layers=2, d_model=12, n_heads=4, n_kv_heads=2, d_head=6,
  d_ff=10, attention_block=16, init_std=0.2, scan_layers='scan',
)


def tiny(**fields) -> ModelConfig:
  """Returns the tiny model with some fields changed."""
  return dataclasses.replace(TINY, **fields)


VARIANTS = {
  'llama': tiny(attention_block=4, rope=RopeConfig(
    theta=500.0, scaling='llama3', factor=4.0, original_context=32, high_freq_factor=3.0
  )),
  'qwen3': tiny(qk_norm='head', tie_embeddings=False),
  'olmo3': tiny(  # five layers in groups of two: one is left over
    norm_placement='post', qk_norm='projection', layer_pattern=('sliding', 'full'), window=3,
    n_layers=5, rope=RopeConfig(scaling='yarn', factor=4.0, original_context=16),
    sliding_rope=RopeConfig(), tie_embeddings=False, attention_block=8,
  ),
  'apertus': tiny(mlp='xielu', qk_norm='head', tie_embeddings=False),
  'pythia': tiny(
    norm='layernorm', mlp='gelu', parallel_residual=True, qkv_bias=True, out_bias=True,
    mlp_bias=True, n_kv_heads=4, tie_embeddings=False, d_head=8, rope=RopeConfig(fraction=0.25),
  ),
  'gemma3': tiny(
    norm_placement='sandwich', qk_norm='head', mlp='geglu', scale_embeddings=True, window=4,
    layer_pattern=('sliding', 'full'), attention_scale=0.3,
    rope=RopeConfig(theta=1e6, scaling='linear', factor=8.0),
    sliding_rope=RopeConfig(theta=1e4),
  ),
  'softcapped': tiny(  # the caps of Gemma 2, and no positions
    norm_placement='sandwich', mlp='geglu', attention_softcap=2.0, final_softcap=3.0,
    layer_pattern=('sliding', 'full'), window=5, positions='none', mlp_bias=True, qkv_bias=True,
  ),
  'gpt2': tiny(
    positions='learned', norm='layernorm', mlp='gelu_tanh', qkv_bias=True, out_bias=True,
    mlp_bias=True, n_kv_heads=4,
  ),
  'bloom': tiny(positions='alibi', layer_pattern=('full', 'sliding'), window=6),
  'mixtral': tiny(moe=MoEConfig(n_experts=5, top_k=3, d_expert=7)),
}
