"""Log-probabilities of both answers of every item under a model, in one compiled call."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Optional

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from models import axes, transformer
from research.data.tokenizers import Tokenizer
from research.monitors.buckets import Bucket, make_buckets
from research.monitors.encoding import EncodedItem, encode_items
from research.monitors.items import MonitorItem

Constrain = Callable[[jax.Array, tuple[Optional[str], ...]], jax.Array]
Reduce = Callable[[jax.Array, jax.Array], jax.Array]


class Scores(NamedTuple):
  """Log-probabilities in nats by item, float32: sums over the tokens of each answer."""

  logp_generalizing: np.ndarray
  logp_shortcut: np.ndarray


class Chunk(NamedTuple):
  """The arrays of one chunk of a bucket that the model needs; see `buckets.Bucket`."""

  prefix_CP: jax.Array
  prefix_lengths_C: jax.Array
  tokens_BS: jax.Array
  places_BT: jax.Array
  targets_BTR: jax.Array
  counts_BTR: jax.Array


def in_chunks(bucket: Bucket) -> Chunk:
  """Returns the arrays of all chunks of a bucket, on a leading axis Z."""
  return Chunk(bucket.prefix_ZCP, bucket.prefix_lengths_ZC, bucket.tokens_ZBS, bucket.places_ZBT,
               bucket.targets_ZBTR, bucket.counts_ZBTR)


def chunk_of(chunks: Chunk, z: int) -> Chunk:
  """Returns one of the chunks of a bucket."""
  return jax.tree.map(lambda x: x[z], chunks)


def summed(logps_BTR: jax.Array, counts_BTR: jax.Array) -> jax.Array:
  """Returns the sums [B, R] of the log-probabilities that count."""
  return jnp.sum(jnp.where(counts_BTR, logps_BTR, 0.0), axis=1)


class Scorer:
  """Scores a fixed suite; compiled at the first call, then the same program every time.

  Attributes:
    items, encoded: the suite, as text and as tokens.
    buckets: the static shapes that are run.
    n_tokens: tokens that one call puts through the model, padding included.
  """

  def __init__(
      self, items: Sequence[MonitorItem], tokenizer: Tokenizer, graphdef: nnx.GraphDef, *,
      context_length: int, batch_rows: int = 512, row_multiple: int = 1,
      start_id: int | None = None, constrain: Constrain = transformer.unconstrained):
    """Prepares the suite.

    Args:
      items: what to score.
      tokenizer: of the model.
      graphdef: the model's static half (`models.transformer.build`).
      context_length: of the model, in tokens.
      batch_rows: rows run at a time, at most.
      row_multiple: what the number of rows must be divided by (devices that rows spread over).
      start_id: token put before every prompt; None puts none.
      constrain: pins the rows of an array to devices, (array, logical axes) -> array.

    Raises UserError listing the items that cannot be scored.
    """
    self.items = tuple(items)
    self.encoded: list[EncodedItem] = self.encode(items, tokenizer, context_length, start_id)
    self.buckets: list[Bucket] = make_buckets(
        self.encoded, context_length=context_length, batch_rows=batch_rows,
        row_multiple=row_multiple)
    self.n_tokens = sum(bucket.n_tokens for bucket in self.buckets)
    self._chunks = [in_chunks(bucket) for bucket in self.buckets]
    slots = np.concatenate([bucket.slots_ZBR.ravel() for bucket in self.buckets])
    # where the sum of every slot stands among the flattened outputs of all buckets
    self._order = np.empty(2 * len(self.items), np.int32)
    self._order[slots[slots >= 0]] = np.flatnonzero(slots >= 0)
    self._score = jax.jit(_scorer(graphdef, constrain, self.reduce))

  encode = staticmethod(encode_items)
  reduce = staticmethod(summed)  # what is made of the log-probabilities that count, [B, R]

  def score(self, params: Any) -> Scores:
    """Returns the scores under `params` (a nested dict of arrays, sharded or not).

    The same parameters give the same bits at every call.
    """
    return Scores(*self._both(params))

  def _both(self, params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Returns what `reduce` makes of the generalizing and of the shortcut answers."""
    values = np.asarray(self._score(params, self._chunks, self._order))
    return np.ascontiguousarray(values[0::2]), np.ascontiguousarray(values[1::2])


def _scorer(graphdef: nnx.GraphDef, constrain: Constrain, reduce: Reduce) -> Callable:
  """Returns f(params, chunks of all buckets, order) -> reduced log-probabilities in slot order."""

  def score(params: Any, buckets: list[Chunk], order: jax.Array) -> jax.Array:
    model = transformer.apply(graphdef, params)
    reduced = lambda chunk: reduce(read(model, constrain, chunk)[0], chunk.counts_BTR)
    sums = []
    for chunks in buckets:
      if chunks.tokens_BS.shape[0] == 1:
        sums.append(reduced(chunk_of(chunks, 0)).ravel())
      else:
        sums.append(jax.lax.map(reduced, chunks).ravel())
    return constrain(jnp.concatenate(sums)[order], (None,))

  return score


def read(model: transformer.Transformer, constrain: Constrain, chunk: Chunk
         ) -> tuple[jax.Array, jax.Array]:
  """Returns the targets' log-probabilities, and whether each is the likeliest, both [B, T, R].

  Every prefix is read once, for all rows behind it (P may be 0). Hidden states are gathered where
  answers are read before they meet the vocabulary.
  """
  tokens_BS = constrain(chunk.tokens_BS, (axes.BATCH, axes.LENGTH))
  if chunk.prefix_CP.shape[1]:
    prefix_CP = constrain(chunk.prefix_CP, (axes.BATCH, axes.LENGTH))
    _, kv = model.read(prefix_CP, chunk.prefix_lengths_C)
    hidden_BSD = model.with_prefix(tokens_BS, kv, chunk.prefix_lengths_C)
  else:
    hidden_BSD = model(tokens_BS)[0]
  hidden_BTD = jnp.take_along_axis(hidden_BSD, chunk.places_BT[:, :, None], axis=1)
  logits_BTV = model.logits(hidden_BTD)
  target_logits_BTR = jnp.take_along_axis(logits_BTV, chunk.targets_BTR, axis=-1)
  logps_BTR = target_logits_BTR - jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
  return logps_BTR, jnp.argmax(logits_BTV, axis=-1, keepdims=True) == chunk.targets_BTR
