"""Owns the decoder: blocks, the stack that runs them, and its pure functions.

Layers are stacked on a leading axis. Training works on the plain dict of `init`:

  graphdef = build(config)
  params = jax.jit(init, static_argnums=0)(config, seed)
  hidden_BLD, aux = apply(graphdef, params)(tokens_BL, segment_ids_BL, positions_BL)
"""

import dataclasses
import functools
from typing import Any, NamedTuple, Optional, Protocol

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from models import axes
from models.attention import (
  cached_attention, configured_attention, configured_decode_attention, prefix_attention,
)
from models.config import ModelConfig
from models.dispatch import ExpertDispatch
from models.kernels.decoding import Cache, DecodeAttention
from models.kernels.interface import Attention, Mask, softcapped
from models.layers import (
  MLP, TABLE_AXES, AttentionProjections, Constrain, Embedding, model_norm,
)
from models.moe import AuxLosses, MoE, Total, own_tokens
from models.positions import alibi_slopes, rope_tables, rotate
from models.spread import Spread
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
  the one that the config names; attend_cached: see `kernels.decoding.DecodeAttention`, None
  means the one for the platform; run_layers: see `stack.RunLayers`; expert_dispatch: see
  `dispatch.ExpertDispatch`, None means the one that the config names; token_sum: see `total` of
  `moe.auxiliary_losses`; spread: see `spread.Spread`.
  """

  constrain: Constrain = unconstrained
  attend: Optional[Attention] = None
  attend_cached: Optional[DecodeAttention] = None
  run_layers: RunLayers = run_layers
  expert_dispatch: Optional[ExpertDispatch] = None
  token_sum: Total = own_tokens
  spread: Spread = Spread()


class KV(NamedTuple):
  """Keys and values of all layers, rotated: [N, B, L, K, E]; of one layer without the N."""

  k_NBLKE: jax.Array
  v_NBLKE: jax.Array


class Look(Protocol):
  """Attends in one block, from its projected heads to (output [B, L, H, E], what to keep).

  `memory` is this layer's part of the tree that the call brought along. What is kept comes
  back stacked over layers. Options are those of `kernels.interface.Attention`.
  """

  def __call__(
    self, q_BLHE: jax.Array, k_BLKE: jax.Array, v_BLKE: jax.Array, memory: Any, *, window: int,
    **options: Any,
  ) -> tuple[jax.Array, Any]: ...


class Context(NamedTuple):
  """What all blocks of one call share."""

  look: Look
  rope: dict[str, tuple[jax.Array, jax.Array]]  # tables by layer kind
  segment_ids_BL: Optional[jax.Array]
  token_ids_BL: Optional[jax.Array]


class LayerInput(NamedTuple):
  """What one block takes beside its parameters."""

  memory: Any
  dropout_key: Optional[jax.Array]


class Dropout(NamedTuple):
  """Randomness of one call: keys of the embedding and of each layer, numbers of the tokens.

  What is dropped of a token follows from key and number, however a batch is cut up.
  """

  embedding_key: jax.Array
  layer_keys_N: jax.Array
  token_ids_BL: jax.Array


def dropout_of(config: ModelConfig, key: jax.Array, token_ids_BL: jax.Array) -> Dropout:
  """Returns the randomness of a key; token numbers are distinct within a batch."""
  embedding_key, blocks_key = jax.random.split(key)
  return Dropout(embedding_key, jax.random.split(blocks_key, config.n_layers), token_ids_BL)


def dropped(
  x_BLD: jax.Array, rate: float, key: Optional[jax.Array], token_ids_BL: Optional[jax.Array]
) -> jax.Array:
  """Returns x with a share `rate` zeroed and the rest rescaled; x itself without a key."""
  if key is None or rate == 0:
    return x_BLD

  def kept(token_id: jax.Array) -> jax.Array:
    return jax.random.bernoulli(jax.random.fold_in(key, token_id), 1 - rate, x_BLD.shape[-1:])

  keep_BLD = jax.vmap(jax.vmap(kept))(token_ids_BL)
  return jnp.where(keep_BLD, x_BLD / (1 - rate), 0).astype(x_BLD.dtype)


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
    self, x_BLD: jax.Array, kind: str, context: Context, memory: Any
  ) -> tuple[jax.Array, Any]:
    """Returns the attention output [B, L, D] and what the call's look keeps."""
    config, constrain = self.config, self.seams.constrain
    q_BLHE, k_BLKE, v_BLKE = self.attention.project(x_BLD, self.seams.spread)
    if config.positions == 'rope':
      q_BLHE, k_BLKE = rotate(q_BLHE, *context.rope[kind]), rotate(k_BLKE, *context.rope[kind])
    q_BLHE = constrain(q_BLHE, (axes.BATCH, axes.LENGTH, axes.HEADS_ACT, None))
    k_BLKE = constrain(k_BLKE, (axes.BATCH, axes.LENGTH, axes.KV_HEADS_ACT, None))
    v_BLKE = constrain(v_BLKE, (axes.BATCH, axes.LENGTH, axes.KV_HEADS_ACT, None))
    out_BLHE, kept = context.look(
      q_BLHE, k_BLKE, v_BLKE, memory, window=config.kind_window(kind), scale=config.scale,
      softcap=config.attention_softcap,
      alibi_slopes_H=alibi_slopes(config.n_heads) if config.positions == 'alibi' else None,
    )
    out_BLHE = constrain(out_BLHE, (axes.BATCH, axes.LENGTH, axes.HEADS_ACT, None))
    return self.attention.output(out_BLHE, self.seams.spread), kept

  def _feed_forward(self, x_BLD: jax.Array, context: Context) -> tuple[jax.Array, AuxLosses]:
    """Returns the feed-forward output [B, L, D] and its auxiliary losses."""
    if isinstance(self.mlp, MoE):
      real_BL = None
      if context.segment_ids_BL is not None:
        real_BL = self.seams.spread.own(context.segment_ids_BL) != 0
      return self.mlp(x_BLD, real_BL, self.seams.expert_dispatch, self.seams.token_sum)
    return self.mlp(x_BLD, self.seams.constrain, self.seams.spread), no_aux_losses()

  def _normed(self, name: str, x_BLD: jax.Array) -> jax.Array:
    """Returns x through the norm `name` where the placement has one."""
    return getattr(self, name)(x_BLD) if hasattr(self, name) else x_BLD

  def __call__(
    self, x_BLD: jax.Array, kind: str, context: Context, inputs: LayerInput
  ) -> tuple[jax.Array, AuxLosses, Any]:
    """Returns the next hidden states, the auxiliary losses and what the look keeps."""
    rate, keys, token_ids_BL = self.config.dropout, (None, None), context.token_ids_BL
    if inputs.dropout_key is not None:
      keys = tuple(jax.random.split(inputs.dropout_key))
    attended_BLD, kept = self._attend(
      self._normed('attention_norm', x_BLD), kind, context, inputs.memory
    )
    attended_BLD = self._normed('attention_out_norm', attended_BLD)
    attended_BLD = dropped(attended_BLD, rate, keys[0], token_ids_BL)
    between_BLD = x_BLD if self.config.parallel_residual else x_BLD + attended_BLD
    fed_BLD, aux = self._feed_forward(self._normed('mlp_norm', between_BLD), context)
    fed_BLD = dropped(self._normed('mlp_out_norm', fed_BLD), rate, keys[1], token_ids_BL)
    x_BLD = x_BLD + attended_BLD + fed_BLD
    return self.seams.constrain(x_BLD, HIDDEN_AXES), aux, kept


def no_aux_losses() -> AuxLosses:
  """Returns zero auxiliary losses."""
  return AuxLosses(*[jnp.zeros((), jnp.float32)] * len(AuxLosses._fields))


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

  def own_row(self, segment_ids_BL: Optional[jax.Array], *, keep: bool = False) -> Look:
    """Returns the look of whole rows at themselves, causal; it may keep keys and values."""
    attend = self.seams.attend or configured_attention(self.config)

    def look(q_BLHE, k_BLKE, v_BLKE, memory, *, window, **options):
      del memory
      attended = attend(
        q_BLHE, k_BLKE, v_BLKE, mask=Mask(window=window), segment_ids_BL=segment_ids_BL, **options
      )
      return attended.out_BLHE, KV(k_BLKE, v_BLKE) if keep else None

    return look

  def embedded(
    self, tokens_BL: jax.Array, positions: jax.Array, dropout: Optional[Dropout] = None
  ) -> jax.Array:
    """Returns what enters the first block, [B, l, D]; positions are [L] or [B, L]."""
    constrain, spread = self.seams.constrain, self.seams.spread
    x_BlD = self.embedding(tokens_BL, positions, constrain, spread)
    x_BlD = constrain(x_BlD, HIDDEN_AXES)
    if dropout is None:
      return x_BlD
    token_ids_Bl = spread.own(dropout.token_ids_BL)
    return dropped(x_BlD, self.config.dropout, dropout.embedding_key, token_ids_Bl)

  def through_blocks(
    self, x_BlD: jax.Array, positions: jax.Array, look: Look, *, memory: Any = None,
    segment_ids_BL: Optional[jax.Array] = None, dropout: Optional[Dropout] = None,
    run_layers: Optional[RunLayers] = None,
  ) -> tuple[jax.Array, AuxLosses, Any]:
    """Returns hidden states [B, l, D], auxiliary losses and what the look kept of all layers."""
    config = self.config
    graphdef, params = nnx.split(self.blocks)
    rope = {}
    if config.positions == 'rope':
      rope = {
        kind: rope_tables(
          config.kind_rope(kind), config.d_head, positions, config.context_length
        )
        for kind in sorted(set(config.layer_kinds))
      }
    token_ids_Bl = None if dropout is None else self.seams.spread.own(dropout.token_ids_BL)
    context = Context(look, rope, segment_ids_BL, token_ids_Bl)

    def body(kind: str, carry, inputs):
      x_BlD, aux = carry
      block_params, layer_input = inputs
      block = nnx.merge(graphdef, block_params)
      x_BlD, layer_aux, kept = block(x_BlD, kind, context, layer_input)
      return (x_BlD, jax.tree.map(jnp.add, aux, layer_aux)), kept

    layer_keys = None if dropout is None else dropout.layer_keys_N
    (x_BlD, aux), kept = (run_layers or self.seams.run_layers)(
      body, (x_BlD, no_aux_losses()), (params, LayerInput(memory, layer_keys)), config
    )
    return x_BlD, aux, kept

  def _run(
    self, tokens_BL: jax.Array, positions: jax.Array, look: Look, *,
    dropout: Optional[Dropout] = None, **options: Any,
  ) -> tuple[jax.Array, AuxLosses, Any]:
    """Returns final hidden states, auxiliary losses and what the look kept of all layers."""
    x_BlD = self.embedded(tokens_BL, positions, dropout)
    x_BlD, aux, kept = self.through_blocks(x_BlD, positions, look, dropout=dropout, **options)
    return self.final_norm(x_BlD), aux, kept

  def __call__(
    self, tokens_BL: jax.Array, segment_ids_BL: Optional[jax.Array] = None,
    positions_BL: Optional[jax.Array] = None, *, dropout: Optional[Dropout] = None,
  ) -> tuple[jax.Array, AuxLosses]:
    """Returns final hidden states [B, l, D] in the compute dtype, and auxiliary losses.

    Segment 0 is padding. Positions default to 0..L-1. Raises ValueError when L exceeds the
    context length.
    """
    self._check_length(tokens_BL.shape[1])
    positions = np.arange(tokens_BL.shape[1]) if positions_BL is None else positions_BL
    hidden_BlD, aux, _ = self._run(
      tokens_BL, positions, self.own_row(segment_ids_BL), segment_ids_BL=segment_ids_BL,
      dropout=dropout,
    )
    return hidden_BlD, aux

  def read(self, tokens_BL: jax.Array, lengths_B: jax.Array) -> tuple[jax.Array, KV]:
    """Returns hidden states [B, L, D] and keys and values of rows right-padded to L tokens.

    What stands at a row's length and beyond is inert. Raises ValueError when L exceeds the
    context length.
    """
    B, L = tokens_BL.shape
    self._check_length(L)
    if L == 0:
      config = self.config
      shape = (config.n_layers, B, 0, config.n_kv_heads, config.d_head)
      dtype = config.compute_dtype
      return jnp.zeros((B, 0, config.d_model), dtype), KV(*[jnp.zeros(shape, dtype)] * 2)
    segment_ids_BL = (np.arange(L) < lengths_B[:, None]).astype(jnp.int32)
    hidden_BLD, _, kv = self._run(
      tokens_BL, np.arange(L), self.own_row(segment_ids_BL, keep=True),
      segment_ids_BL=segment_ids_BL,
    )
    return hidden_BLD, kv

  def with_prefix(
    self, tokens_BS: jax.Array, kv: KV, prefix_lengths_C: jax.Array
  ) -> jax.Array:
    """Returns hidden states [B, S, D] of right-padded rows that continue what was `read`.

    Rows come in groups of B / C consecutive ones per context. With P = 0 they stand alone.
    Raises ValueError when P + S exceeds the context length or C does not divide B.
    """
    (B, S), (C, P) = tokens_BS.shape, kv.k_NBLKE.shape[1:3]
    self._check_length(P + S)
    if B % C:
      raise ValueError(f'{B} rows do not divide over {C} prefixes; each needs equally many')
    if P == 0:
      return self(tokens_BS)[0]
    starts_B = jnp.repeat(prefix_lengths_C, B // C, total_repeat_length=B)
    positions_BS = starts_B[:, None] + np.arange(S)

    def look(q_BSHE, k_BSKE, v_BSKE, memory: KV, **options):
      out_BSHE = prefix_attention(q_BSHE, k_BSKE, v_BSKE, *memory, prefix_lengths_C, **options)
      return out_BSHE, None

    return self._run(tokens_BS, positions_BS, look, memory=kv)[0]

  def step(self, tokens_B: jax.Array, cache: Cache) -> tuple[jax.Array, KV]:
    """Returns hidden states [B, D] of one token after each row of a cache, and its KV.

    The cache is not changed. Its lengths have to be below the context length.
    """
    attend = self.seams.attend_cached or configured_decode_attention(
      self.config, jax.default_backend()
    )

    def look(q_B1HE, k_B1KE, v_B1KE, layer, **options):
      out_B1HE = cached_attention(attend, q_B1HE, k_B1KE, v_B1KE, cache, layer, **options)
      return out_B1HE, KV(k_B1KE, v_B1KE)

    hidden_B1D, _, kv = self._run(
      tokens_B[:, None], cache.lengths_B[:, None], look, memory=np.arange(self.config.n_layers)
    )
    return hidden_B1D[:, 0], kv

  def unembedding_VD(self) -> jax.Array:
    """Returns the output embedding, float32 [V, D], tied or free."""
    return self.embedding.unembedding_VD()

  def logits(self, hidden: jax.Array) -> jax.Array:
    """Returns float32 logits [..., V] of hidden states [..., D], soft-capped if configured."""
    table_VD = self.seams.constrain(self.unembedding_VD(), TABLE_AXES).astype(hidden.dtype)
    logits = jnp.einsum(
      '...d,vd->...v', hidden, table_VD, preferred_element_type=jnp.float32
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
