"""Owns what every attention implementation takes and returns, and which keys a query sees."""

import dataclasses
from typing import NamedTuple, Optional, Protocol

import jax
import jax.numpy as jnp
import numpy as np

HIDDEN = -1e30  # logit of an invisible key; finite, so that a row without keys has no NaN


def softcapped(logits: jax.Array, softcap: float) -> jax.Array:
  """Returns softcap * tanh(logits / softcap), or the logits when softcap is 0."""
  return softcap * jnp.tanh(logits / softcap) if softcap else logits


@dataclasses.dataclass(frozen=True)
class Mask:
  """Which keys a query may see by position, segments aside.

  Query i stands at key index i + q_offset. Causal: it sees no later key. Window w > 0: it
  sees keys less than w away. Chunk c > 0: keys fall into chunks of c, it sees its own.
  """

  causal: bool = True
  window: int = 0
  chunk: int = 0
  q_offset: int = 0

  def visible(
    self, queries: jax.Array | np.ndarray, keys: jax.Array | np.ndarray
  ) -> jax.Array | np.ndarray:
    """Returns whether queries see keys, from broadcastable key indices of both."""
    distance = queries - keys
    visible = distance >= 0 if self.causal else distance == distance
    if self.window:
      visible &= (distance < self.window) & (distance > -self.window)
    if self.chunk:
      visible &= queries // self.chunk == keys // self.chunk
    return visible

  def reach(self, start: int, stop: int, n_keys: int) -> tuple[int, int]:
    """Returns the range of keys that queries start..stop-1 can see, maybe empty."""
    first, last = start + self.q_offset, stop - 1 + self.q_offset
    low, high = 0, n_keys
    if self.causal:
      high = min(high, last + 1)
    if self.window:
      low, high = max(low, first - self.window + 1), min(high, last + self.window)
    if self.chunk:
      low = max(low, first // self.chunk * self.chunk)
      high = min(high, (last // self.chunk + 1) * self.chunk)
    return min(low, n_keys), max(high, min(low, n_keys))

  def common_reach(self, start: int, stop: int, n_keys: int) -> tuple[int, int]:
    """Returns the range of keys that each of queries start..stop-1 can see, maybe empty."""
    ranges = [self.reach(i, i + 1, n_keys) for i in (start, stop - 1)]
    low, high = max(low for low, _ in ranges), min(high for _, high in ranges)
    return low, max(high, low)


class Attended(NamedTuple):
  """What attention returns; both parts carry gradients.

  out_BLHE is in the dtype of the queries; lse_BHL, float32, is the log of the sum of
  exponentials of each query's logits, HIDDEN for a query that sees no key (its out is 0).
  """

  out_BLHE: jax.Array
  lse_BHL: jax.Array


class Attention(Protocol):
  """Attention over projected heads.

  Takes queries [B, L, H, E], keys and values [B, M, K, E] with H a multiple of K, all of
  one dtype, float32 or bfloat16. Segments are int32 [B, L] and [B, M]: a query sees keys of
  its own segment, segment 0 is padding; `key_segment_ids_BM` None means those of the
  queries, both None means one segment. Softcap 0 means none. Slopes, maybe traced, are
  ALiBi's: a logit falls by slope * distance. Dots accumulate in float32, the softmax is in
  float32.
  """

  def __call__(
    self, q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array, *, scale: float,
    mask: Mask = Mask(), segment_ids_BL: Optional[jax.Array] = None,
    key_segment_ids_BM: Optional[jax.Array] = None, softcap: float = 0.0,
    alibi_slopes_H: Optional[np.ndarray] = None,
  ) -> Attended: ...


def check_operands(
  q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array,
  segment_ids_BL: Optional[jax.Array] = None, key_segment_ids_BM: Optional[jax.Array] = None,
  alibi_slopes_H: Optional[np.ndarray] = None,
) -> None:
  """Raises ValueError in one sentence when the operands of an attention do not fit."""
  (B, L, H, E), (M, K) = q_BLHE.shape, k_BMKE.shape[1:3]
  if k_BMKE.shape != v_BMKE.shape or (k_BMKE.shape[0], k_BMKE.shape[3]) != (B, E):
    raise ValueError(
      f'queries {q_BLHE.shape}, keys {k_BMKE.shape} and values {v_BMKE.shape} do not fit; they '
      'are [B, L, H, E], [B, M, K, E] and [B, M, K, E]'
    )
  if H % K:
    raise ValueError(f'{H} query heads are not a multiple of {K} key heads')
  if not q_BLHE.dtype == k_BMKE.dtype == v_BMKE.dtype:
    raise ValueError(
      f'queries, keys and values are {q_BLHE.dtype}, {k_BMKE.dtype} and {v_BMKE.dtype}; cast '
      'them to one dtype'
    )
  if segment_ids_BL is None and key_segment_ids_BM is not None:
    raise ValueError('key segments are given without segments of the queries; give both')
  keys_BM = segment_ids_BL if key_segment_ids_BM is None else key_segment_ids_BM
  if segment_ids_BL is not None and (segment_ids_BL.shape, keys_BM.shape) != ((B, L), (B, M)):
    raise ValueError(
      f'segments {segment_ids_BL.shape} and key segments {keys_BM.shape} do not fit queries '
      f'[{B}, {L}] and keys [{B}, {M}]'
    )
  if alibi_slopes_H is not None and alibi_slopes_H.shape != (H,):
    raise ValueError(f'ALiBi slopes {alibi_slopes_H.shape} do not fit {H} query heads')
