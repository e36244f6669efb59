"""Owns the configuration of a model: its shape, its variants and how it is computed."""

import dataclasses
import math
from typing import Annotated as A
from typing import ClassVar, Optional

CHOICES = {
  'positions': ('rope', 'alibi', 'learned', 'none'),
  'mlp': ('swiglu', 'geglu', 'gelu', 'gelu_tanh', 'xielu'),
  'norm': ('rmsnorm', 'layernorm'),
  'norm_placement': ('pre', 'post', 'sandwich'),
  'qk_norm': ('none', 'head', 'projection'),
  'compute_dtype': ('float32', 'bfloat16'),
  'remat': ('none', 'full', 'dots'),
  'scan_layers': ('scan', 'unroll', 'auto'),
  'attention': ('auto', 'unrolled', 'blockwise', 'flash_tpu', 'flash_gpu', 'oracle'),
}
PRODUCTS = ('auto', 'ragged_dot', 'megablox', 'blocks')
LAYER_KINDS = ('sliding', 'full')
ROPE_SCALINGS = ('none', 'linear', 'llama3', 'yarn')


def _require(condition: bool, message: str) -> None:
  """Raises ValueError(message) unless `condition` holds."""
  if not condition:
    raise ValueError(message)


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
  """Raises ValueError naming the field unless `value` is one of `choices`."""
  _require(value in choices, f'{name}={value!r} is not one of {", ".join(choices)}')


@dataclasses.dataclass(frozen=True)
class RopeConfig:
  """Rotary position embedding: base, rotated share of a head, long-context scaling."""

  KIND: ClassVar[str] = 'identity'
  theta: A[float, 'base of the wavelengths'] = 10_000.0
  fraction: A[float, 'share of each head that is rotated (its first dimensions)'] = 1.0
  scaling: A[str, "'none', 'linear', 'llama3' or 'yarn'"] = 'none'
  factor: A[float, 'how many times the original context is stretched'] = 1.0
  original_context: A[int, 'tokens of context before stretching (llama3, yarn)'] = 8192
  low_freq_factor: A[float, 'llama3: longest kept wavelength = original context / this'] = 1.0
  high_freq_factor: A[float, 'llama3: shortest scaled wavelength = original context / this'] = 4.0
  beta_fast: A[float, 'yarn: rotations over the original context above which all is kept'] = 32.0
  beta_slow: A[float, 'yarn: rotations over the original context below which all scales'] = 1.0
  attention_factor: A[
    Optional[float], 'yarn: multiplies cos and sin; None means 0.1 ln(factor) + 1'
  ] = None

  def __post_init__(self):
    _require_choice('model.rope.scaling', self.scaling, ROPE_SCALINGS)
    _require(self.theta > 1, f'model.rope.theta={self.theta} must be above 1')
    _require(
      0 < self.fraction <= 1, f'model.rope.fraction={self.fraction} must be above 0, at most 1'
    )
    _require(self.factor >= 1, f'model.rope.factor={self.factor} must be at least 1')
    _require(
      self.scaling != 'none' or self.factor == 1,
      f"model.rope.factor={self.factor} needs model.rope.scaling other than 'none'",
    )
    _require(
      self.high_freq_factor > self.low_freq_factor,
      f'model.rope.high_freq_factor={self.high_freq_factor} must be above '
      f'model.rope.low_freq_factor={self.low_freq_factor}',
    )
    _require(
      self.beta_fast > self.beta_slow > 0,
      f'model.rope.beta_fast={self.beta_fast} must be above '
      f'model.rope.beta_slow={self.beta_slow}, both above 0',
    )
    _require(
      self.original_context > 0,
      f'model.rope.original_context={self.original_context} must be above 0',
    )


@dataclasses.dataclass(frozen=True)
class MoEConfig:
  """Mixture of experts in place of the feed-forward of every block."""

  KIND: ClassVar[str] = 'identity'
  n_experts: A[int, 'experts per block; 0 means a dense feed-forward'] = 0
  top_k: A[int, 'experts that each token uses'] = 2
  d_expert: A[int, 'hidden width of one expert'] = 256
  balance_weight: A[float, 'weight of the load-balance loss (Switch, eq. 4)'] = 0.01
  router_z_weight: A[float, 'weight of the router z-loss (ST-MoE, eq. 5)'] = 0.001
  normalize_top_k: A[bool, 'whether the top-k weights are rescaled to sum to 1'] = True
  capacity_factor: A[
    float, "slots of each expert over its mean number of a device's choices; 0 drops nothing"
  ] = 0.0
  exchange_factor: A[
    float, 'rows per round and pair of devices over their mean, when nothing is dropped',
    'placement',
  ] = 1.25
  product: A[
    str, "'ragged_dot', 'megablox', 'blocks', or 'auto': by hardware; used when nothing is dropped",
    'placement',
  ] = 'auto'

  def __post_init__(self):
    _require_choice('model.moe.product', self.product, PRODUCTS)
    _require(self.n_experts >= 0, f'model.moe.n_experts={self.n_experts} must be at least 0')
    if self.n_experts:
      _require(
        1 <= self.top_k <= self.n_experts,
        f'model.moe.top_k={self.top_k} must be from 1 to model.moe.n_experts={self.n_experts}',
      )
      _require(self.d_expert > 0, f'model.moe.d_expert={self.d_expert} must be above 0')
    _require(
      0 <= self.capacity_factor < math.inf,
      f'model.moe.capacity_factor={self.capacity_factor} must be 0 (nothing is dropped) or '
      'above, such as 1.25',
    )
    _require(
      0 < self.exchange_factor < math.inf,
      f'model.moe.exchange_factor={self.exchange_factor} must be above 0, such as 1.25',
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer; widths are in features, lengths in tokens."""

  KIND: ClassVar[str] = 'identity'
  vocab_size: A[int, 'rows of the embedding'] = 1024
  context_length: A[int, 'longest sequence in tokens'] = 256
  n_layers: A[int, 'number of blocks'] = 4
  d_model: A[int, 'width of the residual stream'] = 128
  n_heads: A[int, 'query heads'] = 4
  n_kv_heads: A[int, 'key and value heads'] = 4
  d_head: A[int, 'width of one head'] = 32
  d_ff: A[int, 'hidden width of the feed-forward'] = 384
  positions: A[str, "'rope', 'alibi', 'learned' or 'none'"] = 'rope'
  rope: A[RopeConfig, 'rotary embedding of full-attention layers'] = RopeConfig()
  sliding_rope: A[
    Optional[RopeConfig], 'rotary embedding of sliding layers; None means the same as `rope`'
  ] = None
  mlp: A[str, "'swiglu', 'geglu' (tanh gelu), 'gelu', 'gelu_tanh' or 'xielu'"] = 'swiglu'
  norm: A[str, "'rmsnorm' or 'layernorm'"] = 'rmsnorm'
  norm_eps: A[float, 'added to the variance'] = 1e-6
  norm_placement: A[str, "'pre': x + f(norm x); 'post': x + norm(f x); 'sandwich': both"] = 'pre'
  qk_norm: A[str, "'none', 'head' (each head) or 'projection' (all heads together)"] = 'none'
  qkv_bias: A[bool, 'biases on the query, key and value projections'] = False
  out_bias: A[bool, 'bias on the attention output projection'] = False
  mlp_bias: A[bool, 'biases in the feed-forward'] = False
  parallel_residual: A[bool, 'x + attention(x) + mlp(x) instead of one after the other'] = False
  window: A[int, 'tokens that a sliding layer sees, the current one included'] = 128
  layer_pattern: A[
    tuple[str, ...], "kinds of the blocks, repeated over depth: 'sliding' or 'full'"
  ] = ('full',)
  attention_softcap: A[float, 'attention logits go through cap * tanh(x / cap); 0 = off'] = 0.0
  final_softcap: A[float, 'output logits go through cap * tanh(x / cap); 0 = off'] = 0.0
  attention_scale: A[float, 'factor on attention logits; 0 means 1 / sqrt(d_head)'] = 0.0
  tie_embeddings: A[bool, 'whether the output uses the input embedding'] = True
  scale_embeddings: A[bool, 'whether embeddings are multiplied by sqrt(d_model)'] = False
  dropout: A[float, 'share of branch and embedding outputs dropped in training'] = 0.0
  compute_dtype: A[str, "'float32' or 'bfloat16'; parameters stay float32"] = 'float32'
  init_std: A[float, 'standard deviation of fresh weights; 0 means 1 / sqrt(fan in)'] = 0.02
  moe: A[MoEConfig, 'mixture of experts'] = MoEConfig()
  remat: A[str, "what the backward pass recomputes: 'none', 'full' or 'dots'", 'placement'] = (
    'none'
  )
  scan_layers: A[str, "'scan', 'unroll' or 'auto'", 'placement'] = 'auto'
  attention: A[
    str,
    "'unrolled', 'blockwise', 'flash_tpu', 'flash_gpu', 'oracle', or 'auto': by hardware and length",
    'placement',
  ] = 'auto'
  attention_block: A[int, 'least query rows per block of unrolled attention', 'placement'] = 64

  def __post_init__(self):
    for field, choices in CHOICES.items():
      _require_choice(f'model.{field}', getattr(self, field), choices)
    _check_sizes(self)
    _check_positions(self)
    _require(
      not self.moe.n_experts or self.mlp in ('swiglu', 'geglu'),
      f"model.mlp={self.mlp!r} has no gate; experts need 'swiglu' or 'geglu'",
    )
    _require(
      not self.moe.n_experts or not self.mlp_bias, 'model.mlp_bias=True but experts have no biases'
    )
    _require(len(self.layer_pattern) > 0, 'model.layer_pattern is empty; it names layer kinds')
    for kind in self.layer_pattern:
      _require_choice('model.layer_pattern entry', kind, LAYER_KINDS)
    _require(0 <= self.dropout < 1, f'model.dropout={self.dropout} must be in [0, 1)')
    for field in ('attention_softcap', 'final_softcap', 'attention_scale', 'init_std'):
      _require(getattr(self, field) >= 0, f'model.{field}={getattr(self, field)} is negative')

  @property
  def scale(self) -> float:
    """Returns the factor on attention logits."""
    return self.attention_scale or self.d_head**-0.5

  @property
  def layer_kinds(self) -> tuple[str, ...]:
    """Returns the kind of each block, 'sliding' or 'full'."""
    return tuple(self.layer_pattern[i % len(self.layer_pattern)] for i in range(self.n_layers))

  def kind_window(self, kind: str) -> int:
    """Returns how many tokens a layer of this kind sees, 0 when all."""
    return self.window if kind == 'sliding' else 0

  def kind_rope(self, kind: str) -> RopeConfig:
    """Returns the rotary embedding of a layer of this kind."""
    return self.sliding_rope if kind == 'sliding' and self.sliding_rope else self.rope


def _check_sizes(config: ModelConfig) -> None:
  """Raises ValueError when a size is not positive or heads do not divide."""
  sizes = (
    'vocab_size', 'context_length', 'n_layers', 'd_model', 'n_heads', 'n_kv_heads', 'd_head',
    'd_ff', 'window', 'attention_block', 'norm_eps',
  )
  for field in sizes:
    value = getattr(config, field)
    _require(value > 0, f'model.{field}={value} must be above 0')
  _require(
    config.n_heads % config.n_kv_heads == 0,
    f'model.n_heads={config.n_heads} is not a multiple of model.n_kv_heads={config.n_kv_heads}',
  )


def _check_positions(config: ModelConfig) -> None:
  """Raises ValueError when a rotary embedding cannot apply to the heads."""
  if config.positions != 'rope':
    _require(
      config.sliding_rope is None,
      f"model.sliding_rope is set but model.positions={config.positions!r} is not 'rope'",
    )
    return
  for field, rope in (('rope', config.rope), ('sliding_rope', config.sliding_rope)):
    if rope is not None:
      rotated = int(config.d_head * rope.fraction)
      _require(
        rotated >= 2 and rotated % 2 == 0,
        f'model.{field}.fraction={rope.fraction} rotates {rotated} of model.d_head='
        f'{config.d_head} dimensions; it must be an even number of at least 2',
      )
