"""Greedy generation in eager PyTorch over a key-value cache that is allocated once."""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from experiments.benchmarks.shapes import Shape, Weights
from experiments.benchmarks.torch_step import Block, Decoder, decoder, rotate

Cache = tuple[torch.Tensor, torch.Tensor]  # keys and values of a layer, [B, H, M, E]


def _block(
    layer: Block, x_BLD: torch.Tensor, cache: Cache, start: int, cos_LE: torch.Tensor,
    sin_LE: torch.Tensor) -> torch.Tensor:
  """Returns the block's output for tokens from position `start`; their keys enter the cache."""
  B, L, _ = x_BLD.shape
  y_BLD = layer.attention_norm(x_BLD)
  q_BHLE, k_BHLE, v_BHLE = (p(y_BLD).view(B, L, *layer.heads).transpose(1, 2)
                            for p in (layer.q, layer.k, layer.v))
  stop = start + L
  cache[0][:, :, start:stop] = rotate(k_BHLE, cos_LE, sin_LE)
  cache[1][:, :, start:stop] = v_BHLE
  out_BHLE = F.scaled_dot_product_attention(
      rotate(q_BHLE, cos_LE, sin_LE), cache[0][:, :, :stop], cache[1][:, :, :stop],
      is_causal=L > 1)
  x_BLD = x_BLD + layer.o(out_BHLE.transpose(1, 2).reshape(B, L, -1))
  y_BLD = layer.mlp_norm(x_BLD)
  return x_BLD + layer.down(F.silu(layer.gate(y_BLD)) * layer.up(y_BLD))


def _next(model: Decoder, tokens_BL: torch.Tensor, caches: list[Cache], start: int) -> torch.Tensor:
  """Returns the likeliest token after each row, [B]."""
  stop = start + tokens_BL.shape[1]
  x_BLD = model.embedding(tokens_BL)
  for layer, cache in zip(model.layers, caches, strict=True):
    x_BLD = _block(layer, x_BLD, cache, start, model.cos_LE[start:stop], model.sin_LE[start:stop])
  return F.linear(model.final_norm(x_BLD[:, -1]), model.embedding.weight).argmax(-1)


def generator(shape: Shape, weights: Weights, prompts_BL: np.ndarray) -> Callable[[], np.ndarray]:
  """Returns a function that writes the greedy tokens up to the shape's length, [B, T]."""
  model, (B, n_prompt) = decoder(shape, weights), prompts_BL.shape
  size = (B, shape.n_heads, shape.length, shape.d_head)
  caches = [(torch.empty(size), torch.empty(size)) for _ in range(shape.n_layers)]

  def run() -> np.ndarray:
    with torch.inference_mode():
      written = [_next(model, torch.from_numpy(prompts_BL).long(), caches, 0)]
      for start in range(n_prompt, shape.length - 1):
        written.append(_next(model, written[-1][:, None], caches, start))
      return torch.stack(written, dim=1).numpy()
  return run
