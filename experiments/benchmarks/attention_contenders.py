"""Owns who takes part in the attention benchmark: for each name a forward and a backward step."""

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
    """Operations of the products over visible pairs: two forward, five backward."""
    return {'forward': 4 * self.pairs * self.width, 'backward': 10 * self.pairs * self.width}


class Steps(NamedTuple):
  """What is timed: neither waits for its results, `wait` does for one's."""

  forward: Callable[[], Any]
  backward: Callable[[], Any]
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


JAX_CONTENDERS = {**dict.fromkeys(OURS, _ours), 'jax': _jax, 'cudnn': _jax,
                  'pallas_triton': _pallas_triton, 'pallas_mosaic': _pallas_mosaic}


def _jax_steps(name: str, shape: Shape) -> Steps:
  import jax
  attend = JAX_CONTENDERS[name](name, shape)
  operands = [jax.numpy.asarray(x, shape.dtype) for x in _operands(shape)]
  *qkv, g = operands
  forward = jax.jit(lambda *qkv: jax.vjp(attend, *qkv))
  backward = jax.jit(lambda vjp, g: vjp(g))
  _, vjp = forward(*qkv)

  def both(q, k, v, g):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, vjp(g)

  memory = jax.jit(both).lower(*operands).compile().memory_analysis()
  return Steps(lambda: forward(*qkv)[0], lambda: backward(vjp, g), jax.block_until_ready,
               memory.temp_size_in_bytes / 1e6)


def _torch_steps(unused_name: str, shape: Shape, platform: str) -> Steps:
  """Returns the steps of PyTorch, which says its temporary memory on GPUs only."""
  import torch
  from torch.nn.functional import scaled_dot_product_attention
  if shape.window:
    raise Unsupported('no windows')
  device = 'cuda' if platform == 'gpu' else 'cpu'
  q, k, v, g = (torch.from_numpy(x).to(device, getattr(torch, shape.dtype)).transpose(1, 2)
                .contiguous() for x in _operands(shape))
  for x in (q, k, v):
    x.requires_grad_()

  def forward():
    return scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=shape.heads != shape.key_heads)

  def wait(result):
    if device == 'cuda':
      torch.cuda.synchronize()
    return result

  before = torch.cuda.memory_allocated() if device == 'cuda' else 0
  out = forward()

  def backward():
    return torch.autograd.grad(out, (q, k, v), g, retain_graph=True)

  wait(backward())
  peak = torch.cuda.max_memory_allocated() - before if device == 'cuda' else math.nan
  return Steps(lambda: forward().detach(), backward, wait, peak / 1e6)


def steps(name: str, shape: Shape, platform: str) -> Steps:
  """Returns the compiled steps of a contender on 'cpu' or 'gpu'.

  Raises:
    Unsupported: it lacks what the shape asks for.
  """
  if name == 'torch_sdpa':
    return _torch_steps(name, shape, platform)
  return _jax_steps(name, shape)
