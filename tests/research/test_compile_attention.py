"""The benchmark that compiles attention for TPUs: known cases are not compiled again, its tables."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.benchmarks import tpu_programs

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _run(*arguments: str) -> subprocess.CompletedProcess:
  return subprocess.run(
      [sys.executable, '-m', 'experiments.benchmarks.compile_attention', *arguments], cwd=ROOT,
      text=True, capture_output=True, env={**os.environ, 'JAX_PLATFORMS': 'cpu'})


def test_a_finished_table_is_printed_without_compiling(tmp_path):
  out = tmp_path / 'cases.jsonl'
  cases = tpu_programs.all_cases(['flash_tpu', 'jax.nn'], ['v5e:2x4'])
  with out.open('w', encoding='utf-8') as file:
    for case in cases:
      record = {**dataclasses.asdict(case), 'seconds': 1.0}
      if case.contender == 'jax.nn' and case.length == 32768:
        record['error'] = 'out of memory: 26.09G of 15.75G'
      else:
        record |= {'temporary_bytes': 1.5e6, 'optimal_seconds': 0.00025}
      print(json.dumps(record), file=file)
  before = out.read_bytes()
  done = _run('--contenders=flash_tpu,jax.nn', '--topologies=v5e:2x4', f'--out={out}')
  assert done.returncode == 0, done.stderr
  assert f'72 of 72 cases are in {out}' in done.stdout
  assert ('| v5e:2x4 | flash_tpu MB | jax.nn MB | flash_tpu ms | jax.nn ms |\n') in done.stdout
  assert '| L 1,024, E 64, bfloat16, window 1,000 | 1.5 | 1.5 | 0.25 | 0.25 |\n' in done.stdout
  assert ('| L 32,768, E 256, float32 | 1.5 | out of memory: 26.09G of 15.75G | 0.25 |  |\n'
          in done.stdout)
  assert out.read_bytes() == before


@pytest.mark.parametrize('argument, says', [
    ('--contenders=torch', '--contenders=torch is not one of flash_tpu, jax.nn'),
    ('--topologies=v3:2x2', '--topologies=v3:2x2 is not one of v4:2x2x2')])
def test_bad_arguments_are_refused_in_a_sentence(argument, says):
  done = _run(argument)
  assert done.returncode == 2 and says in done.stderr


def test_a_program_that_does_not_fit_is_a_record_that_says_so():
  case = tpu_programs.Case('v5e:2x4', 'jax.nn', 32768, 64, 'bfloat16', 0)
  record = tpu_programs.compiled_case(case, tpu_programs.IN_HBM)
  assert record['error'].startswith('out of memory: ') and record['error'].endswith(' of 15.75G')
  flash = tpu_programs.compiled_case(dataclasses.replace(case, contender='jax flash', window=9))
  assert flash['error'] == 'no windows'
