"""Ranks block sizes of the TPU attention kernels and prints entries for models/kernels/blocks.py.

  python -m experiments.benchmarks.tune_attention                                 # on a TPU: timed
  python -m experiments.benchmarks.tune_attention --topologies=v5e:2x4,v6e:2x4    # compiled

On a TPU every candidate is timed. Elsewhere it is compiled for the topologies (libtpu: pip install
-e '.[test]') and ranked by the compiler's own schedule: the instruction bundles of what a grid step
runs, one bundle a cycle, times how often it runs; or by the bytes that its blocks move at the
published bandwidth of HBM, whichever takes longer. That sees work, overhead per step and waste on
masked pairs; it does not see stalls, so entries it gives are a start and a chip has the last word.
Causal attention, forward and backward, one row of four query heads and two key heads per device.
"""

import functools
import math
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments.benchmarks import command_line, schedules, tpu_programs
from experiments.benchmarks.estimates import machine, table
from models.kernels import flash_tpu
from models.kernels.interface import Mask
from parallelism.topologies import EXAMPLES, compile_only_devices
from research.errors import UserError

TOPOLOGIES = flags.DEFINE_list('topologies', list(EXAMPLES), 'where no TPU is')
WIDTHS = flags.DEFINE_list('widths', ['64', '128', '256'], 'head widths')
DTYPES = flags.DEFINE_list('dtypes', ['bfloat16'], 'of bfloat16, float32')
LENGTH = flags.DEFINE_integer('length', 8192, 'tokens per row', lower_bound=1)
WINDOW = flags.DEFINE_integer('window', 0, 'keys that a query sees; 0 means all before it',
                              lower_bound=0)
BLOCKS = flags.DEFINE_list(
    'blocks', ['512x512', '256x512', '512x256', '512x1024', '1024x512', '1024x1024', '512x2048'],
    'candidates, queries x keys')
ROUNDS = flags.DEFINE_integer('rounds', 10, 'timings of a candidate on a TPU', lower_bound=1)


class Ranked(NamedTuple):
  """A candidate: its time, and how it comes about; infinity, and why it was refused."""

  seconds: float
  how: str


def _timed(blocks: tuple[int, int], width: int, dtype: str) -> Ranked:
  """Returns the median time of a candidate on the TPU at hand."""
  rng = np.random.default_rng(0)
  q, k, v, g = (jnp.asarray(rng.normal(size=(1, LENGTH.value, heads, width)), dtype)
                for heads in (4, 2, 2, 4))

  @jax.jit
  def both(q, k, v, g):
    attend = functools.partial(flash_tpu.attention, scale=width ** -0.5, q_block=blocks[0],
                               k_block=blocks[1], mask=Mask(window=WINDOW.value))
    out, vjp, _ = jax.vjp(lambda *qkv: tuple(attend(*qkv)), q, k, v, has_aux=True)
    return out, vjp(g)
  jax.block_until_ready(both(q, k, v, g))
  seconds = []
  for _ in range(ROUNDS.value):
    began = time.perf_counter()
    jax.block_until_ready(both(q, k, v, g))
    seconds.append(time.perf_counter() - began)
  return Ranked(statistics.median(seconds), f'median of {ROUNDS.value}')


def _scheduled(topology: str, blocks: tuple[int, int], width: int, dtype: str,
               folder: pathlib.Path) -> Ranked:
  """Returns the time that the schedule of a candidate's kernels gives."""
  schedules.empty(folder)
  case = tpu_programs.Case(topology, 'flash_tpu', LENGTH.value, width, dtype, WINDOW.value)
  attend = functools.partial(flash_tpu.attention, q_block=blocks[0], k_block=blocks[1])
  compiled = tpu_programs.lowered(case, attend).compile(tpu_programs.IN_HBM)
  device = compile_only_devices(topology)[0]
  cycles = schedules.cycles(
      schedules.read_kernels(folder), Mask(window=WINDOW.value), LENGTH.value, blocks,
      tpu_programs.HEADS // 2, tpu_programs.KEY_HEADS // 2)
  rate = schedules.CLOCK[device.device_kind] * device.num_cores
  moved = compiled.cost_analysis()['bytes accessed'] / schedules.BANDWIDTH[device.device_kind]
  seconds = sum(cycles.values()) / rate
  how = ', '.join(f'{name.removeprefix("flash_tpu_")} {n / rate * 1e3:.3f} ms'
                  for name, n in cycles.items())
  return Ranked(max(seconds, moved), f'{how}, moving bytes {moved * 1e3:.3f} ms')


def _rank(kind: str, measure: Callable[[tuple[int, int], int, str], Ranked]) -> list[str]:
  """Prints the candidates of every shape, best first; returns table entries of the winners."""
  entries = []
  for dtype in DTYPES.value:
    for width in map(int, WIDTHS.value):
      ranked = {}
      for blocks in _candidates():
        try:
          ranked[blocks] = measure(blocks, width, dtype)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
          ranked[blocks] = Ranked(math.inf, f'refused: {tpu_programs.reason(error)}')
        print(f'{kind} {dtype} {width} {blocks[0]}x{blocks[1]}: {ranked[blocks].how}', flush=True)
      order = sorted(ranked, key=lambda blocks: ranked[blocks].seconds)
      rows = [[f'{q}x{k}', _milliseconds(ranked[q, k])] for q, k in order]
      print('\n' + table([f'{kind}, {dtype}, E {width}, L {LENGTH.value:,}', 'ms'], rows) + '\n')
      if math.isfinite(ranked[order[0]].seconds):
        entries.append(f'  ({kind!r}, {dtype!r}, {width}, {_reach()}): {order[0]},')
  return entries


def _milliseconds(ranked: Ranked) -> str:
  """Returns the time of a candidate, or why it has none."""
  return f'{ranked.seconds * 1e3:.3f}' if math.isfinite(ranked.seconds) else ranked.how


def _reach() -> int:
  """Returns how many keys a query can see at most."""
  return min(LENGTH.value, WINDOW.value or LENGTH.value)


def _candidates() -> list[tuple[int, int]]:
  """Returns the candidates that fit the length."""
  result = []
  for text in BLOCKS.value:
    q, _, k = text.partition('x')
    if not all(n.isdigit() and int(n) and int(n) % 128 == 0 for n in (q, k)):
      raise UserError(f'--blocks={text} is not two positive multiples of 128 like 512x1024')
    if max(int(q), int(k)) <= LENGTH.value:
      result.append((int(q), int(k)))
  return result


def main() -> None:
  command_line.chosen(DTYPES, tpu_programs.DTYPES)
  command_line.chosen(WIDTHS, [str(n) for n in range(257) if flash_tpu.takes_width(n)])
  topologies = command_line.chosen(TOPOLOGIES, EXAMPLES)
  if not _candidates():
    raise UserError(f'--blocks={",".join(BLOCKS.value)}: none fits --length={LENGTH.value}')
  print(machine(), flush=True)
  if jax.default_backend() == 'tpu':
    entries = _rank(jax.devices()[0].device_kind, _timed)
  else:
    entries = []
    with tempfile.TemporaryDirectory() as folder:
      schedules.write_schedules_to(pathlib.Path(folder))
      for topology in topologies:
        try:
          kind = compile_only_devices(topology)[0].device_kind
        except ValueError as error:
          raise UserError(str(error)) from error
        measure = functools.partial(_scheduled, topology, folder=pathlib.Path(folder))
        entries += _rank(kind, measure)
  print('TABLE entries for models/kernels/blocks.py:\n' + '\n'.join(entries))


if __name__ == '__main__':
  command_line.run(main)
