"""Owns the oracle of attention: one dense softmax, in the precision of its inputs or better."""

from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np

from models.kernels.interface import HIDDEN, Attended, Mask, check_operands, softcapped


def attention(
  q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array, *, scale: float, mask: Mask = Mask(),
  segment_ids_BL: Optional[jax.Array] = None, key_segment_ids_BM: Optional[jax.Array] = None,
  softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None,
) -> Attended:
  """Returns attention over all pairs of positions at once; see `interface.Attention`.

  With float64 inputs everything is float64.
  """
  check_operands(
    q_BLHE, k_BMKE, v_BMKE, segment_ids_BL, key_segment_ids_BM, alibi_slopes_H
  )
  (B, L, H, E), (M, K) = q_BLHE.shape, k_BMKE.shape[1:3]
  dtype = jnp.promote_types(q_BLHE.dtype, jnp.float32)
  queries_L1, keys_M = np.arange(L)[:, None] + mask.q_offset, np.arange(M)
  q_BLKGE = q_BLHE.reshape(B, L, K, H // K, E)
  logits = jnp.einsum('blkge,bmke->bkglm', q_BLKGE, k_BMKE, preferred_element_type=dtype)
  logits_BKGLM = softcapped(logits * scale, softcap)
  if alibi_slopes_H is not None:
    slopes_KG11 = alibi_slopes_H.reshape(K, H // K, 1, 1)
    logits_BKGLM -= slopes_KG11 * np.abs(queries_L1 - keys_M)
  visible_BLM = jnp.asarray(mask.visible(queries_L1, keys_M))[None]
  if segment_ids_BL is not None:
    keys_BM = segment_ids_BL if key_segment_ids_BM is None else key_segment_ids_BM
    visible_BLM &= (segment_ids_BL[:, :, None] == keys_BM[:, None]) & (keys_BM != 0)[:, None]
  logits_BKGLM = jnp.where(visible_BLM[:, None, None], logits_BKGLM, HIDDEN)
  # At least HIDDEN / 2: a query that sees no key has weights 0, not 1.
  top_BKGL1 = jnp.maximum(jnp.max(logits_BKGLM, axis=-1, keepdims=True), HIDDEN / 2)
  top_BKGL1 = jax.lax.stop_gradient(top_BKGL1)
  weights_BKGLM = jnp.exp(logits_BKGLM - top_BKGL1)
  total_BKGL1 = jnp.sum(weights_BKGLM, axis=-1, keepdims=True)
  seen_BKGL1 = total_BKGL1 > 0
  total_BKGL1 = jnp.where(seen_BKGL1, total_BKGL1, 1)
  out_BLKGE = jnp.einsum('bkglm,bmke->blkge', weights_BKGLM / total_BKGL1, v_BMKE)
  lse_BKGL1 = jnp.where(seen_BKGL1, top_BKGL1 + jnp.log(total_BKGL1), HIDDEN)
  return Attended(
    out_BLKGE.reshape(B, L, H, E).astype(q_BLHE.dtype), lse_BKGL1.reshape(B, H, L)
  )
