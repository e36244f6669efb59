"""Owns who takes part in the attention benchmark: for each name its programs."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

CPU = ('unrolled', 'blockwise', 'einsum', 'jax', 'torch_sdpa')
GPU = ('flash_gpu', 'blockwise', 'jax', 'cudnn', 'pallas_triton', 'pallas_mosaic', 'torch_sdpa')
OURS = {'unrolled': 'unrolled', 'blockwise': 'blockwise', 'einsum': 'oracle',
        'flash_gpu': 'flash_gpu'}


class Shape(NamedTuple):
  """A causal problem; window 0 means none."""

  batch: int
  length: int
  heads: int
  key_heads: int
  width: int
  window: int
  dtype: str

  @property
  def pairs(self) -> int:
    """Visible pairs of a query and a key, over batch and heads."""
    window = min(self.window or self.length, self.length)
    per_head = window * (window + 1) // 2 + (self.length - window) * window
    return self.batch * self.heads * per_head

  @property
  def flops(self) -> dict[str, int]:
    """Operations of the products over visible pairs: two forward, five more backward."""
    return {'forward': 4 * self.pairs * self.width, 'both': 14 * self.pairs * self.width}


class Programs(NamedTuple):
  """What is timed: neither waits for its results, `wait` does.

  `forward` returns the output [B, L, H, E]; `both` that and the gradients of queries, keys and
  values, or is None where the contender has no backward pass.
  """

  forward: Callable[[], Any]
  both: Callable[[], Any] | None
  wait: Callable[[Any], Any]
  temporary_mb: float


class Unsupported(Exception):
  """A contender lacks what the shape asks for."""


def _operands(shape: Shape) -> list[np.ndarray]:
  """Returns queries, keys, values [B, L, heads, E] and the output's cotangent, float32."""
  rng = np.random.default_rng(0)
  heads = (shape.heads, shape.key_heads, shape.key_heads, shape.heads)
  return [rng.normal(size=(shape.batch, shape.length, n, shape.width)).astype(np.float32)
          for n in heads]


def _ours(name: str, shape: Shape) -> Callable:
  from models.attention import configured_attention
  from models.config import ModelConfig
  from models.kernels.interface import Mask
  attend = configured_attention(ModelConfig(attention=OURS[name]))
  options = {'scale': shape.width ** -0.5, 'mask': Mask(window=shape.window)}
  return lambda q, k, v: attend(q, k, v, **options).out_BLHE


def _jax(name: str, shape: Shape) -> Callable:
  import jax
  window = (shape.window - 1, 0) if shape.window else None
  implementation = 'cudnn' if name == 'cudnn' else 'xla'
  return lambda q, k, v: jax.nn.dot_product_attention(
      q, k, v, is_causal=True, local_window_size=window, implementation=implementation)


def _repeated(shape: Shape, attend: Callable) -> Callable:
  """Returns attention for kernels without grouped heads: keys and values are repeated."""
  import jax.numpy as jnp
  n = shape.heads // shape.key_heads
  return lambda q, k, v: attend(q, jnp.repeat(k, n, axis=2), jnp.repeat(v, n, axis=2))


def _pallas_triton(unused_name: str, shape: Shape) -> Callable:
  from jax.experimental.pallas.ops.gpu import attention
  if shape.window:
    raise Unsupported('no windows')
  return _repeated(shape, lambda q, k, v: attention.mha(
      q, k, v, None, sm_scale=shape.width ** -0.5, causal=True))


def _pallas_mosaic(unused_name: str, shape: Shape) -> Callable:
  from jax.experimental.pallas.ops.gpu import attention_mgpu
  if shape.window:
    raise Unsupported('no windows')
  config = attention_mgpu.TuningConfig(
      block_q=64, block_kv=128, max_concurrent_steps=2, causal=True)
  return lambda q, k, v: attention_mgpu.attention(q * shape.width ** -0.5, k, v, config)


NO_BACKWARD = ('pallas_mosaic',)  # of causal attention
JAX_CONTENDERS = {**dict.fromkeys(OURS, _ours), 'jax': _jax, 'cudnn': _jax,
                  'pallas_triton': _pallas_triton, 'pallas_mosaic': _pallas_mosaic}


def _jax_programs(name: str, shape: Shape) -> Programs:
  import jax
  attend = JAX_CONTENDERS[name](name, shape)
  *qkv, g = (jax.numpy.asarray(x, shape.dtype) for x in _operands(shape))

  def both(q, k, v, g):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, *vjp(g)

  forward = jax.jit(attend).lower(*qkv).compile()
  if name in NO_BACKWARD:
    temporary = forward.memory_analysis().temp_size_in_bytes
    return Programs(lambda: forward(*qkv), None, jax.block_until_ready, temporary / 1e6)
  backward = jax.jit(both).lower(*qkv, g).compile()
  temporary = backward.memory_analysis().temp_size_in_bytes
  return Programs(lambda: forward(*qkv), lambda: backward(*qkv, g), jax.block_until_ready,
                  temporary / 1e6)


def _torch_programs(shape: Shape, platform: str) -> Programs:
  """Returns the programs of PyTorch, which says its temporary memory on GPUs only."""
  import torch
  from torch.nn.functional import scaled_dot_product_attention
  if shape.window:
    raise Unsupported('no windows')
  device = 'cuda' if platform == 'gpu' else 'cpu'
  q, k, v, g = (torch.from_numpy(x).to(device, getattr(torch, shape.dtype)).transpose(1, 2)
                .contiguous() for x in _operands(shape))
  for x in (q, k, v):
    x.requires_grad_()

  def attend():
    return scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=shape.heads != shape.key_heads)

  def forward():
    with torch.no_grad():
      return attend().transpose(1, 2)

  def both():
    out = attend()
    return tuple(x.transpose(1, 2) for x in (out.detach(), *torch.autograd.grad(out, (q, k, v), g)))

  def wait(result):
    if device == 'cuda':
      torch.cuda.synchronize()
    return result

  before = torch.cuda.memory_allocated() if device == 'cuda' else 0
  wait(both())
  peak = torch.cuda.max_memory_allocated() - before if device == 'cuda' else math.nan
  return Programs(forward, both, wait, peak / 1e6)


def programs(name: str, shape: Shape, platform: str) -> Programs:
  """Returns the compiled programs of a contender on 'cpu' or 'gpu'.

  Raises:
    Unsupported: it lacks what the shape asks for.
  """
  if name == 'torch_sdpa':
    return _torch_programs(shape, platform)
  return _jax_programs(name, shape)


def digest(results: Any) -> list[tuple[float, float]]:
  """Returns the norm of every array and its product with fixed random numbers."""
  digests = []
  for x in results:
    x = np.asarray(x.detach().double().cpu() if hasattr(x, 'detach') else x, np.float64)
    probe = np.random.default_rng(1).normal(size=x.shape)
    digests.append((float(np.linalg.norm(x)), float((x * probe).sum())))
  return digests
