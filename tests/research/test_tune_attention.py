"""The tuner of the TPU kernels: schedules are read and added up right, the command works."""

import os
import pathlib
import subprocess
import sys

import pytest

from experiments.benchmarks import schedules
from models.kernels.interface import Mask

ROOT = pathlib.Path(__file__).resolve().parents[2]


def schedule(*sizes: int) -> str:
  """Returns a schedule of 500 bundles, all in one loop, with branches around so many each."""
  lines = {0: 'sbr.rel target = $region999', 499: '/* Start/End empty region 999 */'}
  address = 10
  for i, size in enumerate(sizes):
    lines[address] = f'sbr.rel (%p1) target = $region{i}  ;;  %s1 = sand.u32 1, %s0'
    address += size
    lines[address] = f'%s2 = sld /* Start/End empty region {i} :: Start region 77 */'
    address += 1
  rows = [f'   {i:#x}   : > {{ {lines.get(i, "")} }}' for i in range(1, 500)]
  return '\n'.join(['= control target key start', f'     0   :  {{ {lines[0]} }}', *rows])


def test_parts_of_a_grid_step():
  got = schedules.parts(schedule(30, 100, 120, 40), n_steps=2)
  assert got == schedules.Parts(always=500 - 290, start=30, steps=(100, 120), finish=40)
  # A wait for a copy and the start of one belong to every step.
  got = schedules.parts(schedule(5, 60, 30, 100, 40), n_steps=1)
  assert got == schedules.Parts(always=500 - 170, start=30, steps=(100,), finish=40)


def test_a_schedule_of_another_form_is_refused():
  with pytest.raises(schedules.UnknownSchedule, match=r'parts of \[100, 40\] bundles, not 4 parts'):
    schedules.parts(schedule(100, 40), n_steps=2)


def test_bundles_are_added_up_over_the_grid():
  # Three blocks: three masked pairs on the diagonal, three whole ones below it; two heads.
  texts = {'flash_tpu_forward': schedule(30, 100, 120, 40),
           'flash_tpu_keys': schedule(30, 100, 120, 40)}
  got = schedules.cycles(texts, Mask(), 384, (128, 128), heads=2, key_heads=1)
  steps = 2 * (6 * 210 + 3 * 100 + 3 * 120)
  assert got == {'flash_tpu_forward': steps + 2 * 3 * 70, 'flash_tpu_keys': steps + 3 * 70}


def _tune(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run([sys.executable, '-m', 'experiments.benchmarks.tune_attention', *arguments],
                        cwd=ROOT, text=True, capture_output=True,
                        env={**os.environ, 'JAX_PLATFORMS': 'cpu'})


@pytest.mark.parametrize('argument, says', [
    ('--blocks=512', 'not two positive multiples of 128 like 512x1024'),
    ('--blocks=100x128', 'not two positive multiples of 128'),
    ('--blocks=0x512', '--blocks=0x512 is not two positive multiples of 128'),
    ('--length=100', 'none fits --length=100'),
    ('--widths=16', '--widths=16 is not one of 32'),
    ('--topologies=', '--topologies is empty'), ('--dtypes=int8', 'not one of bfloat16')])
def test_bad_arguments_are_refused_in_a_sentence(argument, says):
  done = _tune(argument)
  assert done.returncode == 2 and says in done.stderr


def test_a_candidate_that_the_kernels_refuse_is_listed_with_the_reason():
  pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only
  done = _tune('--topologies=v5e:2x4', '--widths=64', '--length=131072', '--blocks=128x128')
  assert done.returncode == 0, done.stderr
  assert '| 128x128 | refused: 131,072 queries and 131,072 keys in blocks of 128' in done.stdout
  assert done.stdout.endswith('TABLE entries for models/kernels/blocks.py:\n\n')


def test_other_forms_of_schedules_end_the_comparison_in_a_sentence():
  pytest.importorskip('libtpu')
  program = ('from experiments.benchmarks import command_line, schedules, step_schedules\n'
             'schedules.BRANCH = 10**9\n'  # no branch is one that is looked for
             'command_line.run(step_schedules.main)')
  done = subprocess.run([sys.executable, '-c', program, '--topologies=v5e:2x4'], cwd=ROOT,
                        text=True, capture_output=True,
                        env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 2
  assert 'error: the schedule of a kernel has parts of [] bundles, not 4 parts' in done.stderr
  assert 'Traceback' not in done.stderr


def test_a_folder_without_schedules_is_refused(tmp_path):
  pytest.importorskip('libtpu')
  (tmp_path / '1-fusion.2-3-final_bundles.txt').touch()
  with pytest.raises(schedules.UnknownSchedule, match='wrote no schedule of a kernel'):
    schedules.read_kernels(tmp_path)


@pytest.mark.slow
def test_candidates_are_ranked_by_the_compilers_schedule():
  pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only
  done = _tune('--topologies=v5e:2x4', '--widths=64', '--length=1024', '--blocks=128x128,256x256,512x512')
  assert done.returncode == 0, done.stderr
  # Four times the steps, each with the same overhead, cost more than the waste on the diagonal.
  assert "('TPU v5 lite', 'bfloat16', 64, 1024): (512, 512)," in done.stdout
  lines = [line for line in done.stdout.splitlines() if '512x512: forward' in line]
  assert len(lines) == 1 and 'keys' in lines[0] and 'queries' in lines[0]
