"""Owns the layers of a block: norms, feed-forwards, embeddings, attention projections.

Parameters are float32 and carry logical axis names; they are cast to the dtype of the
activations where they are used.
"""

from typing import Callable, Optional, Sequence

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from models import axes
from models.config import ModelConfig
from models.products import transposed_product
from models.spread import Spread

Constrain = Callable[[jax.Array, tuple[Optional[str], ...]], jax.Array]


def parameter(value: jax.Array, names: Sequence[Optional[str]]) -> nnx.Param:
  """Returns a parameter tagged with one logical axis name per dimension."""
  return nnx.Param(value, out_sharding=tuple(names))


def normal(
  rngs: nnx.Rngs, shape: tuple[int, ...], fan_in: int, config: ModelConfig, depth_scaled: bool
) -> jax.Array:
  """Returns fresh float32 weights.

  The standard deviation is `init_std`, or 1 / sqrt(fan_in) when that is 0; projections
  back into the residual stream are divided by sqrt(2 * n_layers) (GPT-2, section 2.3).
  """
  std = config.init_std or fan_in**-0.5
  if depth_scaled:
    std /= (2 * config.n_layers) ** 0.5
  return std * jax.random.normal(rngs.params(), shape, jnp.float32)


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns x [..., D] times a matrix [D, F]."""
  return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (0,)), ((), ())))


@jax.custom_vjp
def _contracted(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns x [..., D] times a matrix [D, F].

  The gradient is spelled out for the sake of `transposed_product`; that of autodiff costs
  a fifth of a step on CPU.
  """
  return _dot(x, weight)


def _contracted_forward(x: jax.Array, weight: jax.Array):
  """Returns the product and its operands; the bare dot is what a remat policy sees."""
  return _dot(x, weight), (x, weight)


def _contracted_backward(operands, g: jax.Array):
  """Returns the gradients of both operands."""
  x, weight = operands
  d_x = jax.lax.dot_general(g, weight, (((g.ndim - 1,), (1,)), ((), ())))
  x_TD, g_TF = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
  return d_x, transposed_product(x_TD, g_TF)


_contracted.defvjp(_contracted_forward, _contracted_backward)


def linear(x: jax.Array, weight: jax.Array) -> jax.Array:
  """Returns x [..., D] times a matrix [D, F], in the dtype of x."""
  return _contracted(x, weight.astype(x.dtype))


def rms_normalized(
  x: jax.Array, eps: float, axis: int | tuple[int, ...] = -1, spread: Spread = Spread()
) -> jax.Array:
  """Returns x over its root mean square along `axis`, float32 (Zhang & Sennrich 2019).

  The mean goes over all parts that a group of devices holds.
  """
  x = x.astype(jnp.float32)
  mean = spread.total(jnp.mean(x * x, axis=axis, keepdims=True)) / spread.size
  return x * jax.lax.rsqrt(mean + eps)


class RMSNorm(nnx.Module):
  """Root-mean-square norm with a scale over the last dimensions, all normalized together."""

  def __init__(self, shape: tuple[int, ...], names: Sequence[Optional[str]], eps: float):
    self.scale = parameter(jnp.ones(shape, jnp.float32), names)
    self.eps = eps
    self.axis = tuple(range(-len(shape), 0))

  def __call__(self, x: jax.Array, spread: Spread = Spread()) -> jax.Array:
    normalized = rms_normalized(x, self.eps, self.axis, spread)
    return (normalized * self.scale[...]).astype(x.dtype)


class LayerNorm(nnx.Module):
  """Layer norm with scale and bias over the last dimension (Ba et al. 2016)."""

  def __init__(self, shape: tuple[int, ...], names: Sequence[Optional[str]], eps: float):
    self.scale = parameter(jnp.ones(shape, jnp.float32), names)
    self.bias = parameter(jnp.zeros(shape, jnp.float32), names)
    self.eps = eps

  def __call__(self, x: jax.Array) -> jax.Array:
    centered = x.astype(jnp.float32)
    centered = centered - jnp.mean(centered, axis=-1, keepdims=True)
    variance = jnp.mean(centered * centered, axis=-1, keepdims=True)
    normalized = centered * jax.lax.rsqrt(variance + self.eps)
    return (normalized * self.scale[...] + self.bias[...]).astype(x.dtype)


NORMS = {'rmsnorm': RMSNorm, 'layernorm': LayerNorm}


def model_norm(config: ModelConfig) -> RMSNorm | LayerNorm:
  """Returns a fresh norm of the residual stream."""
  return NORMS[config.norm]((config.d_model,), (axes.EMBED,), config.norm_eps)


class XIELU(nnx.Module):
  """The xIELU activation with two learned curvatures (Huang & Schlag 2024, eq. 7)."""

  BETA = 0.5
  EPS = -1e-6
  INITIAL = 0.8  # of both alpha_p and alpha_n

  def __init__(self):
    self.alpha_p = parameter(jnp.log(jnp.expm1(jnp.full((1,), self.INITIAL))), (None,))
    initial_n = self.INITIAL - self.BETA
    self.alpha_n = parameter(jnp.log(jnp.expm1(jnp.full((1,), initial_n))), (None,))

  def __call__(self, x: jax.Array) -> jax.Array:
    x32 = x.astype(jnp.float32)
    alpha_p = jax.nn.softplus(self.alpha_p[...])
    alpha_n = self.BETA + jax.nn.softplus(self.alpha_n[...])
    positive = alpha_p * x32 * x32
    negative = alpha_n * (jnp.expm1(jnp.minimum(x32, self.EPS)) - x32)
    return (jnp.where(x32 > 0, positive, negative) + self.BETA * x32).astype(x.dtype)


def tanh_gelu(x: jax.Array) -> jax.Array:
  """Returns the tanh approximation of gelu (Hendrycks & Gimpel 2016)."""
  return jax.nn.gelu(x, approximate=True)


def exact_gelu(x: jax.Array) -> jax.Array:
  """Returns x times the normal distribution function of x."""
  return jax.nn.gelu(x, approximate=False)


TABLE_AXES = (axes.VOCAB, axes.EMBED_ACT)  # of an embedding where it is used

GATED = {'swiglu': jax.nn.silu, 'geglu': tanh_gelu}
PLAIN = {'gelu': exact_gelu, 'gelu_tanh': tanh_gelu}


class MLP(nnx.Module):
  """Feed-forward: down(act(gate x) * up x) when gated, down(act(up x)) otherwise."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, F = config.d_model, config.d_ff
    if config.mlp in GATED:
      gate_DF = normal(rngs, (D, F), D, config, depth_scaled=False)
      self.gate = parameter(gate_DF, (axes.EMBED, axes.MLP))
    self.up = parameter(normal(rngs, (D, F), D, config, False), (axes.EMBED, axes.MLP))
    self.down = parameter(normal(rngs, (F, D), F, config, True), (axes.MLP, axes.EMBED))
    if config.mlp_bias:
      if config.mlp in GATED:
        self.gate_bias = parameter(jnp.zeros((F,), jnp.float32), (axes.MLP,))
      self.up_bias = parameter(jnp.zeros((F,), jnp.float32), (axes.MLP,))
      self.down_bias = parameter(jnp.zeros((D,), jnp.float32), (axes.EMBED,))
    if config.mlp == 'xielu':
      self.xielu = XIELU()
    self.kind = config.mlp
    self.biased = config.mlp_bias

  def _hidden(self, x_BLD: jax.Array, name: str) -> jax.Array:
    """Returns x through the projection `name` and its bias, [B, L, F]."""
    hidden_BLF = linear(x_BLD, getattr(self, name)[...])
    if self.biased:
      hidden_BLF += getattr(self, f'{name}_bias')[...].astype(x_BLD.dtype)
    return hidden_BLF

  def __call__(
    self, x_BlD: jax.Array, constrain: Constrain, spread: Spread = Spread()
  ) -> jax.Array:
    x_BLD = spread.whole(x_BlD)
    hidden_BLF = self._hidden(x_BLD, 'up')
    if self.kind in GATED:
      hidden_BLF = GATED[self.kind](self._hidden(x_BLD, 'gate')) * hidden_BLF
    else:
      activation = self.xielu if self.kind == 'xielu' else PLAIN[self.kind]
      hidden_BLF = activation(hidden_BLF)
    hidden_BLF = constrain(hidden_BLF, (axes.BATCH, axes.LENGTH, axes.MLP_ACT))
    out_BlD = spread.summed(linear(hidden_BLF, self.down[...]))
    if self.biased:
      out_BlD += self.down_bias[...].astype(x_BLD.dtype)
    return out_BlD


class AttentionProjections(nnx.Module):
  """Query, key, value and output projections, with their biases and QK-norms."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    D, H, K, E = config.d_model, config.n_heads, config.n_kv_heads, config.d_head
    q_names = (axes.EMBED, axes.HEADS, axes.HEAD)
    kv_names = (axes.EMBED, axes.KV_HEADS, axes.HEAD)
    self.q = parameter(normal(rngs, (D, H, E), D, config, False), q_names)
    self.k = parameter(normal(rngs, (D, K, E), D, config, False), kv_names)
    self.v = parameter(normal(rngs, (D, K, E), D, config, False), kv_names)
    o_HED = normal(rngs, (H, E, D), H * E, config, True)
    self.o = parameter(o_HED, (axes.HEADS, axes.HEAD, axes.EMBED))
    if config.qkv_bias:
      self.q_bias = parameter(jnp.zeros((H, E), jnp.float32), q_names[1:])
      self.k_bias = parameter(jnp.zeros((K, E), jnp.float32), kv_names[1:])
      self.v_bias = parameter(jnp.zeros((K, E), jnp.float32), kv_names[1:])
    if config.out_bias:
      self.o_bias = parameter(jnp.zeros((D,), jnp.float32), (axes.EMBED,))
    if config.qk_norm == 'head':
      self.q_norm = RMSNorm((E,), (axes.HEAD,), config.norm_eps)
      self.k_norm = RMSNorm((E,), (axes.HEAD,), config.norm_eps)
    elif config.qk_norm == 'projection':
      self.q_norm = RMSNorm((H, E), q_names[1:], config.norm_eps)
      self.k_norm = RMSNorm((K, E), kv_names[1:], config.norm_eps)
    self.biased = config.qkv_bias
    self.out_biased = config.out_bias
    self.normed = config.qk_norm != 'none'
    self.norms_heads_together = config.qk_norm == 'projection'

  def _heads(self, x_BLD: jax.Array, name: str) -> jax.Array:
    """Returns x through the projection `name`, [B, L, heads, E]."""
    weight_DHE = getattr(self, name)[...]
    D, H, E = weight_DHE.shape
    heads_BLHE = linear(x_BLD, weight_DHE.reshape(D, H * E)).reshape(*x_BLD.shape[:2], H, E)
    if self.biased:
      heads_BLHE += getattr(self, f'{name}_bias')[...].astype(x_BLD.dtype)
    return heads_BLHE

  def project(
    self, x_BlD: jax.Array, spread: Spread = Spread()
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns queries [B, L, H, E], keys and values [B, L, K, E], normed, not rotated."""
    x_BLD = spread.whole(x_BlD)
    q_BLHE, k_BLKE = self._heads(x_BLD, 'q'), self._heads(x_BLD, 'k')
    if self.normed:
      heads = spread if self.norms_heads_together else Spread()
      q_BLHE, k_BLKE = self.q_norm(q_BLHE, heads), self.k_norm(k_BLKE, heads)
    return q_BLHE, k_BLKE, self._heads(x_BLD, 'v')

  def output(self, x_BLHE: jax.Array, spread: Spread = Spread()) -> jax.Array:
    """Returns the attention output back in the residual stream, [B, l, D]."""
    B, L, H, E = x_BLHE.shape
    out_BLD = linear(x_BLHE.reshape(B, L, H * E), self.o[...].reshape(H * E, -1))
    out_BlD = spread.summed(out_BLD)
    if self.out_biased:
      out_BlD += self.o_bias[...].astype(x_BLHE.dtype)
    return out_BlD


def _rows(table_VD: jax.Array, tokens_BL: jax.Array, spread: Spread) -> jax.Array:
  """Returns rows of a table [B, L, D], zero for tokens that another device holds."""
  if spread.size == 1:
    return table_VD[tokens_BL]
  V = table_VD.shape[0]
  rows_BL = tokens_BL - spread.rank() * V
  held_BL = (rows_BL >= 0) & (rows_BL < V)
  return jnp.where(held_BL[..., None], table_VD[jnp.clip(rows_BL, 0, V - 1)], 0)


class Embedding(nnx.Module):
  """Token embedding [V, D], learned positions, and the output embedding when free."""

  def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
    V, D = config.vocab_size, config.d_model
    tokens_VD = normal(rngs, (V, D), D, config, False)
    self.tokens = parameter(tokens_VD, (axes.VOCAB, axes.EMBED))
    if config.positions == 'learned':
      positions_PD = normal(rngs, (config.context_length, D), D, config, False)
      self.positions = parameter(positions_PD, (axes.POSITIONS, axes.EMBED))
    if not config.tie_embeddings:
      output_VD = normal(rngs, (V, D), D, config, False)
      self.output = parameter(output_VD, (axes.VOCAB, axes.EMBED))
    self.learned_positions = config.positions == 'learned'
    self.tied = config.tie_embeddings
    self.factor = config.d_model**0.5 if config.scale_embeddings else 1.0
    self.dtype = np.dtype(jnp.dtype(config.compute_dtype))

  def __call__(
    self, tokens_BL: jax.Array, positions: jax.Array, constrain: Constrain,
    spread: Spread = Spread(),
  ) -> jax.Array:
    """Returns embedded tokens [B, l, D]; positions are [L] or [B, L]."""
    table_VD = constrain(self.tokens[...].astype(self.dtype), TABLE_AXES)
    x_BlD = spread.summed(_rows(table_VD, tokens_BL, spread))
    if self.factor != 1.0:
      x_BlD *= jnp.asarray(self.factor, self.dtype)
    if self.learned_positions:
      x_BlD += self.positions[...].astype(self.dtype)[spread.own(positions)]
    return x_BlD

  def unembedding_VD(self) -> jax.Array:
    """Returns the output embedding, float32 [V, D]."""
    return self.tokens[...] if self.tied else self.output[...]
