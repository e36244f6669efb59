"""A PyTorch training step of the same decoder: eager, torch.compile, bf16 autocast."""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from experiments.benchmarks import shapes
from experiments.benchmarks.shapes import Shape, Weights


def rotate(x_BHLE: torch.Tensor, cos_LE: torch.Tensor, sin_LE: torch.Tensor) -> torch.Tensor:
  """Returns heads rotated by position, pairs (i, i + E / 2)."""
  cos_LE, sin_LE = cos_LE.to(x_BHLE.dtype), sin_LE.to(x_BHLE.dtype)
  x1, x2 = x_BHLE.chunk(2, dim=-1)
  return torch.cat([x1 * cos_LE - x2 * sin_LE, x2 * cos_LE + x1 * sin_LE], dim=-1)


class Block(nn.Module):
  """Attention and feed-forward, each after its norm."""

  def __init__(self, shape: Shape):
    super().__init__()
    D, HE = shape.d_model, shape.n_heads * shape.d_head
    self.heads = (shape.n_heads, shape.d_head)
    self.attention_norm = nn.RMSNorm(D, eps=shapes.NORM_EPS)
    self.mlp_norm = nn.RMSNorm(D, eps=shapes.NORM_EPS)
    self.q = nn.Linear(D, HE, bias=False)
    self.k = nn.Linear(D, HE, bias=False)
    self.v = nn.Linear(D, HE, bias=False)
    self.o = nn.Linear(HE, D, bias=False)
    self.gate = nn.Linear(D, shape.d_ff, bias=False)
    self.up = nn.Linear(D, shape.d_ff, bias=False)
    self.down = nn.Linear(shape.d_ff, D, bias=False)

  def forward(self, x_BLD: torch.Tensor, cos_LE: torch.Tensor, sin_LE: torch.Tensor):
    B, L, _ = x_BLD.shape
    y_BLD = self.attention_norm(x_BLD)
    q_BHLE, k_BHLE, v_BHLE = (p(y_BLD).view(B, L, *self.heads).transpose(1, 2)
                              for p in (self.q, self.k, self.v))
    q_BHLE, k_BHLE = rotate(q_BHLE, cos_LE, sin_LE), rotate(k_BHLE, cos_LE, sin_LE)
    out_BHLE = F.scaled_dot_product_attention(q_BHLE, k_BHLE, v_BHLE, is_causal=True)
    x_BLD = x_BLD + self.o(out_BHLE.transpose(1, 2).reshape(B, L, -1))
    y_BLD = self.mlp_norm(x_BLD)
    return x_BLD + self.down(F.silu(self.gate(y_BLD)) * self.up(y_BLD))


class Decoder(nn.Module):
  """Tokens and targets to the mean cross-entropy, embeddings tied."""

  def __init__(self, shape: Shape):
    super().__init__()
    self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
    self.layers = nn.ModuleList([Block(shape) for _ in range(shape.n_layers)])
    self.final_norm = nn.RMSNorm(shape.d_model, eps=shapes.NORM_EPS)
    cos_LE, sin_LE = shapes.rope_tables(shape)
    self.register_buffer('cos_LE', torch.from_numpy(cos_LE))
    self.register_buffer('sin_LE', torch.from_numpy(sin_LE))

  def forward(self, tokens_BL: torch.Tensor, targets_BL: torch.Tensor) -> torch.Tensor:
    x_BLD = self.embedding(tokens_BL)
    for layer in self.layers:
      x_BLD = layer(x_BLD, self.cos_LE, self.sin_LE)
    logits_BLV = F.linear(self.final_norm(x_BLD), self.embedding.weight)
    return F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten())


def decoder(shape: Shape, weights: Weights) -> Decoder:
  """Returns the decoder with modehop's weights."""
  model, D = Decoder(shape), shape.d_model
  placed = {'embedding.weight': weights['embedding.tokens'],
            'final_norm.weight': weights['final_norm.scale']}
  for i in range(shape.n_layers):
    block = {name.removeprefix('blocks.'): x[i] for name, x in weights.items()
             if name.startswith('blocks.')}
    for name in ('attention_norm', 'mlp_norm'):
      placed[f'layers.{i}.{name}.weight'] = block[f'{name}.scale']
    for name in 'qkv':
      placed[f'layers.{i}.{name}.weight'] = block[f'attention.{name}'].reshape(D, -1).T
    placed[f'layers.{i}.o.weight'] = block['attention.o'].reshape(-1, D).T
    for name in ('gate', 'up', 'down'):
      placed[f'layers.{i}.{name}.weight'] = block[f'mlp.{name}'].T
  with torch.no_grad():
    parameters = dict(model.named_parameters())
    assert parameters.keys() == placed.keys()
    for name, parameter in parameters.items():
      parameter.copy_(torch.tensor(placed[name]))
  return model


def _optimizer(model: Decoder) -> torch.optim.AdamW:
  """Returns fused AdamW; norm scales and the embedding don't decay."""
  groups = {True: [], False: []}
  for name, parameter in model.named_parameters():
    groups[parameter.ndim > 1 and not name.startswith('embedding')].append(parameter)
  return torch.optim.AdamW(
      [{'params': groups[True], 'weight_decay': shapes.WEIGHT_DECAY},
       {'params': groups[False], 'weight_decay': 0.0}],
      lr=shapes.LEARNING_RATE, betas=(shapes.B1, shapes.B2), eps=shapes.EPS, fused=True)


def start(shape: Shape, n_rows: int, weights: Weights, compiled: bool, dtype: str) -> Callable:
  """Returns step(batch) -> read; the step runs the update, read() returns its loss."""
  del n_rows
  model = decoder(shape, weights)
  optimizer = _optimizer(model)
  loss_fn = torch.compile(model) if compiled else model
  autocast = contextlib.nullcontext if dtype == 'float32' else (
      lambda: torch.autocast('cpu', dtype=torch.bfloat16))

  def step(batch: shapes.Batch) -> Callable[[], float]:
    tokens_BL = torch.from_numpy(batch['tokens']).long()
    targets_BL = torch.from_numpy(batch['targets']).long()
    optimizer.zero_grad(set_to_none=True)
    with autocast():
      loss = loss_fn(tokens_BL, targets_BL)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), shapes.CLIP_NORM)
    optimizer.step()
    return loss.item
  return step
