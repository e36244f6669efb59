"""Owns attention of single tokens over a cache in plain XLA: one softmax, pages gathered."""

from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np

from models.kernels.decoding import (
  Cache, ContiguousCache, Decoded, check_operands, visible_range,
)
from models.kernels.interface import HIDDEN, softcapped


def _layer_keys(cache: Cache, layer: int | jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns the keys and values of a layer, [B, K, M, E]."""
  if isinstance(cache, ContiguousCache):
    return cache.k_NBKME[layer], cache.v_NBKME[layer]
  B, J = cache.table_BJ.shape
  _, _, K, T, E = cache.k_NPKTE.shape

  def gathered(pages_NPKTE: jax.Array) -> jax.Array:
    pages_BJKTE = pages_NPKTE[layer, cache.table_BJ]
    return pages_BJKTE.transpose(0, 2, 1, 3, 4).reshape(B, K, J * T, E)

  return gathered(cache.k_NPKTE), gathered(cache.v_NPKTE)


def attention(
  q_BHE: jax.Array, cache: Cache, layer: int | jax.Array, *, scale: float, window: int = 0,
  softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None, ahead: int = 0,
) -> Decoded:
  """Returns attention of one token per row over a cache; see `decoding.DecodeAttention`."""
  check_operands(q_BHE, cache, alibi_slopes_H)
  k_BKME, v_BKME = _layer_keys(cache, layer)
  (B, H, E), (K, M) = q_BHE.shape, k_BKME.shape[1:3]
  q_BKGE = q_BHE.reshape(B, K, H // K, E)
  logits_BKGM = jnp.einsum(
    'bkge,bkme->bkgm', q_BKGE, k_BKME, preferred_element_type=jnp.float32
  )
  logits_BKGM = softcapped(logits_BKGM * scale, softcap)
  keys_M, lengths_B = np.arange(M), cache.lengths_B
  if alibi_slopes_H is not None:
    slopes_KG1 = jnp.asarray(alibi_slopes_H, jnp.float32).reshape(K, H // K, 1)
    distance_BM = lengths_B[:, None] - 1 + ahead - keys_M
    logits_BKGM -= slopes_KG1 * distance_BM[:, None, None].astype(jnp.float32)
  first_B, stop_B = visible_range(lengths_B, window, ahead)
  visible_BM = (keys_M >= first_B[:, None]) & (keys_M < stop_B[:, None])
  logits_BKGM = jnp.where(visible_BM[:, None, None], logits_BKGM, HIDDEN)
  # At least HIDDEN / 2: a query that sees no key has weights 0, not 1.
  top_BKG1 = jnp.maximum(jnp.max(logits_BKGM, axis=-1, keepdims=True), HIDDEN / 2)
  weights_BKGM = jnp.exp(logits_BKGM - top_BKG1)
  total_BKG1 = jnp.sum(weights_BKGM, axis=-1, keepdims=True)
  out_BKGE = jnp.einsum(
    'bkgm,bkme->bkge', weights_BKGM.astype(v_BKME.dtype), v_BKME,
    preferred_element_type=jnp.float32,
  )
  seen_BKG1 = total_BKG1 > 0
  total_BKG1 = jnp.where(seen_BKG1, total_BKG1, 1.0)
  lse_BKG1 = jnp.where(seen_BKG1, top_BKG1 + jnp.log(total_BKG1), HIDDEN)
  out_BHE = (out_BKGE / total_BKG1).reshape(B, H, E).astype(q_BHE.dtype)
  return Decoded(out_BHE, lse_BKG1.reshape(B, H))
