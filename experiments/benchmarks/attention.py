"""Times attention, forward and backward, beside what JAX and PyTorch ship.

  python -m experiments.benchmarks.attention
  python -m experiments.benchmarks.attention --lengths=2048 --contenders=blockwise,torch_sdpa
  python -m experiments.benchmarks.attention --heads=32 --key_heads=4 --widths=64,128 --window=1024

Causal attention. On CPUs in float32: modehop's `unrolled` and `blockwise`, `einsum` (modehop's
oracle, all pairs at once), `jax` (jax.nn.dot_product_attention) and `torch_sdpa` (an extra: pip
install -e '.[bench]'). On a Hopper GPU in bfloat16: `flash_gpu` and `blockwise`, `jax`, `cudnn`
(jax.nn.dot_product_attention by cuDNN), `pallas_triton` and `pallas_mosaic` (jax's shipped Pallas
kernels; those without grouped heads get repeated keys) and `torch_sdpa`. Rates count two products
over the visible pairs forward and five backward. Backward starts from forward's residuals. Each
contender has a process of its own, idle while another is timed; rounds are interleaved. Temporary
MB are the compiler's, of forward and backward in one program (PyTorch: the allocator's, on GPUs).
"""

import importlib.util
import multiprocessing
import os
import time
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks import attention_contenders, command_line
from experiments.benchmarks.attention_contenders import Shape, Steps, Unsupported
from experiments.benchmarks.estimates import estimate, machine, table
from research.errors import UserError

LENGTHS = flags.DEFINE_list('lengths', None, 'tokens per row; 512 to 8,192, on GPUs 1k to 32k')
BATCH = flags.DEFINE_integer('batch', 1, 'rows', lower_bound=1)
HEADS = flags.DEFINE_integer('heads', 4, 'query heads', lower_bound=1)
KEY_HEADS = flags.DEFINE_integer('key_heads', 4, 'key heads, dividing the heads', lower_bound=1)
WIDTHS = flags.DEFINE_list('widths', ['64'], 'widths of a head')
WINDOW = flags.DEFINE_integer('window', 0, 'keys that a query sees at most; 0 = all', lower_bound=0)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'interleaved rounds', lower_bound=1)
SECONDS = flags.DEFINE_float(
    'seconds', 1.0, 'how long each direction of a contender is timed per round', lower_bound=0)
NAMES = flags.DEFINE_list('contenders', None, 'who is measured, by name; all of the platform')
DIRECTIONS = ('forward', 'backward')
TOLERANCE = {'float32': 1e-4, 'bfloat16': 2e-2}

_worker: dict[str, Steps] = {}


def _start(name: str, shape: Shape, platform: str) -> dict[str, Any]:
  """Builds and warms up the steps of this process; returns its facts, or why there are none."""
  try:
    steps = attention_contenders.steps(name, shape, platform)
    out, gradients = steps.wait(steps.forward()), steps.wait(steps.backward())
  except Exception as error:  # A rival that lacks or breaks something is a row that says so.
    if isinstance(error, Unsupported) or name not in attention_contenders.OURS:
      first_line = (str(error).splitlines() or [''])[0]
      return {'lacks': f'{type(error).__name__}: {first_line[:60]}'}
    raise
  _worker['steps'] = steps
  norms = [float(np.linalg.norm(_float64(x))) for x in (out, *gradients)]
  return {'norms': norms, 'temporary_mb': steps.temporary_mb}


def _float64(x: Any) -> np.ndarray:
  """Returns an array of JAX or PyTorch in float64."""
  return np.asarray(x.detach().double().cpu() if hasattr(x, 'detach') else x, np.float64)


def _measure(direction: str, seconds: float) -> float:
  """Returns the seconds of one step of this process; steps are queued, then waited for."""
  steps = _worker['steps']
  step = getattr(steps, direction)

  def timed(n: int) -> float:
    began = time.perf_counter()
    for _ in range(n - 1):
      step()
    steps.wait(step())
    return (time.perf_counter() - began) / n

  return timed(max(1, round(seconds / timed(2))))


def _compare(shape: Shape, names: list[str], platform: str) -> str:
  """Returns the table of one shape."""
  context = multiprocessing.get_context('spawn')
  pools = {name: context.Pool(1) for name in names}
  try:
    facts = {name: pool.apply(_start, (name, shape, platform)) for name, pool in pools.items()}
    able = [name for name in names if 'lacks' not in facts[name]]
    if not able:
      raise UserError(f'none of {", ".join(names)} takes {shape}')
    _check_agreement(shape, facts, able)
    seconds = {name: {direction: [] for direction in DIRECTIONS} for name in able}
    for _ in range(ROUNDS.value):
      for name in able:
        for direction in DIRECTIONS:
          seconds[name][direction].append(
              pools[name].apply(_measure, (direction, SECONDS.value)))
  finally:
    for pool in pools.values():
      pool.terminate()
  rows = [_row(name, facts[name], shape, seconds, able[0]) for name in names]
  unit = 'TFLOP/s' if platform == 'gpu' else 'GFLOP/s'
  header = [f'B={shape.batch} L={shape.length:,} H={shape.heads} K={shape.key_heads} '
            f'E={shape.width} window={shape.window or "none"} {shape.dtype}']
  for direction in DIRECTIONS:
    header += [f'{direction}, {unit}', f'time / {able[0]}']
  return table([*header, 'temporary MB'], rows)


def _check_agreement(shape: Shape, facts: dict[str, dict], able: list[str]) -> None:
  """Raises UserError when a contender computes something else than the first."""
  for name in able:
    if not np.allclose(facts[name]['norms'], facts[able[0]]['norms'], rtol=TOLERANCE[shape.dtype]):
      raise UserError(f'{name} does not compute what {able[0]} does at length {shape.length}')


def _row(name: str, facts: dict, shape: Shape, seconds: dict, first: str) -> list[str]:
  """Returns a contender's row: rates and times relative to the first one's, with intervals."""
  if 'lacks' in facts:
    return [f'{name} ({facts["lacks"]})', *['-'] * 5]
  cells = [name]
  for direction in DIRECTIONS:
    per_unit = shape.flops[direction] / (1e12 if shape.dtype == 'bfloat16' else 1e9)
    own, best = seconds[name][direction], seconds[first][direction]
    rate = estimate([per_unit / s for s in own])
    ratio = estimate([s / b for s, b in zip(own, best, strict=True)])
    cells += [f'{rate.median:.0f} ({rate.low:.0f} to {rate.high:.0f})',
              f'{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})']
  return [*cells, f'{facts["temporary_mb"]:.1f}']


def _contenders(platform: str) -> list[str]:
  """Returns the names to measure; raises UserError for unknown ones."""
  known = attention_contenders.GPU if platform == 'gpu' else attention_contenders.CPU
  for name in NAMES.value or ():
    if name not in known:
      raise UserError(f'--contenders={name} is not one of {", ".join(known)}')
  names = list(dict.fromkeys(NAMES.value or known))
  if 'torch_sdpa' in names and importlib.util.find_spec('torch') is None:
    names.remove('torch_sdpa')
    print("torch_sdpa: skipped. PyTorch is absent; pip install -e '.[bench]'")
  if not names:
    raise UserError('--contenders names nobody who can be measured')
  return names


def _numbers(flag: flags.FlagHolder, default: list[str]) -> list[int]:
  """Returns the numbers of a list flag."""
  for text in flag.value or default:
    if not text.isdigit() or not int(text):
      raise UserError(f'--{flag.name}={text} is not a positive whole number')
  return [int(text) for text in flag.value or default]


def main() -> None:
  # Several processes share the GPU, so none may take all of its memory.
  os.environ.setdefault('XLA_PYTHON_CLIENT_PREALLOCATE', 'false')
  import jax
  platform = jax.default_backend()
  if platform not in ('cpu', 'gpu'):
    raise UserError(f'there are no contenders for {platform}; run it on a CPU or a Hopper GPU')
  lengths = ('512', '1024', '2048', '4096', '8192')
  if platform == 'gpu':
    lengths = ('1024', '2048', '4096', '8192', '16384', '32768')
  if HEADS.value % KEY_HEADS.value:
    raise UserError(f'--heads={HEADS.value} is not a multiple of --key_heads={KEY_HEADS.value}')
  names = _contenders(platform)
  print({**machine(), 'device': jax.devices()[0].device_kind}, flush=True)
  dtype = 'bfloat16' if platform == 'gpu' else 'float32'
  for width in _numbers(WIDTHS, ['64']):
    for length in _numbers(LENGTHS, list(lengths)):
      shape = Shape(BATCH.value, length, HEADS.value, KEY_HEADS.value, width, WINDOW.value, dtype)
      print(f'\n{_compare(shape, names, platform)}', flush=True)


if __name__ == '__main__':
  command_line.run(main)
