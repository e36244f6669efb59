"""Times attention, forward and backward, beside dense JAX and PyTorch on the CPU.

  python -m experiments.benchmarks.attention
  python -m experiments.benchmarks.attention --lengths=2048 --contenders=blockwise,torch_sdpa

Causal attention in float32 over heads of width --width: modehop's `unrolled` and `blockwise`,
`einsum` (modehop's oracle, all pairs at once), `jax` (jax.nn.dot_product_attention) and
`torch_sdpa` (an extra: pip install -e '.[bench]'). GFLOP/s count seven products over the visible
pairs, two forward and five backward. Each contender has a process of its own, blocked while another
is timed; rounds are interleaved. Temporary MB are the compiler's.
"""

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks import command_line
from experiments.benchmarks.estimates import estimate, machine, table
from experiments.benchmarks.rounds import interleaved
from research.errors import UserError

LENGTHS = flags.DEFINE_list('lengths', ['512', '1024', '2048', '4096', '8192'], 'tokens per row')
HEADS = flags.DEFINE_integer('heads', 4, 'query heads', lower_bound=1)
KEY_HEADS = flags.DEFINE_integer('key_heads', 4, 'key heads, dividing the heads', lower_bound=1)
WIDTH = flags.DEFINE_integer('width', 64, 'width of a head', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'interleaved rounds', lower_bound=1)
SECONDS = flags.DEFINE_float(
    'seconds', 1.0, 'how long a contender is timed per round', lower_bound=0)
NAMES = flags.DEFINE_list('contenders', ['unrolled', 'blockwise', 'einsum', 'jax', 'torch_sdpa'],
                          'who is measured, by name')

Shape = tuple[int, int, int, int]  # length, heads, key heads, width


def _jax_attention(name: str) -> Callable:
  """Returns f(q, k, v) -> output of a JAX contender."""
  import jax

  from models.attention import configured_attention
  from models.config import ModelConfig
  ours = {'unrolled': 'unrolled', 'blockwise': 'blockwise', 'einsum': 'oracle'}
  if name in ours:
    attend = configured_attention(ModelConfig(attention=ours[name]))
    return lambda q, k, v: attend(q, k, v, scale=q.shape[-1] ** -0.5).out_BLHE
  return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True)


def _operands(shape: Shape) -> list[np.ndarray]:
  L, H, K, E = shape
  rng = np.random.default_rng(0)
  return [rng.normal(size=(1, L, heads, E)).astype(np.float32) for heads in (H, K, K, H)]


def _jax_step(name: str, shape: Shape) -> tuple[Callable, float]:
  """Returns a step that waits for all gradients, and the compiler's temporary megabytes."""
  import jax
  attend = _jax_attention(name)

  def both(q, k, v, g):
    out, vjp = jax.vjp(attend, q, k, v)
    return out, vjp(g)
  operands = [jax.numpy.asarray(x) for x in _operands(shape)]
  compiled = jax.jit(both).lower(*operands).compile()
  return (lambda: jax.block_until_ready(compiled(*operands)),
          compiled.memory_analysis().temp_size_in_bytes / 1e6)


def _torch_step(shape: Shape) -> tuple[Callable, float]:
  """Returns a step that computes all gradients; PyTorch does not say its temporary memory."""
  import torch
  q, k, v, g = (torch.from_numpy(x).transpose(1, 2).contiguous() for x in _operands(shape))
  for x in (q, k, v):
    x.requires_grad_()

  def step():
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
    return out.detach(), torch.autograd.grad(out, (q, k, v), g)
  return step, math.nan


def _start(name: str, shape: Shape) -> tuple[Callable, dict[str, Any]]:
  """Returns the step of a contender, warmed up, and its facts with a digest of its results."""
  step, temporary_mb = _torch_step(shape) if name == 'torch_sdpa' else _jax_step(name, shape)
  out, gradients = step()
  norms = [float(np.linalg.norm(np.asarray(x, np.float64))) for x in (out, *gradients)]
  return step, {'norms': norms, 'temporary_mb': temporary_mb}


def _compare(shape: Shape, names: list[str]) -> str:
  """Returns the table of one length."""
  L, H, _, E = shape

  def check(facts: dict[str, dict[str, Any]]) -> None:
    for name in names:
      if not np.allclose(facts[name]['norms'], facts[names[0]]['norms'], rtol=1e-4):
        raise UserError(f'{name} does not compute what {names[0]} does at length {L}')

  facts, seconds = interleaved(
      _start, {name: (name, shape) for name in names}, check, ROUNDS.value, SECONDS.value)
  flops = 7 * H * E * L * L
  rows = []
  for name in names:
    rate = estimate([flops / s / 1e9 for s in seconds[name]])
    ratio = estimate([s / best for s, best in zip(seconds[name], seconds[names[0]], strict=True)])
    rows.append([name, f'{rate.median:.0f} ({rate.low:.0f} to {rate.high:.0f})',
                 f'{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})',
                 f'{facts[name]["temporary_mb"]:.1f}'])
  return table([f'L = {L:,}', 'GFLOP/s', f'time / {names[0]}', 'temporary MB'], rows)


def main() -> None:
  known = NAMES.default
  for name in NAMES.value:
    if name not in known:
      raise UserError(f'--contenders={name} is not one of {", ".join(known)}')
  if HEADS.value % KEY_HEADS.value:
    raise UserError(f'--heads={HEADS.value} is not a multiple of --key_heads={KEY_HEADS.value}')
  names = list(dict.fromkeys(NAMES.value))
  if 'torch_sdpa' in names and importlib.util.find_spec('torch') is None:
    names.remove('torch_sdpa')
    print("torch_sdpa: skipped. PyTorch is absent; pip install -e '.[bench]'")
  if not names:
    raise UserError('--contenders names nobody who can be measured')
  print(machine(), flush=True)
  for length in LENGTHS.value:
    if not length.isdigit() or not int(length):
      raise UserError(f'--lengths={length} is not a positive whole number')
    shape = (int(length), HEADS.value, KEY_HEADS.value, WIDTH.value)
    print(f'\n{_compare(shape, names)}', flush=True)


if __name__ == '__main__':
  command_line.run(main)
