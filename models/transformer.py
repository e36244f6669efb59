"""Owns the decoder: blocks, the stack that runs them, and its pure functions.

Layers are stacked on a leading axis. Training works on the plain dict of `init`:

  graphdef = build(config)
  params = jax.jit(init, static_argnums=0)(config, seed)
  hidden_BLD, aux = apply(graphdef, params)(tokens_BL, segment_ids_BL, positions_BL)
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Optional

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from models import axes
from models.attention import configured_attention, prefix_attention
from models.config import ModelConfig
from models.kernels.interface import Attention, Mask, softcapped
from models.layers import MLP, AttentionProjections, Constrain, Embedding, model_norm
from models.moe import AuxLosses, ExpertDispatch, MoE, ragged_dispatch
from models.positions import alibi_slopes, rope_tables, rotate
from models.stack import RunLayers, run_layers

HIDDEN_AXES = (axes.BATCH, axes.LENGTH, axes.EMBED_ACT)


def unconstrained(x: jax.Array, names: tuple[Optional[str], ...]) -> jax.Array:
  """Returns x; the default of the `constrain` seam."""
  del names
  return x


@dataclasses.dataclass(frozen=True)
class Seams:
  """Callables that placement may replace; the defaults compute on one device.

  constrain(x, logical_names) -> x; attend: see `kernels.interface.Attention`, None means
  the one that the config names; run_layers: see `stack.RunLayers`; expert_dispatch: see
  `moe.ExpertDispatch`.
  """

  constrain: Constrain = unconstrained
  attend: Optional[Attention] = None
  run_layers: RunLayers = run_layers
  expert_dispatch: ExpertDispatch = ragged_dispatch


class KV(NamedTuple):
  """Keys and values of a prefix, rotated, of all layers: [N, C, P, K, E]."""

  k_NCPKE: jax.Array
  v_NCPKE: jax.Array


class Context(NamedTuple):
  """What all blocks of one call share."""

  rope: dict[str, tuple[jax.Array, jax.Array]]  # tables by layer kind
  segment_ids_BL: Optional[jax.Array]
  prefix_lengths_C: Optional[jax.Array]


class LayerInput(NamedTuple):
  """What one block takes beside its parameters."""

  prefix: Optional[KV]
  dropout_key: Optional[jax.Array]


def dropped(x: jax.Array, rate: float, key: Optional[jax.Array]) -> jax.Array:
  """Returns x with a share `rate` zeroed and the rest rescaled; x itself without a key."""
  if key is None or rate == 0:
    return x
  keep = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


class Block(nnx.Module):
  """Attention and feed-forward with their norms; the layer kind is given at the call."""

  def __init__(self, config: ModelConfig, seams: Seams, rngs: nnx.Rngs):
    self.attention = AttentionProjections(config, rngs)
    self.mlp = MoE(config, rngs) if config.moe.n_experts else MLP(config, rngs)
    if config.norm_placement in ('pre', 'sandwich'):
      self.attention_norm = model_norm(config)
      self.mlp_norm = model_norm(config)
    if config.norm_placement in ('post', 'sandwich'):
      self.attention_out_norm = model_norm(config)
      self.mlp_out_norm = model_norm(config)
    self.config = config
    self.seams = seams

  def _attend(
    self, x_BLD: jax.Array, kind: str, context: Context, prefix: Optional[KV]
  ) -> tuple[jax.Array, KV]:
    """Returns the attention output [B, L, D] and this layer's keys and values."""
    config, constrain = self.config, self.seams.constrain
    q_BLHE, k_BLKE, v_BLKE = self.attention.project(x_BLD)
    if config.positions == 'rope':
      q_BLHE, k_BLKE = rotate(q_BLHE, *context.rope[kind]), rotate(k_BLKE, *context.rope[kind])
    q_BLHE = constrain(q_BLHE, (axes.BATCH, axes.LENGTH, axes.HEADS_ACT, None))
    k_BLKE = constrain(k_BLKE, (axes.BATCH, axes.LENGTH, axes.KV_HEADS_ACT, None))
    v_BLKE = constrain(v_BLKE, (axes.BATCH, axes.LENGTH, axes.KV_HEADS_ACT, None))
    options: dict[str, Any] = dict(
      scale=config.scale, softcap=config.attention_softcap,
      alibi_slopes_H=alibi_slopes(config.n_heads) if config.positions == 'alibi' else None,
    )
    if prefix is not None:
      out_BLHE = prefix_attention(
        q_BLHE, k_BLKE, v_BLKE, prefix.k_NCPKE, prefix.v_NCPKE, context.prefix_lengths_C,
        window=config.kind_window(kind), **options,
      )
    else:
      attend = self.seams.attend or configured_attention(config)
      out_BLHE = attend(
        q_BLHE, k_BLKE, v_BLKE, mask=Mask(window=config.kind_window(kind)),
        segment_ids_BL=context.segment_ids_BL, **options,
      ).out_BLHE
    out_BLHE = constrain(out_BLHE, (axes.BATCH, axes.LENGTH, axes.HEADS_ACT, None))
    return self.attention.output(out_BLHE), KV(k_BLKE, v_BLKE)

  def _feed_forward(self, x_BLD: jax.Array, context: Context) -> tuple[jax.Array, AuxLosses]:
    """Returns the feed-forward output [B, L, D] and its auxiliary losses."""
    if isinstance(self.mlp, MoE):
      real_BL = None if context.segment_ids_BL is None else context.segment_ids_BL != 0
      return self.mlp(x_BLD, real_BL, self.seams.expert_dispatch)
    return self.mlp(x_BLD, self.seams.constrain), no_aux_losses()

  def _normed(self, name: str, x_BLD: jax.Array) -> jax.Array:
    """Returns x through the norm `name` where the placement has one."""
    return getattr(self, name)(x_BLD) if hasattr(self, name) else x_BLD

  def __call__(
    self, x_BLD: jax.Array, kind: str, context: Context, inputs: LayerInput
  ) -> tuple[jax.Array, AuxLosses, KV]:
    """Returns the next hidden states, the auxiliary losses and the keys and values."""
    rate, keys = self.config.dropout, (None, None)
    if inputs.dropout_key is not None:
      keys = tuple(jax.random.split(inputs.dropout_key))
    attended_BLD, kv = self._attend(
      self._normed('attention_norm', x_BLD), kind, context, inputs.prefix
    )
    attended_BLD = self._normed('attention_out_norm', attended_BLD)
    attended_BLD = dropped(attended_BLD, rate, keys[0])
    between_BLD = x_BLD if self.config.parallel_residual else x_BLD + attended_BLD
    fed_BLD, aux = self._feed_forward(self._normed('mlp_norm', between_BLD), context)
    fed_BLD = dropped(self._normed('mlp_out_norm', fed_BLD), rate, keys[1])
    x_BLD = x_BLD + attended_BLD + fed_BLD
    return self.seams.constrain(x_BLD, HIDDEN_AXES), aux, kv


def no_aux_losses() -> AuxLosses:
  """Returns zero auxiliary losses."""
  return AuxLosses(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))


class Transformer(nnx.Module):
  """Decoder-only transformer from tokens to hidden states and logits."""

  def __init__(
    self, config: ModelConfig, rngs: Optional[nnx.Rngs] = None, seams: Seams = Seams()
  ):
    rngs = nnx.Rngs(0) if rngs is None else rngs

    @nnx.split_rngs(splits=config.n_layers)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: axes.LAYERS})
    def stacked(rngs: nnx.Rngs) -> Block:
      return Block(config, seams, rngs)

    self.embedding = Embedding(config, rngs)
    self.blocks = stacked(rngs)
    self.final_norm = model_norm(config)
    self.config = config
    self.seams = seams

  def _check_length(self, length: int) -> None:
    """Raises ValueError when a sequence is longer than the model's context."""
    if length > self.config.context_length:
      raise ValueError(
        f'sequence of {length} tokens is longer than model.context_length='
        f'{self.config.context_length}; shorten it or raise model.context_length'
      )

  def _run(
    self, tokens_BL: jax.Array, positions: jax.Array, segment_ids_BL: Optional[jax.Array],
    *, dropout_key: Optional[jax.Array] = None, prefix: Optional[KV] = None,
    prefix_lengths_C: Optional[jax.Array] = None, keep_kv: bool = False,
  ) -> tuple[jax.Array, AuxLosses, Optional[KV]]:
    """Returns final hidden states, auxiliary losses and, if kept, all keys and values."""
    config = self.config
    graphdef, params = nnx.split(self.blocks)
    x_BLD = self.seams.constrain(self.embedding(tokens_BL, positions), HIDDEN_AXES)
    layer_keys = None
    if dropout_key is not None and config.dropout:
      embedding_key, blocks_key = jax.random.split(dropout_key)
      x_BLD = dropped(x_BLD, config.dropout, embedding_key)
      layer_keys = jax.random.split(blocks_key, config.n_layers)
    rope = {}
    if config.positions == 'rope':
      rope = {
        kind: rope_tables(
          config.kind_rope(kind), config.d_head, positions, config.context_length
        )
        for kind in sorted(set(config.layer_kinds))
      }
    context = Context(rope, segment_ids_BL, prefix_lengths_C)

    def body(kind: str, carry, inputs):
      x_BLD, aux = carry
      block_params, layer_input = inputs
      x_BLD, layer_aux, kv = nnx.merge(graphdef, block_params)(x_BLD, kind, context, layer_input)
      return (x_BLD, jax.tree.map(jnp.add, aux, layer_aux)), kv if keep_kv else None

    (x_BLD, aux), kv = self.seams.run_layers(
      body, (x_BLD, no_aux_losses()), (params, LayerInput(prefix, layer_keys)), config
    )
    return self.final_norm(x_BLD), aux, kv

  def __call__(
    self, tokens_BL: jax.Array, segment_ids_BL: Optional[jax.Array] = None,
    positions_BL: Optional[jax.Array] = None, *, dropout_key: Optional[jax.Array] = None,
  ) -> tuple[jax.Array, AuxLosses]:
    """Returns final hidden states [B, L, D] in the compute dtype, and auxiliary losses.

    Segment 0 is padding. Positions default to 0..L-1. Dropout acts only with a key.
    Raises ValueError when L exceeds the context length.
    """
    self._check_length(tokens_BL.shape[1])
    positions = np.arange(tokens_BL.shape[1]) if positions_BL is None else positions_BL
    hidden_BLD, aux, _ = self._run(
      tokens_BL, positions, segment_ids_BL, dropout_key=dropout_key
    )
    return hidden_BLD, aux

  def prefix(self, tokens_CP: jax.Array, lengths_C: jax.Array) -> KV:
    """Returns keys and values of contexts right-padded to P tokens, for `with_prefix`."""
    C, P = tokens_CP.shape
    self._check_length(P)
    if P == 0:
      config = self.config
      shape = (config.n_layers, C, 0, config.n_kv_heads, config.d_head)
      return KV(*[jnp.zeros(shape, config.compute_dtype)] * 2)
    segment_ids_CP = (np.arange(P) < lengths_C[:, None]).astype(jnp.int32)
    _, _, kv = self._run(tokens_CP, np.arange(P), segment_ids_CP, keep_kv=True)
    assert kv is not None
    return kv

  def with_prefix(
    self, tokens_BS: jax.Array, kv: KV, prefix_lengths_C: jax.Array
  ) -> jax.Array:
    """Returns hidden states [B, S, D] of right-padded rows that continue their prefix.

    Rows come in groups of B / C consecutive ones per context. With P = 0 they stand alone.
    Raises ValueError when P + S exceeds the context length or C does not divide B.
    """
    (B, S), (C, P) = tokens_BS.shape, kv.k_NCPKE.shape[1:3]
    self._check_length(P + S)
    if B % C:
      raise ValueError(f'{B} rows do not divide over {C} prefixes; each needs equally many')
    if P == 0:
      return self(tokens_BS)[0]
    starts_B = jnp.repeat(prefix_lengths_C, B // C, total_repeat_length=B)
    positions_BS = starts_B[:, None] + np.arange(S)
    hidden_BSD, _, _ = self._run(
      tokens_BS, positions_BS, None, prefix=kv, prefix_lengths_C=prefix_lengths_C
    )
    return hidden_BSD

  def unembedding_VD(self) -> jax.Array:
    """Returns the output embedding, float32 [V, D], tied or free."""
    return self.embedding.unembedding_VD()

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., D], soft-capped if configured."""
    logits = jnp.einsum(
      '...d,vd->...v', hidden, self.unembedding_VD().astype(hidden.dtype),
      preferred_element_type=jnp.float32,
    )
    names = (axes.BATCH, axes.LENGTH, axes.VOCAB_ACT)[-hidden.ndim :]
    return softcapped(self.seams.constrain(logits, names), self.config.final_softcap)


def _create(config: ModelConfig, seams: Seams, seed: int | jax.Array) -> Transformer:
  """Returns a fresh model of a seed, which may be traced."""
  return Transformer(config, nnx.Rngs(params=jax.random.key(seed)), seams)


def _abstract(config: ModelConfig, seams: Seams = Seams()) -> Transformer:
  """Returns the model with shapes in place of arrays."""
  return nnx.eval_shape(functools.partial(_create, config, seams, 0))


def build(config: ModelConfig, seams: Seams = Seams()) -> nnx.GraphDef:
  """Returns the static half of a model; `apply` joins it with parameters."""
  return nnx.split(_abstract(config, seams))[0]


def init(config: ModelConfig, seed: int | jax.Array) -> dict[str, Any]:
  """Returns fresh float32 parameters as a nested dict; pure, may run inside jit."""
  return nnx.to_pure_dict(nnx.state(_create(config, Seams(), seed), nnx.Param))


def abstract_params(config: ModelConfig) -> dict[str, Any]:
  """Returns the tree of `init` with a ShapeDtypeStruct per leaf."""
  return jax.eval_shape(lambda: init(config, 0))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
  """Returns the tree of `init` with a tuple of logical axis names (or None) per leaf."""
  specs = nnx.get_partition_spec(nnx.state(_abstract(config), nnx.Param))
  return jax.tree.map(
    tuple, nnx.to_pure_dict(specs), is_leaf=lambda x: isinstance(x, jax.sharding.PartitionSpec)
  )


def apply(graphdef: nnx.GraphDef, params: dict[str, Any]) -> Transformer:
  """Returns the model of these parameters, ready to call."""
  return nnx.merge(graphdef, params)
