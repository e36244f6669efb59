"""Owns what a model costs, exact from its configuration: parameters and matmul FLOPs."""

from typing import NamedTuple

from models.config import ModelConfig
from models.layers import GATED


class Counts(NamedTuple):
  """Numbers of parameters.

  total: all; active: those a token passes through (its top-k experts only); embedding:
  token, position and free output embeddings, which total and active include.
  """

  total: int
  active: int
  embedding: int


def _norm_size(config: ModelConfig, width: int) -> int:
  """Returns the parameters of one norm of the residual stream."""
  return 2 * width if config.norm == 'layernorm' else width


def _attention_weights(config: ModelConfig) -> int:
  """Returns the matrix weights of one attention layer."""
  return 2 * config.d_model * config.d_head * (config.n_heads + config.n_kv_heads)


def _attention_vectors(config: ModelConfig) -> int:
  """Returns the biases and QK-norm scales of one attention layer."""
  H, K, E = config.n_heads, config.n_kv_heads, config.d_head
  size = {'none': 0, 'head': 2 * E, 'projection': (H + K) * E}[config.qk_norm]
  if config.qkv_bias:
    size += (H + 2 * K) * E
  return size + (config.d_model if config.out_bias else 0)


def _feed_forward_weights(config: ModelConfig, n_experts: int) -> int:
  """Returns the matrix weights of one feed-forward with `n_experts` experts counted."""
  D = config.d_model
  if config.moe.n_experts:
    return D * config.moe.n_experts + 3 * D * config.moe.d_expert * n_experts
  return (3 if config.mlp in GATED else 2) * D * config.d_ff


def _feed_forward_vectors(config: ModelConfig) -> int:
  """Returns the biases and activation parameters of one feed-forward."""
  if config.moe.n_experts:
    return 0
  size = 2 if config.mlp == 'xielu' else 0
  if config.mlp_bias:
    size += config.d_model + (2 if config.mlp in GATED else 1) * config.d_ff
  return size


def parameter_counts(config: ModelConfig) -> Counts:
  """Returns the exact numbers of parameters of a model."""
  n_norms = 4 if config.norm_placement == 'sandwich' else 2
  shared = (
    _attention_weights(config) + _attention_vectors(config) + _feed_forward_vectors(config)
    + n_norms * _norm_size(config, config.d_model)
  )
  embedding = config.vocab_size * config.d_model * (1 if config.tie_embeddings else 2)
  if config.positions == 'learned':
    embedding += config.context_length * config.d_model
  outside = embedding + _norm_size(config, config.d_model)
  total, active = (
    outside + config.n_layers * (shared + _feed_forward_weights(config, n_experts))
    for n_experts in (config.moe.n_experts, config.moe.top_k)
  )
  return Counts(total, active, embedding)


def mean_visible_keys(length: int, window: int) -> float:
  """Returns how many keys a token sees, averaged over a sequence of `length` tokens.

  Token i sees min(i + 1, window) keys; window 0 means no limit.
  """
  window = min(window or length, length)
  return window - window * (window - 1) / (2 * length)


def flops_per_token(config: ModelConfig, length: int, *, backward: bool = True) -> float:
  """Returns floating-point operations of all matrix products per token of a sequence.

  Counts a multiply and an add as two; attention over the keys that causality and windows
  leave visible; router and logits included, embedding lookup not. With `backward`,
  three times the forward pass (each product has two of its size in the backward pass).
  """
  weights = _attention_weights(config) + _feed_forward_weights(config, config.moe.top_k)
  products = config.n_layers * weights + config.d_model * config.vocab_size
  visible = sum(mean_visible_keys(length, config.kind_window(k)) for k in config.layer_kinds)
  products += 2 * config.n_heads * config.d_head * visible
  return (3 if backward else 1) * 2 * products
