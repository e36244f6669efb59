"""Times attention beside what JAX and PyTorch ship.

  python -m experiments.benchmarks.attention
  python -m experiments.benchmarks.attention --lengths=2048 --contenders=blockwise,torch_sdpa
  python -m experiments.benchmarks.attention --heads=32 --key_heads=4 --widths=64,128 --window=1024

Causal attention. On CPUs in float32: modehop's `unrolled` and `blockwise`, `einsum` (modehop's
oracle, all pairs at once), `jax` (jax.nn.dot_product_attention) and `torch_sdpa` (an extra: pip
install -e '.[bench]'). On a Hopper GPU in bfloat16: `flash_gpu` and `blockwise`, `jax`, `cudnn`
(jax.nn.dot_product_attention by cuDNN), `pallas_triton` and `pallas_mosaic` (jax's shipped Pallas
kernels; one has no grouped heads and gets repeated keys, one has no causal backward pass) and
`torch_sdpa`. Forward alone is one program, forward and backward another; rates count two products
over the visible pairs and seven. Each contender has a process of its own, idle while another is
timed; rounds are interleaved. Temporary MB are the compiler's, of forward and backward (PyTorch:
the allocator's, on GPUs).
"""

import os
from typing import Any

from absl import flags

from experiments.benchmarks import attention_contenders, command_line
from experiments.benchmarks.attention_contenders import Shape, Unsupported
from experiments.benchmarks.contenders import measurable
from experiments.benchmarks.estimates import estimate, machine, table
from experiments.benchmarks.rounds import Lacks, Started, Step, interleaved
from research.errors import UserError

LENGTHS = flags.DEFINE_list('lengths', None, 'tokens per row; 512 to 8,192, on GPUs 1k to 32k')
BATCH = flags.DEFINE_integer('batch', 1, 'rows', lower_bound=1)
HEADS = flags.DEFINE_integer('heads', 4, 'query heads', lower_bound=1)
KEY_HEADS = flags.DEFINE_integer('key_heads', 4, 'key heads, dividing the heads', lower_bound=1)
WIDTHS = flags.DEFINE_list('widths', ['64'], 'widths of a head')
WINDOW = flags.DEFINE_integer('window', 0, 'keys that a query sees at most; 0 = all', lower_bound=0)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'interleaved rounds', lower_bound=1)
SECONDS = flags.DEFINE_float(
    'seconds', 1.0, 'how long each program of a contender is timed per round', lower_bound=0)
NAMES = flags.DEFINE_list('contenders', None, 'who is measured, by name; all of the platform')
DIRECTIONS = {'forward': 'forward', 'both': 'forward and backward'}
TOLERANCE = {'float32': 1e-4, 'bfloat16': 2e-2}


def _start(name: str, shape: Shape, platform: str) -> Started | Lacks:
  """Builds and warms up the programs of this process."""
  try:
    made = attention_contenders.programs(name, shape, platform)
    results = [made.wait(made.forward())] if made.both is None else made.wait(made.both())
  except Exception as error:  # A rival that lacks or breaks something is a row that says so.
    if isinstance(error, Unsupported) or name not in attention_contenders.OURS:
      return Lacks(f'{type(error).__name__}: {(str(error).splitlines() or [""])[0][:60]}')
    raise
  steps = {'forward': Step(made.forward, made.wait)}
  if made.both is not None:
    steps['both'] = Step(made.both, made.wait)
  return Started(steps, {'digest': attention_contenders.digest(results),
                         'temporary_mb': made.temporary_mb})


def _compare(shape: Shape, names: list[str], platform: str) -> str:
  """Returns the table of one shape."""

  def check(facts: dict[str, Any]) -> None:
    if not facts:
      raise UserError(f'none of {", ".join(names)} takes {shape}')
    first, *others = facts
    for name in others:
      for (norm, probe), (_, other) in zip(facts[first]['digest'], facts[name]['digest']):
        # A random error of relative size e moves the product by e times the norm, give or take.
        if not abs(probe - other) <= 4 * TOLERANCE[shape.dtype] * norm:
          raise UserError(f'{name} does not compute what {first} does at length {shape.length}')

  facts, seconds = interleaved(
      _start, {name: (name, shape, platform) for name in names}, check, ROUNDS.value,
      SECONDS.value, n_before=2)
  first = next(iter(seconds))
  unit = 'TFLOP/s' if platform == 'gpu' else 'GFLOP/s'
  header = [f'B={shape.batch} L={shape.length:,} H={shape.heads} K={shape.key_heads} '
            f'E={shape.width} window={shape.window or "none"} {shape.dtype}']
  for direction in DIRECTIONS.values():
    header += [f'{direction}, {unit}', f'time / {first}']
  rows = [_row(name, facts[name], shape, seconds, first) for name in names]
  return table([*header, 'temporary MB'], rows)


def _row(name: str, facts: Any, shape: Shape, seconds: dict, first: str) -> list[str]:
  """Returns a contender's row: rates and times relative to the first one's, with intervals."""
  if isinstance(facts, Lacks):
    return [f'{name} ({facts.reason})', *['-'] * 5]
  cells = [name]
  for direction in DIRECTIONS:
    own, best = seconds[name].get(direction), seconds[first].get(direction)
    if own is None or best is None:
      cells += ['-', '-']
      continue
    flops = shape.flops[direction] / (1e12 if shape.dtype == 'bfloat16' else 1e9)
    rate = estimate([flops / s for s in own])
    ratio = estimate([s / b for s, b in zip(own, best, strict=True)])
    cells += [f'{rate.median:.0f} ({rate.low:.0f} to {rate.high:.0f})',
              f'{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})']
  return [*cells, f'{facts["temporary_mb"]:.1f}']


def main() -> None:
  # Several processes share the GPU, so none may take all of its memory.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  import jax
  platform = jax.default_backend()
  if platform not in ('cpu', 'gpu'):
    raise UserError(f'there are no contenders for {platform}; run it on a CPU or a Hopper GPU')
  lengths = ['512', '1024', '2048', '4096', '8192']
  if platform == 'gpu':
    lengths = ['1024', '2048', '4096', '8192', '16384', '32768']
  if HEADS.value % KEY_HEADS.value:
    raise UserError(f'--heads={HEADS.value} is not a multiple of --key_heads={KEY_HEADS.value}')
  known = attention_contenders.GPU if platform == 'gpu' else attention_contenders.CPU
  names = measurable(command_line.chosen(NAMES, known), of_torch='torch_sdpa')
  print({**machine(), 'device': jax.devices()[0].device_kind}, flush=True)
  dtype = 'bfloat16' if platform == 'gpu' else 'float32'
  for width in command_line.positive_numbers(WIDTHS):
    for length in command_line.positive_numbers(LENGTHS, lengths):
      shape = Shape(BATCH.value, length, HEADS.value, KEY_HEADS.value, width, WINDOW.value, dtype)
      print(f'\n{_compare(shape, names, platform)}', flush=True)


if __name__ == '__main__':
  command_line.run(main)
