"""Owns decoding: a contiguous cache, compiled prefill, step and whole generation.

  graphdef = transformer.build(config)
  logits_BV, cache = prefill(graphdef, params, prompts, capacity=128)
  logits_BV, cache = step(graphdef, params, tokens_B, cache)       # the cache is donated
  generated = generate(graphdef, params, prompts, max_tokens=64, stop=[eos_id], seed=0)
"""

import functools
from typing import Any, NamedTuple, Optional, Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from models import axes, transformer
from models.config import ModelConfig
from models.kernels.decoding import ContiguousCache
from models.sampling import Sampling, row_keys, sample
from models.stack import scans_layers
from models.transformer import KV, Transformer

CACHE_AXES = (axes.LAYERS, axes.BATCH, axes.KV_HEADS_ACT, None, None)


class Prompts(NamedTuple):
  """Rows of tokens, right-padded, int32 [B, L], and their lengths, at least 1.

  `rows_B` numbers the rows for their random draws; rows alike in prompt, seed and number
  get the same samples in any batch.
  """

  tokens_BL: jax.Array
  lengths_B: jax.Array
  rows_B: jax.Array


class Generated(NamedTuple):
  """What was generated: int32 tokens [B, T], of which the first lengths_B count.

  A stop token is not counted; stopped_B says which rows ended with one.
  """

  tokens_BT: jax.Array
  lengths_B: jax.Array
  stopped_B: jax.Array


def make_prompts(
  prompts: Sequence[Sequence[int]], rows: Optional[Sequence[int]] = None, multiple: int = 16
) -> Prompts:
  """Returns prompts padded to a common length, a multiple of `multiple` to spare compilations.

  Rows are numbered from 0 unless `rows` numbers them. Raises ValueError for an empty prompt.
  """
  for i, prompt in enumerate(prompts):
    if not len(prompt):
      raise ValueError(f'prompt {i} has no tokens; begin it with a start token')
  longest = max(map(len, prompts))
  tokens_BL = np.zeros((len(prompts), -(-longest // multiple) * multiple), np.int32)
  for row_L, prompt in zip(tokens_BL, prompts):
    row_L[: len(prompt)] = prompt
  lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
  return Prompts(
    tokens_BL, lengths_B, np.arange(len(prompts), dtype=np.int32) if rows is None
    else np.asarray(rows, np.int32),
  )


def _last(x_BLD: jax.Array, lengths_B: jax.Array) -> jax.Array:
  """Returns the last real token's features of each row, [B, D]."""
  return jnp.take_along_axis(x_BLD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]


def _logits(model: Transformer, hidden_BD: jax.Array) -> jax.Array:
  """Returns the logits [B, V] of one token per row."""
  return model.logits(hidden_BD[:, None])[:, 0]


def _filled(
  model: Transformer, prompts: Prompts, capacity: int
) -> tuple[jax.Array, ContiguousCache]:
  """Returns the logits [B, V] after each prompt and the cache that holds the prompts."""
  config = model.config
  L = min(prompts.tokens_BL.shape[1], capacity, config.context_length)
  hidden_BLD, kv = model.read(prompts.tokens_BL[:, :L], prompts.lengths_B)
  room = ((0, 0), (0, 0), (0, 0), (0, capacity - L), (0, 0))

  def roomy(x_NBLKE: jax.Array) -> jax.Array:
    return model.seams.constrain(jnp.pad(x_NBLKE.transpose(0, 1, 3, 2, 4), room), CACHE_AXES)

  if scans_layers(config, jax.default_backend()):
    arrays = [roomy(x_NBLKE) for x_NBLKE in kv]
  else:
    arrays = [tuple(roomy(x[i : i + 1]) for i in range(config.n_layers)) for x in kv]
  cache = ContiguousCache(*arrays, jnp.asarray(prompts.lengths_B, jnp.int32))
  return _logits(model, _last(hidden_BLD, prompts.lengths_B)), cache


def appended(cache: ContiguousCache, kv: KV, places_B: jax.Array) -> ContiguousCache:
  """Returns the cache with one more token per row, of KV [N, B, 1, K, E], at these places."""

  # Of several spellings the one that the TPU compiler keeps in place and in the kernels' layout.
  @functools.partial(jax.vmap, in_axes=(1, 1, 0), out_axes=1)
  def write(x_NKME: jax.Array, new_N1KE: jax.Array, length: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice(x_NKME, new_N1KE.swapaxes(1, 2), (0, 0, length, 0))

  def written(x, new_NB1KE: jax.Array):
    if isinstance(x, tuple):
      return tuple(write(x_1BKME, new_NB1KE[i : i + 1], places_B) for i, x_1BKME in enumerate(x))
    return write(x, new_NB1KE, places_B)

  return ContiguousCache(*map(written, cache[:2], kv), places_B + 1)


def _stepped(
  model: Transformer, tokens_B: jax.Array, cache: ContiguousCache
) -> tuple[jax.Array, ContiguousCache]:
  """Returns the logits [B, V] after one more token per row, and the cache with it."""
  hidden_BD, kv = model.step(tokens_B, cache)
  # Zeros that wait for the last layer: when the cache is written nobody reads the old one any
  # more, and XLA on CPUs, which looks at dependencies only, needs no copy of it.
  zero_B = (hidden_BD[:, 0] > jnp.inf).astype(jnp.int32)
  return _logits(model, hidden_BD), appended(cache, kv, cache.lengths_B + zero_B)


def check_room(config: ModelConfig, longest: int, n_tokens: int) -> None:
  """Raises ValueError when the longest prompt and n_tokens more exceed the model's context."""
  if longest + n_tokens > config.context_length:
    raise ValueError(
      f'a prompt of {longest} tokens and {n_tokens} new ones exceed model.context_length='
      f'{config.context_length}; shorten the prompt or ask for fewer'
    )


def prefill(
  graphdef: nnx.GraphDef, params: dict[str, Any], prompts: Prompts, *, capacity: int
) -> tuple[jax.Array, ContiguousCache]:
  """Returns logits [B, V] after each prompt, and a cache with room for `capacity` tokens a row.

  Raises ValueError when a prompt is longer than the capacity or the model's context.
  """
  longest = int(np.max(prompts.lengths_B))
  check_room(transformer.apply(graphdef, params).config, longest, 0)
  if longest > capacity:
    raise ValueError(f'capacity={capacity} is less than the longest prompt, {longest} tokens')
  return _prefill(graphdef, params, prompts, capacity)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _prefill(graphdef, params, prompts: Prompts, capacity: int):
  """Compiled `prefill`."""
  return _filled(transformer.apply(graphdef, params), prompts, capacity)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def step(
  graphdef: nnx.GraphDef, params: dict[str, Any], tokens_B: jax.Array, cache: ContiguousCache
) -> tuple[jax.Array, ContiguousCache]:
  """Returns logits [B, V] after one more token in every row, and the cache with it.

  The cache is donated. Rows need room: lengths below the capacity and the model's context.
  """
  return _stepped(transformer.apply(graphdef, params), tokens_B, cache)


def generate(
  graphdef: nnx.GraphDef, params: dict[str, Any], prompts: Prompts, *, max_tokens: int,
  sampling: Sampling = Sampling(), stop: Sequence[int] = (), seed: int = 0,
) -> Generated:
  """Returns up to `max_tokens` tokens after each prompt, drawn until a token of `stop`.

  One compiled loop, which ends when all rows have stopped. Raises ValueError when a prompt
  and its new tokens exceed the model's context.
  """
  if max_tokens < 1:
    raise ValueError(f'max_tokens={max_tokens} must be at least 1')
  longest = int(np.max(prompts.lengths_B))
  check_room(transformer.apply(graphdef, params).config, longest, max_tokens)
  stop_S = np.asarray(stop, np.int32)
  return _generate(graphdef, params, prompts, stop_S, seed, sampling, max_tokens)


class _Loop(NamedTuple):
  """What generation carries from token to token."""

  cache: ContiguousCache
  generated: Generated
  newest_B: jax.Array
  n_drawn: jax.Array


@functools.partial(jax.jit, static_argnums=(0, 5, 6))
def _generate(
  graphdef, params, prompts: Prompts, stop_S: jax.Array, seed: jax.Array, sampling: Sampling,
  max_tokens: int,
) -> Generated:
  """Compiled `generate`."""
  model = transformer.apply(graphdef, params)
  B, L = prompts.tokens_BL.shape

  def drawn(
    logits_BV: jax.Array, cache: ContiguousCache, generated: Generated, t: jax.Array
  ) -> _Loop:
    """Returns the carry with a token drawn from the logits after what the cache holds."""
    keys_B = row_keys(seed, prompts.rows_B, cache.lengths_B)
    tokens_B = sample(logits_BV, keys_B, sampling)
    stopped_B = generated.stopped_B | jnp.isin(tokens_B, stop_S)
    written_BT = generated.tokens_BT.at[:, t].set(jnp.where(stopped_B, 0, tokens_B))
    lengths_B = generated.lengths_B + ~stopped_B
    return _Loop(cache, Generated(written_BT, lengths_B, stopped_B), tokens_B, t + 1)

  def unfinished(loop: _Loop) -> jax.Array:
    return (loop.n_drawn < max_tokens) & ~jnp.all(loop.generated.stopped_B)

  def one_more(loop: _Loop) -> _Loop:
    logits_BV, cache = _stepped(model, loop.newest_B, loop.cache)
    return drawn(logits_BV, cache, loop.generated, loop.n_drawn)

  nothing = Generated(
    jnp.zeros((B, max_tokens), jnp.int32), jnp.zeros(B, jnp.int32), jnp.zeros(B, bool)
  )
  logits_BV, cache = _filled(model, prompts, L + max_tokens)
  begun = drawn(logits_BV, cache, nothing, jnp.zeros((), jnp.int32))
  return jax.lax.while_loop(unfinished, one_more, begun).generated
