"""Owns how the next token is drawn from logits: greedy, temperature, top-k, nucleus."""

import dataclasses
from typing import Annotated as A

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn: first the temperature, then top-k, then top-p among what is left."""

  temperature: A[float, 'divides logits; 0 takes the likeliest token'] = 1.0
  top_k: A[int, 'tokens kept, the likeliest ones; 0 keeps all'] = 0
  top_p: A[float, 'keeps the fewest likeliest tokens whose probability reaches this'] = 1.0
  n_tokens: A[int, 'tokens from this id on are never drawn; 0 allows all'] = 0

  def __post_init__(self):
    if not 0 <= self.temperature < float('inf'):
      raise ValueError(f'temperature={self.temperature} must be 0 (greedy) or above')
    if self.top_k < 0:
      raise ValueError(f'top_k={self.top_k} must be 0 (keep all) or above')
    if self.n_tokens < 0:
      raise ValueError(f'n_tokens={self.n_tokens} must be 0 (allow all) or above')
    if not 0 < self.top_p <= 1:
      raise ValueError(f'top_p={self.top_p} must be above 0 and at most 1 (keep all)')


def kept_logits(logits_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
  """Returns the logits of the kept tokens, -inf for others, and their tokens: [B, R] each.

  R is V, or top_k. Ranked where tokens are cut: the cut after top_k, and the nucleus of
  Holtzman et al. 2019 (section 3.1), which always keeps the likeliest token.
  """
  logits_BV = logits_BV.astype(jnp.float32) / sampling.temperature
  V = logits_BV.shape[-1]
  if sampling.top_k in (0, V) and sampling.top_p == 1:
    return logits_BV, jnp.broadcast_to(jnp.arange(V), logits_BV.shape)
  logits_BR, tokens_BR = jax.lax.top_k(logits_BV, min(sampling.top_k or V, V))
  if sampling.top_p < 1:
    p_BR = jax.nn.softmax(logits_BR, axis=-1)
    likelier_BR = jnp.cumsum(p_BR, axis=-1) - p_BR  # probability of all tokens ranked before
    kept_BR = (likelier_BR < sampling.top_p).at[:, 0].set(True)
    logits_BR = jnp.where(kept_BR, logits_BR, -jnp.inf)
  return logits_BR, tokens_BR


def row_keys(seed: int | jax.Array, rows_B: jax.Array, positions_B: jax.Array) -> jax.Array:
  """Returns the random key of each row's token at a position [B]: seed, row, position alone.

  So what a row draws depends neither on its neighbors nor on its place in a batch.
  """
  key = jax.random.key(seed)

  def row_key(row: jax.Array, position: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.fold_in(key, row), position)

  return jax.vmap(row_key)(rows_B, positions_B)


def sample(logits_BV: jax.Array, keys_B: jax.Array, sampling: Sampling) -> jax.Array:
  """Returns one token per row, int32 [B]; the keys don't matter at temperature 0."""
  logits_BV = logits_BV[:, : sampling.n_tokens or None]
  if sampling.temperature == 0:
    return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
  logits_BR, tokens_BR = kept_logits(logits_BV, sampling)
  ranks_B = jax.vmap(jax.random.categorical)(keys_B, logits_BR)
  return jnp.take_along_axis(tokens_BR, ranks_B[:, None], axis=1)[:, 0].astype(jnp.int32)
