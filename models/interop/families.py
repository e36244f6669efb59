"""The families of checkpoints that we read and write: one table each.

A family says how its config.json maps to a ModelConfig and which tensor holds each parameter.
Facts are those of transformers 5.23; tensors that carry nothing we need are listed as ignored.
"""

import dataclasses
from typing import Any, Mapping, Optional

from models.interop.layout import Part, Row

SILU = {'silu': 'swiglu', 'swish': 'swiglu'}
GELU = {
  'gelu': 'gelu', 'gelu_python': 'gelu', 'gelu_new': 'gelu_tanh', 'gelu_fast': 'gelu_tanh',
  'gelu_pytorch_tanh': 'gelu_tanh',
}
FALSE = (None, False)
REQUIRED = {  # config.json -> our field
  'vocab_size': 'vocab_size', 'max_position_embeddings': 'context_length',
  'num_hidden_layers': 'n_layers', 'hidden_size': 'd_model', 'num_attention_heads': 'n_heads',
  'intermediate_size': 'd_ff',
}
LAYER = 'model.layers.{layer}.'


@dataclasses.dataclass(frozen=True)
class Family:
  """One family.

  model_type, architecture: as config.json names them.
  fixed: fields of ModelConfig that all its models share.
  rows: every parameter that a model of the family may have; of several rows for one leaf the
    first that the file knows counts, the first is what is written.
  eps, activations, attention_bias: key of the norms' epsilon; hidden_act -> our mlp; whether
    attention has biases where config.json does not say, None where it never has.
  mlp_bias: whether config.json may ask for biases in the feed-forward.
  own_head_dim, own_kv_heads: whether config.json may set them apart from the other sizes;
    'must' where it has to.
  theta, partial, per_kind, rope_required: see `rope.rope_of`.
  windows: how sliding layers are told: '' (there are none), 'layer_types', 'max_window_layers',
    or 'all'.
  computed: other settings and the values of them that we compute.
  constants: tensors of the file that are no parameters: name -> value.
  ignored: patterns of `re` of tensors that may be there and are not read.
  """

  model_type: str
  architecture: str
  fixed: Mapping[str, Any]
  rows: tuple[Row, ...]
  eps: str = 'rms_norm_eps'
  activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: SILU)
  attention_bias: Optional[bool] = False
  mlp_bias: bool = False
  own_head_dim: str = ''
  own_kv_heads: str = 'may'
  theta: float = 10_000.0
  partial: float = 1.0
  per_kind: bool = False
  rope_required: bool = False
  windows: str = ''
  computed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
  constants: Mapping[str, float] = dataclasses.field(default_factory=dict)
  ignored: tuple[str, ...] = (r'.*\.rotary_emb\.inv_freq',)


def _ends(head: str = 'lm_head.weight') -> tuple[Row, ...]:
  """Returns the rows of what is before and after the layers."""
  return (
    Row('embedding.tokens', 'VD', 'model.embed_tokens.weight', 'V D'),
    Row('embedding.output', 'VD', head, 'V D'),
    Row('final_norm.scale', 'D', 'model.norm.weight', 'D'),
  )


ATTENTION = (
  Row('blocks.attention.q', 'DHE', LAYER + 'self_attn.q_proj.weight', 'HE D'),
  Row('blocks.attention.k', 'DKE', LAYER + 'self_attn.k_proj.weight', 'KE D'),
  Row('blocks.attention.v', 'DKE', LAYER + 'self_attn.v_proj.weight', 'KE D'),
  Row('blocks.attention.o', 'HED', LAYER + 'self_attn.o_proj.weight', 'D HE'),
  Row('blocks.attention.q_bias', 'HE', LAYER + 'self_attn.q_proj.bias', 'HE'),
  Row('blocks.attention.k_bias', 'KE', LAYER + 'self_attn.k_proj.bias', 'KE'),
  Row('blocks.attention.v_bias', 'KE', LAYER + 'self_attn.v_proj.bias', 'KE'),
  Row('blocks.attention.o_bias', 'D', LAYER + 'self_attn.o_proj.bias', 'D'),
)
HEAD_NORMS = (
  Row('blocks.attention.q_norm.scale', 'E', LAYER + 'self_attn.q_norm.weight', 'E'),
  Row('blocks.attention.k_norm.scale', 'E', LAYER + 'self_attn.k_norm.weight', 'E'),
)
PROJECTION_NORMS = (
  Row('blocks.attention.q_norm.scale', 'HE', LAYER + 'self_attn.q_norm.weight', 'HE'),
  Row('blocks.attention.k_norm.scale', 'KE', LAYER + 'self_attn.k_norm.weight', 'KE'),
)
GATED_MLP = (
  Row('blocks.mlp.gate', 'DF', LAYER + 'mlp.gate_proj.weight', 'F D'),
  Row('blocks.mlp.up', 'DF', LAYER + 'mlp.up_proj.weight', 'F D'),
  Row('blocks.mlp.down', 'FD', LAYER + 'mlp.down_proj.weight', 'D F'),
)
MLP_BIASES = (
  Row('blocks.mlp.gate_bias', 'F', LAYER + 'mlp.gate_proj.bias', 'F'),
  Row('blocks.mlp.up_bias', 'F', LAYER + 'mlp.up_proj.bias', 'F'),
  Row('blocks.mlp.down_bias', 'D', LAYER + 'mlp.down_proj.bias', 'D'),
)


def _norms(attention: str, mlp: str, placement: str = 'norm') -> tuple[Row, ...]:
  """Returns the rows of a block's norms; placement 'norm' (before) or 'out_norm' (after)."""
  return (
    Row(f'blocks.attention_{placement}.scale', 'D', LAYER + f'{attention}.weight', 'D'),
    Row(f'blocks.mlp_{placement}.scale', 'D', LAYER + f'{mlp}.weight', 'D'),
  )


PRE_NORMS = _norms('input_layernorm', 'post_attention_layernorm')
POST_NORMS = _norms('post_attention_layernorm', 'post_feedforward_layernorm', 'out_norm')

LLAMA = Family(
  'llama', 'LlamaForCausalLM', {'norm_placement': 'pre'},
  (*_ends(), *ATTENTION, *GATED_MLP, *MLP_BIASES, *PRE_NORMS),
  mlp_bias=True, own_head_dim='may',
)
QWEN3 = Family(
  'qwen3', 'Qwen3ForCausalLM', {'norm_placement': 'pre', 'qk_norm': 'head'},
  (*_ends(), *ATTENTION, *HEAD_NORMS, *GATED_MLP, *PRE_NORMS), own_head_dim='must',
  own_kv_heads='must', windows='max_window_layers',
)
OLMO2 = Family(
  'olmo2', 'Olmo2ForCausalLM', {'norm_placement': 'post', 'qk_norm': 'projection'},
  (*_ends(), *ATTENTION, *PROJECTION_NORMS, *GATED_MLP, *POST_NORMS),
  computed={'clip_qkv': (None,)},
)
OLMO3 = dataclasses.replace(
  OLMO2, model_type='olmo3', architecture='Olmo3ForCausalLM', theta=500_000.0, per_kind=True,
  windows='layer_types',
)
APERTUS = Family(
  'apertus', 'ApertusForCausalLM',
  {'norm_placement': 'pre', 'qk_norm': 'head'},
  (
    *_ends(), *ATTENTION, *HEAD_NORMS, *GATED_MLP[1:],
    Row('blocks.mlp.xielu.alpha_p', 'U', LAYER + 'mlp.act_fn.alpha_p', 'U'),
    Row('blocks.mlp.xielu.alpha_n', 'U', LAYER + 'mlp.act_fn.alpha_n', 'U'),
    *_norms('attention_layernorm', 'feedforward_layernorm'),
  ),
  activations={'xielu': 'xielu'}, theta=12_000_000.0, rope_required=True,
  computed={'qk_norm': (None, True), 'post_norm': FALSE, 'mlp_bias': FALSE},
  # XIELU.BETA and XIELU.EPS, in bfloat16 as transformers makes them.
  constants={LAYER + 'mlp.act_fn.beta': 0.5, LAYER + 'mlp.act_fn.eps': -9.98377799987793e-07},
)

NEOX = 'gpt_neox.layers.{layer}.'
QKV = NEOX + 'attention.query_key_value.'


def _layer_norm(leaf: str, name: str) -> tuple[Row, Row]:
  """Returns the rows of a layer norm."""
  return (
    Row(f'{leaf}.scale', 'D', f'{name}.weight', 'D'),
    Row(f'{leaf}.bias', 'D', f'{name}.bias', 'D'),
  )


GPT_NEOX = Family(
  'gpt_neox', 'GPTNeoXForCausalLM',
  {'norm': 'layernorm', 'norm_placement': 'pre', 'mlp_bias': True},
  (
    Row('embedding.tokens', 'VD', 'gpt_neox.embed_in.weight', 'V D'),
    Row('embedding.output', 'VD', 'embed_out.weight', 'V D'),
    Row('embedding.output', 'VD', 'lm_head.weight', 'V D'),
    *_layer_norm('final_norm', 'gpt_neox.final_layer_norm'),
    *(Row(f'blocks.attention.{leaf}', 'DHE', QKV + 'weight', 'HPE D', Part(i, 3))
      for i, leaf in enumerate('qkv')),
    *(Row(f'blocks.attention.{leaf}_bias', 'HE', QKV + 'bias', 'HPE', Part(i, 3))
      for i, leaf in enumerate('qkv')),
    Row('blocks.attention.o', 'HED', NEOX + 'attention.dense.weight', 'D HE'),
    Row('blocks.attention.o_bias', 'D', NEOX + 'attention.dense.bias', 'D'),
    Row('blocks.mlp.up', 'DF', NEOX + 'mlp.dense_h_to_4h.weight', 'F D'),
    Row('blocks.mlp.up_bias', 'F', NEOX + 'mlp.dense_h_to_4h.bias', 'F'),
    Row('blocks.mlp.down', 'FD', NEOX + 'mlp.dense_4h_to_h.weight', 'D F'),
    Row('blocks.mlp.down_bias', 'D', NEOX + 'mlp.dense_4h_to_h.bias', 'D'),
    *_layer_norm('blocks.attention_norm', NEOX + 'input_layernorm'),
    *_layer_norm('blocks.mlp_norm', NEOX + 'post_attention_layernorm'),
  ),
  eps='layer_norm_eps', activations=GELU, attention_bias=True, own_kv_heads='', partial=0.25,
  ignored=(r'.*\.rotary_emb\.inv_freq', r'.*\.attention\.(masked_)?bias'),
)


def _experts(folder: str) -> tuple[Row, ...]:
  """Returns the rows of experts of which each has its own tensors."""
  name = LAYER + folder
  return (
    Row('blocks.mlp.router', 'DX', name + 'gate.weight', 'X D'),
    Row('blocks.mlp.gate', 'XDF', name + 'experts.{expert}.w1.weight', 'F D'),
    Row('blocks.mlp.up', 'XDF', name + 'experts.{expert}.w3.weight', 'F D'),
    Row('blocks.mlp.down', 'XFD', name + 'experts.{expert}.w2.weight', 'D F'),
  )


FUSED = LAYER + 'mlp.experts.'
MIXTRAL = Family(
  'mixtral', 'MixtralForCausalLM', {'norm_placement': 'pre'},
  (
    *_ends(), *ATTENTION[:4], *_experts('block_sparse_moe.'), *_experts('mlp.'),
    Row('blocks.mlp.gate', 'XDF', FUSED + 'gate_up_proj', 'X PF D', Part(0, 2)),
    Row('blocks.mlp.up', 'XDF', FUSED + 'gate_up_proj', 'X PF D', Part(1, 2)),
    Row('blocks.mlp.down', 'XFD', FUSED + 'down_proj', 'X D F'),
    *PRE_NORMS,
  ),
  attention_bias=None, own_head_dim='may', own_kv_heads='must', theta=1_000_000.0,
  windows='all',
)

FAMILIES = {
  family.model_type: family
  for family in (LLAMA, QWEN3, OLMO2, OLMO3, APERTUS, GPT_NEOX, MIXTRAL)
}
