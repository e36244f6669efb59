"""Owns which attention a model runs, and attention over a shared prefix or a cache."""

from typing import Optional

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.kernels import (
  blockwise, decode_gpu, decode_tpu, decode_xla, flash_gpu, flash_tpu, oracle, unrolled,
)
from models.kernels.decoding import Cache, DecodeAttention, merged, of_layer
from models.kernels.interface import HIDDEN, Attended, Attention, Mask, softcapped

UNROLLED_LENGTH = 512  # at 1,024 blockwise is ahead (NOTEBOOK.md)
MAX_UNROLLED = 16  # blocks are unrolled: their number bounds the size of the program


def hardware(device: jax.Device) -> str:
  """Returns what kernels are chosen by: 'cpu', 'tpu', 'hopper' or, for other GPUs, 'gpu'."""
  if device.platform == 'gpu' and str(device.compute_capability) == '9.0':
    return 'hopper'
  return device.platform


def check_attention(config: ModelConfig, hardware: str) -> None:
  """Raises ValueError where the kernels that `config.attention` names do not fit the model.

  Those of XLA fit all.
  """
  kernels = {'flash_tpu': ('tpu', flash_tpu), 'flash_gpu': ('hopper', flash_gpu)}
  if config.attention not in kernels:
    return
  needed, module = kernels[config.attention]
  problem = None
  if hardware != needed:
    problem = f'is for {needed} devices, these are {hardware}'
  elif not module.takes_width(config.d_head):
    problem = f'takes no heads of width {config.d_head}'
  elif config.attention == 'flash_gpu' and config.compute_dtype != 'bfloat16':
    problem = f'takes model.compute_dtype=bfloat16, not {config.compute_dtype}'
  if problem:
    raise ValueError(f"model.attention={config.attention} {problem}; 'auto' or 'blockwise' works")


def choose_attention(config: ModelConfig, hardware: str, length: int) -> tuple[str, str]:
  """Returns the name of the attention for rows of `length` on a kind of hardware, and why.

  The name is that of `config.attention` unless it is 'auto'.
  """
  linear = 'plain XLA with memory linear in the length'
  if config.attention != 'auto':
    return config.attention, 'model.attention names it'
  if hardware == 'tpu' and flash_tpu.takes_width(config.d_head):
    return 'flash_tpu', 'the devices are TPUs'
  if hardware == 'hopper' and flash_gpu.takes_width(config.d_head):
    if config.compute_dtype == 'bfloat16':
      return 'flash_gpu', 'the devices are Hopper GPUs, the model computes in bfloat16'
    return 'blockwise', f"{linear}; Hopper's kernels take model.compute_dtype=bfloat16 only"
  if hardware == 'cpu' and length <= UNROLLED_LENGTH:
    return 'unrolled', f'rows of at most {UNROLLED_LENGTH} on CPU: the fastest, weights are kept'
  return 'blockwise', linear


def configured_attention(config: ModelConfig) -> Attention:
  """Returns the attention that `config.attention` names."""
  kernels = {
    'oracle': oracle.attention, 'flash_tpu': flash_tpu.attention,
    'flash_gpu': flash_gpu.attention, 'blockwise': blockwise.attention,
  }

  def attend(q_BLHE: jax.Array, k_BMKE: jax.Array, v_BMKE: jax.Array, **options) -> Attended:
    length = q_BLHE.shape[1]
    name, _ = choose_attention(config, hardware(jax.devices()[0]), length)
    if name == 'unrolled':
      block = max(config.attention_block, -(-length // MAX_UNROLLED))
      return unrolled.attention(q_BLHE, k_BMKE, v_BMKE, block=block, **options)
    return kernels[name](q_BLHE, k_BMKE, v_BMKE, **options)

  return attend


DECODE_KERNELS = {'tpu': decode_tpu, 'gpu': decode_gpu}  # by platform


def choose_decode_attention(config: ModelConfig, platform: str) -> tuple[str, str]:
  """Returns the name of the attention of single tokens over a cache on a platform, and why."""
  kernels = DECODE_KERNELS.get(platform)
  if kernels is None:
    return 'decode_xla', f'plain XLA, there is no kernel for {platform}'
  if not kernels.takes_width(config.d_head):
    return 'decode_xla', f'plain XLA, the kernels take no heads of width {config.d_head}'
  return f'decode_{platform}', f'the devices are {platform.upper()}s'


def configured_decode_attention(config: ModelConfig, platform: str) -> DecodeAttention:
  """Returns the attention of single tokens over a cache for a platform."""
  name, _ = choose_decode_attention(config, platform)
  return decode_xla.attention if name == 'decode_xla' else DECODE_KERNELS[platform].attention


def cached_attention(
  attend: DecodeAttention, q_B1HE: jax.Array, k_B1KE: jax.Array, v_B1KE: jax.Array, cache: Cache,
  layer: int | jax.Array, *, scale: float, window: int = 0, softcap: float = 0.0,
  alibi_slopes_H: Optional[np.ndarray] = None,
) -> jax.Array:
  """Returns attention of the token after each row of a cache, [B, 1, H, E].

  It sees the cache, which `attend` reads, and itself. Its own key joins by log-sum-exp, so
  the cache stays as it is and all layers' keys can be written at once.
  """
  (B, _, H, E), K = q_B1HE.shape, k_B1KE.shape[2]
  far = attend(
    q_B1HE[:, 0], *of_layer(cache, layer), scale=scale, window=window, softcap=softcap,
    alibi_slopes_H=alibi_slopes_H, ahead=1,
  )
  q_BKGE = q_B1HE.reshape(B, K, H // K, E)
  own = jnp.einsum('bkge,bke->bkg', q_BKGE, k_B1KE[:, 0], preferred_element_type=jnp.float32)
  own_BH = softcapped(own.reshape(B, H) * scale, softcap)
  v_BHE = jnp.broadcast_to(v_B1KE.reshape(B, K, 1, E), q_BKGE.shape).reshape(B, H, E)
  out_BHE, _ = merged(jnp.stack([far.out_BHE, v_BHE]), jnp.stack([far.lse_BH, own_BH]))
  return out_BHE[:, None].astype(q_B1HE.dtype)


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
    near_CKIGST -= (slopes_KG11 * (np.arange(S)[:, None] - np.arange(S)))[:, None]
  far_CKIGSP = jnp.where(visible_CSP[:, None, None, None], far_CKIGSP, HIDDEN)
  causal_ST = Mask(window=window).visible(np.arange(S)[:, None], np.arange(S))
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
