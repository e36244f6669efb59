"""Owns attention for short rows on CPUs: blocks of queries unrolled, their weights kept.

The fastest of the plain XLA versions while the weights fit the cache; its memory grows with
the square of the length (`blockwise` keeps it linear).
"""

from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np

from models.kernels.interface import HIDDEN, Attended, Mask, check_operands, softcapped
from models.products import transposed_product


@jax.custom_vjp
def _scores(q_BKRE: jax.Array, k_BKME: jax.Array) -> jax.Array:
  """Returns products of queries and keys, float32 [B, K, R, M]."""
  return jnp.einsum('bkre,bkme->bkrm', q_BKRE, k_BKME, preferred_element_type=jnp.float32)


def _scores_backward(operands, g_BKRM: jax.Array):
  """Returns the gradients of queries and keys."""
  q_BKRE, k_BKME = operands
  g_BKRM = g_BKRM.astype(q_BKRE.dtype)
  d_q_BKRE = jnp.einsum('bkrm,bkme->bkre', g_BKRM, k_BKME)
  return d_q_BKRE, transposed_product(g_BKRM, q_BKRE)


_scores.defvjp(lambda q, k: (_scores(q, k), (q, k)), _scores_backward)


def _weighted_forward(logits_BKRM: jax.Array, v_BKME: jax.Array):
  """Returns the output and log-sum-exp of logits and values, and what backward needs.

  The weights are kept before their division by the total, in the dtype of the values.
  """
  top_BKR1 = jnp.max(logits_BKRM, axis=-1, keepdims=True)
  weights_BKRM = jnp.exp(logits_BKRM - top_BKR1)
  total_BKR1 = jnp.sum(weights_BKRM, axis=-1, keepdims=True)
  weights_BKRM = weights_BKRM.astype(v_BKME.dtype)
  out_BKRE = jnp.einsum(
    'bkrm,bkme->bkre', weights_BKRM, v_BKME, preferred_element_type=jnp.float32
  )
  out_BKRE /= total_BKR1
  lse_BKR1 = top_BKR1 + jnp.log(total_BKR1)
  return (out_BKRE, lse_BKR1), (weights_BKRM, total_BKR1, out_BKRE, v_BKME)


@jax.custom_vjp
def _weighted(logits_BKRM: jax.Array, v_BKME: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns softmax(logits) times the values [B, K, R, E] and log-sum-exp [B, K, R, 1]."""
  return _weighted_forward(logits_BKRM, v_BKME)[0]


def _weighted_backward(residuals, g):
  """Returns the gradients of logits and values (Dao et al. 2022, appendix B.2).

  A logit that is hidden by a large negative bias has weight 0, so its gradient is 0 too.
  """
  weights_BKRM, total_BKR1, out_BKRE, v_BKME = residuals
  g_BKRE, g_lse_BKR1 = g
  inner_BKR1 = jnp.sum(g_BKRE * out_BKRE, axis=-1, keepdims=True) - g_lse_BKR1
  g_BKRE = (g_BKRE / total_BKR1).astype(v_BKME.dtype)
  d_weights_BKRM = jnp.einsum(
    'bkre,bkme->bkrm', g_BKRE, v_BKME, preferred_element_type=jnp.float32
  )
  d_logits_BKRM = weights_BKRM * (d_weights_BKRM - inner_BKR1 / total_BKR1)
  return d_logits_BKRM, transposed_product(weights_BKRM, g_BKRE)


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _bias(
  queries_L1: np.ndarray, keys_M: np.ndarray, mask: Mask, slopes_KG: Optional[np.ndarray],
  segment_ids_BL: Optional[jax.Array], key_segment_ids_BM: Optional[jax.Array],
) -> tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]:
  """Returns what is added to logits, [1 or B, 1 or K, 1 or G, L, M], and who sees a key [B, L]."""
  visible_BLM = np.broadcast_to(mask.visible(queries_L1, keys_M), (len(queries_L1), len(keys_M)))
  visible_BLM, where = visible_BLM[None], np.where
  if segment_ids_BL is not None and key_segment_ids_BM is not None:
    same_BLM = segment_ids_BL[:, :, None] == key_segment_ids_BM[:, None]
    visible_BLM = visible_BLM & same_BLM & (key_segment_ids_BM != 0)[:, None]
    where = jnp.where
  bias = where(visible_BLM, np.float32(0), np.float32(HIDDEN))[:, None, None]
  if slopes_KG is not None:
    distance_LM = np.abs(queries_L1 - keys_M).astype(np.float32)
    bias = bias - slopes_KG[:, :, None, None] * distance_LM
  return bias, visible_BLM.any(-1)


def _attend_rows(
  q_BKGLE: jax.Array, k_BKME: jax.Array, v_BKME: jax.Array, bias, seen_BL, scale: float,
  softcap: float,
) -> tuple[jax.Array, jax.Array]:
  """Returns the output [B, K, G, L, E] and log-sum-exp [B, K, G, L] of some query rows."""
  B, K, G, L, E = q_BKGLE.shape
  scores_BKRM = _scores(q_BKGLE.reshape(B, K, G * L, E), k_BKME)
  logits_BKRM = softcapped(scores_BKRM * scale, softcap)
  # Added, not selected: backward needs no mask.
  logits_BKGLM = logits_BKRM.reshape(B, K, G, L, -1) + bias
  out_BKRE, lse_BKR1 = _weighted(logits_BKGLM.reshape(logits_BKRM.shape), v_BKME)
  out_BKGLE, lse_BKGL = out_BKRE.reshape(B, K, G, L, E), lse_BKR1.reshape(B, K, G, L)
  if isinstance(seen_BL, np.ndarray) and seen_BL.all():
    return out_BKGLE, lse_BKGL
  seen_BKGL = seen_BL[:, None, None]
  return jnp.where(seen_BKGL[..., None], out_BKGLE, 0), jnp.where(seen_BKGL, lse_BKGL, HIDDEN)


def attention(
  q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array, *, scale: float, mask: Mask = Mask(),
  segment_ids_BL: Optional[jax.Array] = None, key_segment_ids_BM: Optional[jax.Array] = None,
  softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None, block: int = 64,
) -> Attended:
  """Returns attention by blocks of `block` query rows, each over its reachable keys only.

  The blocks are unrolled in the program, so every shape is static. Grouped heads share
  their keys as extra query rows; see `interface.Attention` for the rest.
  """
  check_operands(
    q_BLHE, k_BMKE, v_BMKE, segment_ids_BL, key_segment_ids_BM, alibi_slopes_H
  )
  (B, L, H, E), (M, K) = q_BLHE.shape, k_BMKE.shape[1:3]
  q_BKGLE = q_BLHE.reshape(B, L, K, H // K, E).transpose(0, 2, 3, 1, 4)
  k_BKME, v_BKME = k_BMKE.transpose(0, 2, 1, 3), v_BMKE.transpose(0, 2, 1, 3)
  if key_segment_ids_BM is None:
    key_segment_ids_BM = segment_ids_BL
  slopes_KG = None
  if alibi_slopes_H is not None:
    slopes_KG = alibi_slopes_H.astype(np.float32).reshape(K, H // K)
  outs = []
  for start in range(0, L, block):
    rows = slice(start, min(start + block, L))
    low, high = mask.reach(rows.start, rows.stop, M)
    low = min(low, M - 1)
    keys = slice(low, max(high, low + 1))
    segments = (None, None)
    if segment_ids_BL is not None and key_segment_ids_BM is not None:
      segments = (segment_ids_BL[:, rows], key_segment_ids_BM[:, keys])
    queries_L1 = np.arange(rows.start, rows.stop)[:, None] + mask.q_offset
    bias, seen_BL = _bias(queries_L1, np.arange(keys.start, keys.stop), mask, slopes_KG, *segments)
    outs.append(
      _attend_rows(
        q_BKGLE[:, :, :, rows], k_BKME[:, :, keys], v_BKME[:, :, keys], bias, seen_BL, scale,
        softcap,
      )
    )
  out_BKGLE, lse_BKGL = (jnp.concatenate(parts, axis=3) for parts in zip(*outs))
  out_BLHE = out_BKGLE.transpose(0, 3, 1, 2, 4).reshape(B, L, H, E).astype(q_BLHE.dtype)
  return Attended(out_BLHE, lse_BKGL.reshape(B, H, L))
