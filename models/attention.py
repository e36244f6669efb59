"""Owns causal attention on arrays: dense, in blocks of queries, and over a shared prefix.

`dense_attention` and `block_attention` have one signature. A key is visible to a query
when it stands at or before it in the sequence, within the window, in the same segment;
segment 0 is padding: it sees nothing and its output is 0. Softmax is in float32.
"""

import functools
from typing import Optional, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.products import transposed_product

HIDDEN = -1e30  # logit of an invisible key; finite, so that a row without keys has no NaN
MAX_AUTO_BLOCKS = 16  # blocks are unrolled: their number bounds the size of the program


class Attend(Protocol):
  """Attention over projected heads.

  Takes queries [B, L, H, E], keys and values [B, M, K, E]; returns [B, L, H, E] in the
  dtype of the queries. Query i stands at key index i + q_offset. `segment_ids_BL` None
  means one segment without padding; `key_segment_ids_BM` None means those of the queries.
  Window 0 and softcap 0 mean none. Slopes are ALiBi's, logits fall by slope * distance.
  """

  def __call__(
    self, q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array, *, scale: float,
    segment_ids_BL: Optional[jax.Array] = None, key_segment_ids_BM: Optional[jax.Array] = None,
    window: int = 0, softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None,
    q_offset: int = 0,
  ) -> jax.Array: ...


def softcapped(logits: jax.Array, softcap: float) -> jax.Array:
  """Returns softcap * tanh(logits / softcap), or the logits when softcap is 0."""
  return softcap * jnp.tanh(logits / softcap) if softcap else logits


def _visible(
  queries_L: np.ndarray, keys_M: np.ndarray, window: int,
  segment_ids_BL: Optional[jax.Array], key_segment_ids_BM: Optional[jax.Array],
) -> np.ndarray | jax.Array:
  """Returns which keys each query sees, bool [1 or B, L, M], from indices and segments."""
  distance_LM = queries_L[:, None] - keys_M[None, :]
  visible_LM = distance_LM >= 0
  if window:
    visible_LM &= distance_LM < window
  if segment_ids_BL is None or key_segment_ids_BM is None:
    return visible_LM[None]
  same_BLM = segment_ids_BL[:, :, None] == key_segment_ids_BM[:, None, :]
  return visible_LM[None] & same_BLM & (key_segment_ids_BM != 0)[:, None, :]


def _alibi_bias(
  queries_L: np.ndarray, keys_M: np.ndarray, slopes_H: np.ndarray, n_kv_heads: int
) -> np.ndarray:
  """Returns the ALiBi term of the logits, float32 [K, G, L, M]."""
  slopes_KG = np.asarray(slopes_H, np.float32).reshape(n_kv_heads, -1)
  distance_LM = (queries_L[:, None] - keys_M[None, :]).astype(np.float32)
  return -slopes_KG[:, :, None, None] * distance_LM


def dense_attention(
  q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array, *, scale: float,
  segment_ids_BL: Optional[jax.Array] = None, key_segment_ids_BM: Optional[jax.Array] = None,
  window: int = 0, softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None,
  q_offset: int = 0,
) -> jax.Array:
  """Returns attention computed over all pairs of positions at once; see `Attend`."""
  B, L, H, E = q_BLHE.shape
  M, K = k_BMKE.shape[1:3]
  q_BLKGE = q_BLHE.reshape(B, L, K, H // K, E)
  logits_BKGLM = jnp.einsum(
    'blkge,bmke->bkglm', q_BLKGE, k_BMKE, preferred_element_type=jnp.float32
  )
  logits_BKGLM = softcapped(logits_BKGLM * scale, softcap)
  queries_L, keys_M = np.arange(L) + q_offset, np.arange(M)
  if alibi_slopes_H is not None:
    logits_BKGLM += _alibi_bias(queries_L, keys_M, alibi_slopes_H, K)
  if key_segment_ids_BM is None:
    key_segment_ids_BM = segment_ids_BL
  visible_BLM = _visible(queries_L, keys_M, window, segment_ids_BL, key_segment_ids_BM)
  weights_BKGLM = jax.nn.softmax(
    jnp.where(visible_BLM[:, None, None], logits_BKGLM, HIDDEN), axis=-1
  )
  out_BLKGE = jnp.einsum('bkglm,bmke->blkge', weights_BKGLM.astype(v_BMKE.dtype), v_BMKE)
  seen_BL = jnp.asarray(visible_BLM.any(-1))[:, :, None, None]
  return jnp.where(seen_BL, out_BLKGE.reshape(B, L, H, E), 0).astype(q_BLHE.dtype)


def _reachable_keys(start: int, stop: int, n_keys: int, window: int) -> slice:
  """Returns the keys that queries at key indices start..stop-1 can see before segments."""
  first = max(0, start - window + 1) if window else 0
  return slice(first, max(min(stop, n_keys), first + 1))


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
  """Returns softmax(logits) times the values, and what backward needs.

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
  return out_BKRE, (weights_BKRM, total_BKR1, out_BKRE, v_BKME)


@jax.custom_vjp
def _weighted(logits_BKRM: jax.Array, v_BKME: jax.Array) -> jax.Array:
  """Returns softmax(logits) times the values, float32 [B, K, R, E]."""
  return _weighted_forward(logits_BKRM, v_BKME)[0]


def _weighted_backward(residuals, g_BKRE: jax.Array):
  """Returns the gradients of logits and values (Dao et al. 2022, appendix B.2).

  A logit that is hidden by a large negative bias has weight 0, so its gradient is 0 too.
  """
  weights_BKRM, total_BKR1, out_BKRE, v_BKME = residuals
  g_BKRE = g_BKRE / total_BKR1
  inner_BKR1 = jnp.sum(g_BKRE * out_BKRE, axis=-1, keepdims=True)
  g_BKRE = g_BKRE.astype(v_BKME.dtype)
  d_weights_BKRM = jnp.einsum(
    'bkre,bkme->bkrm', g_BKRE, v_BKME, preferred_element_type=jnp.float32
  )
  d_logits_BKRM = weights_BKRM * (d_weights_BKRM - inner_BKR1)
  return d_logits_BKRM, transposed_product(weights_BKRM, g_BKRE)


_weighted.defvjp(_weighted_forward, _weighted_backward)


def _attend_rows(
  q_BKGLE: jax.Array, k_BKME: jax.Array, v_BKME: jax.Array, visible_BLM, bias_KGLM,
  scale: float, softcap: float,
) -> jax.Array:
  """Returns attention of some query rows over the keys given, [B, K, G, L, E]."""
  B, K, G, L, E = q_BKGLE.shape
  scores = _scores(q_BKGLE.reshape(B, K, G * L, E), k_BKME).reshape(B, K, G, L, -1)
  logits_BKGLM = softcapped(scores * scale, softcap)
  if bias_KGLM is not None:
    logits_BKGLM += bias_KGLM
  where = np.where if isinstance(visible_BLM, np.ndarray) else jnp.where
  hidden_BLM = where(visible_BLM, np.float32(0), np.float32(HIDDEN))
  logits_BKGLM += hidden_BLM[:, None, None]  # added, not selected: backward needs no mask
  out_BKRE = _weighted(logits_BKGLM.reshape(B, K, G * L, -1), v_BKME)
  out_BKGLE = out_BKRE.reshape(B, K, G, L, E)
  if isinstance(visible_BLM, np.ndarray) and visible_BLM.any(-1).all():
    return out_BKGLE
  return jnp.where(visible_BLM.any(-1)[:, None, None, :, None], out_BKGLE, 0)


def block_attention(
  q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array, *, scale: float,
  segment_ids_BL: Optional[jax.Array] = None, key_segment_ids_BM: Optional[jax.Array] = None,
  window: int = 0, softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None,
  q_offset: int = 0, block: int = 128,
) -> jax.Array:
  """Returns attention by blocks of `block` query rows, each over its reachable keys only.

  The blocks are unrolled in the program, so every shape is static. Grouped heads share
  their keys as extra query rows; see `Attend` for the rest.
  """
  B, L, H, E = q_BLHE.shape
  M, K = k_BMKE.shape[1:3]
  q_BKGLE = q_BLHE.reshape(B, L, K, H // K, E).transpose(0, 2, 3, 1, 4)
  k_BKME, v_BKME = k_BMKE.transpose(0, 2, 1, 3), v_BMKE.transpose(0, 2, 1, 3)
  if key_segment_ids_BM is None:
    key_segment_ids_BM = segment_ids_BL
  outs = []
  for start in range(0, L, block):
    rows = slice(start, min(start + block, L))
    keys = _reachable_keys(start + q_offset, rows.stop + q_offset, M, window)
    queries_L, keys_M = np.arange(rows.start, rows.stop) + q_offset, np.arange(M)[keys]
    segments = (None, None)
    if segment_ids_BL is not None and key_segment_ids_BM is not None:
      segments = (segment_ids_BL[:, rows], key_segment_ids_BM[:, keys])
    bias_KGLM = None
    if alibi_slopes_H is not None:
      bias_KGLM = _alibi_bias(queries_L, keys_M, alibi_slopes_H, K)
    visible_BLM = _visible(queries_L, keys_M, window, *segments)
    outs.append(
      _attend_rows(
        q_BKGLE[:, :, :, rows], k_BKME[:, :, keys], v_BKME[:, :, keys], visible_BLM,
        bias_KGLM, scale, softcap,
      )
    )
  out_BKGLE = jnp.concatenate(outs, axis=3) if len(outs) > 1 else outs[0]
  return out_BKGLE.transpose(0, 3, 1, 2, 4).reshape(B, L, H, E).astype(q_BLHE.dtype)


def _auto_attention(config: ModelConfig) -> Attend:
  """Returns block attention whose blocks grow with the length, so that they stay few."""

  def attend(q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array, **options) -> jax.Array:
    block = max(config.attention_block, -(-q_BLHE.shape[1] // MAX_AUTO_BLOCKS))
    return block_attention(q_BLHE, k_BMKE, v_BMKE, block=block, **options)

  return attend


ATTENTIONS = {
  'dense': lambda config: dense_attention,
  'blocks': lambda config: functools.partial(block_attention, block=config.attention_block),
  'auto': _auto_attention,
}


def configured_attention(config: ModelConfig) -> Attend:
  """Returns the attention function that `config.attention` names."""
  return ATTENTIONS[config.attention](config)


def _prefix_visible(
  prefix_lengths_C: jax.Array, n_prefix: int, n_steps: int, window: int
) -> tuple[jax.Array, jax.Array]:
  """Returns how far row token s stands after prefix key p, [C, S, P], and if it sees it."""
  positions_CS = prefix_lengths_C[:, None] + np.arange(n_steps)
  distance_CSP = positions_CS[:, :, None] - np.arange(n_prefix)
  visible_CSP = np.arange(n_prefix) < prefix_lengths_C[:, None, None]
  if window:
    visible_CSP &= distance_CSP < window
  return distance_CSP, visible_CSP


def _two_part_softmax(
  far: jax.Array, near: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns unnormalized weights of both parts and their common total [..., 1]."""
  top = jnp.maximum(jnp.max(far, -1, keepdims=True), jnp.max(near, -1, keepdims=True))
  far, near = jnp.exp(far - top), jnp.exp(near - top)
  return far, near, jnp.sum(far, -1, keepdims=True) + jnp.sum(near, -1, keepdims=True)


def prefix_attention(
  q_BSHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, k_CPKE: jax.Array,
  v_CPKE: jax.Array, prefix_lengths_C: jax.Array, *, scale: float, window: int = 0,
  softcap: float = 0.0, alibi_slopes_H: Optional[np.ndarray] = None,
) -> jax.Array:
  """Returns attention of rows that share a prefix with other rows, [B, S, H, E].

  Rows [B, S] come in groups of I = B / C consecutive ones per context. Token s of a row
  stands at position prefix_length + s; it sees its context's first prefix_length keys
  [C, P] and its own row causally, in one softmax. The prefix is never repeated: the rows
  of a context are the rows of one matrix product.
  """
  B, S, H, E = q_BSHE.shape
  C, P, K = k_CPKE.shape[:3]
  I, G = B // C, H // K
  q_CKIGSE = q_BSHE.reshape(C, I, S, K, G, E).transpose(0, 3, 1, 4, 2, 5)
  k_CKISE = k_BSKE.reshape(C, I, S, K, E).transpose(0, 3, 1, 2, 4)
  v_CKISE = v_BSKE.reshape(C, I, S, K, E).transpose(0, 3, 1, 2, 4)
  q_CKRE, f32 = q_CKIGSE.reshape(C, K, I * G * S, E), jnp.float32
  far = jnp.einsum('ckre,cpke->ckrp', q_CKRE, k_CPKE, preferred_element_type=f32)
  near = jnp.einsum('ckigse,ckite->ckigst', q_CKIGSE, k_CKISE, preferred_element_type=f32)
  far_CKIGSP = softcapped(far.reshape(C, K, I, G, S, P) * scale, softcap)
  near_CKIGST = softcapped(near * scale, softcap)
  distance_CSP, visible_CSP = _prefix_visible(prefix_lengths_C, P, S, window)
  if alibi_slopes_H is not None:
    slopes_KG11 = np.asarray(alibi_slopes_H, np.float32).reshape(K, G, 1, 1)
    far_CKIGSP -= (slopes_KG11 * distance_CSP[:, None, None])[:, :, None]
    near_CKIGST += _alibi_bias(np.arange(S), np.arange(S), alibi_slopes_H, K)[:, None]
  far_CKIGSP = jnp.where(visible_CSP[:, None, None, None], far_CKIGSP, HIDDEN)
  causal_ST = _visible(np.arange(S), np.arange(S), window, None, None)[0]
  near_CKIGST = jnp.where(causal_ST, near_CKIGST, HIDDEN)
  far_CKIGSP, near_CKIGST, total = _two_part_softmax(far_CKIGSP, near_CKIGST)
  far_CKRP = far_CKIGSP.reshape(C, K, I * G * S, P).astype(v_CPKE.dtype)
  out = jnp.einsum('ckrp,cpke->ckre', far_CKRP, v_CPKE, preferred_element_type=f32)
  out_CKIGSE = out.reshape(C, K, I, G, S, E) + jnp.einsum(
    'ckigst,ckite->ckigse', near_CKIGST.astype(v_BSKE.dtype), v_CKISE,
    preferred_element_type=f32,
  )
  out_BSHE = (out_CKIGSE / total).transpose(0, 2, 4, 1, 3, 5).reshape(B, S, H, E)
  return out_BSHE.astype(q_BSHE.dtype)
