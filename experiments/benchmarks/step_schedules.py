"""Compares grid steps of attention kernels, ours and JAX's own, by the TPU compiler's schedule.

  python -m experiments.benchmarks.step_schedules --topologies=v5e:2x4 --width=128

Takes libtpu (pip install -e '.[test]' or '.[tpu]') and no TPU. All kernels have blocks of 512
queries and 512 keys, operands in HBM, causal masks. Numbers are bundles of instructions, one a
cycle: `step` is the work on a pair of blocks (ours has one for pairs in which the mask hides
nothing; the others mask every pair), `always` what comes with every grid step, `ends` the start
and the finish of a block. `per pair` is a step and what comes with it. By default JAX's kernels
round float32 to bfloat16 in their products, --precision=highest keeps it as ours do.
"""

import pathlib
import tempfile

from absl import flags
import jax

from experiments.benchmarks import command_line, schedules, tpu_programs
from experiments.benchmarks.estimates import machine, table
from models.kernels import flash_tpu
from parallelism.topologies import EXAMPLES, compile_only_devices
from research.errors import UserError

TOPOLOGIES = flags.DEFINE_list('topologies', list(EXAMPLES), 'for which TPUs')
WIDTH = flags.DEFINE_integer('width', 128, 'width of a head')
DTYPE = flags.DEFINE_enum('dtype', 'bfloat16', tpu_programs.DTYPES, 'of all operands')
PRECISION = flags.DEFINE_enum('precision', 'default', ['default', 'highest'],
                              'of float32 products in the kernels of JAX; ours: always the highest')
LENGTH = 4096


def _rows(topology: str, contender: str, folder: pathlib.Path) -> list[list[str]]:
  """Returns the rows of a contender's kernels, or one with the reason why there are none."""
  schedules.empty(folder)
  ours = contender == 'flash_tpu'
  case = tpu_programs.Case(topology, contender, LENGTH, WIDTH.value, DTYPE.value, 0)
  blocks = {'q_block': tpu_programs.BLOCK, 'k_block': tpu_programs.BLOCK} if ours else {}
  with jax.default_matmul_precision(PRECISION.value):
    record = tpu_programs.compiled_case(case, tpu_programs.IN_HBM, **blocks)
  if 'error' in record:
    return [[f'{contender}: {record["error"]}', '', '', '', '']]
  rows = []
  for name, text in schedules.read_kernels(folder).items():
    part = schedules.parts(text, 2 if ours else 1)
    rows.append([f'{contender}: {name.partition("_block")[0]}', f'{part.always + part.steps[0]:,}',
                 ', '.join(f'{step:,}' for step in part.steps), f'{part.always:,}',
                 f'{part.start + part.finish:,}'])
  return rows


def main() -> None:
  if not flash_tpu.takes_width(WIDTH.value):
    raise UserError(f'--width={WIDTH.value} is not one that flash_tpu takes: 32 to 256 by 8')
  topologies = command_line.chosen(TOPOLOGIES, EXAMPLES)
  print(machine(), flush=True)
  with tempfile.TemporaryDirectory() as folder:
    schedules.write_schedules_to(pathlib.Path(folder))
    for topology in topologies:
      try:
        compile_only_devices(topology)
      except ValueError as error:
        raise UserError(str(error)) from error
      rows = [row for contender in ('flash_tpu', 'jax flash', 'jax splash')
              for row in _rows(topology, contender, pathlib.Path(folder))]
      header = [f'{topology}, E {WIDTH.value}, {DTYPE.value}', 'per pair', 'step', 'always', 'ends']
      print(f'\n{table(header, rows)}', flush=True)


if __name__ == '__main__':
  command_line.run(main)
