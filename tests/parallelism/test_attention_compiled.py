"""The TPU kernels through the real TPU compiler, sharded over whole topologies, with no TPU."""

import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import pytest

from experiments.benchmarks import tpu_programs
from models.kernels import blocks, flash_tpu
from models.positions import alibi_slopes
from parallelism.topologies import EXAMPLES, compile_only_devices

pytest.importorskip('libtpu')  # it exists for Linux on x86-64 only

ROOT = pathlib.Path(__file__).resolve().parents[2]
KERNELS = ['flash_tpu_forward', 'flash_tpu_keys', 'flash_tpu_queries']
CHOICES = (('v4', 'v5e', 'v5p', 'v6e'), (1024, 4096, 32768), (64, 128, 256),
           ('bfloat16', 'float32'), (0, 1000))


@pytest.fixture(scope='module')
def covering(tmp_path_factory):
  """Records of the covering set, compiled once by the benchmark as a program of its own."""
  out = tmp_path_factory.mktemp('compiled') / 'cases.jsonl'
  done = subprocess.run(
      [sys.executable, '-m', 'experiments.benchmarks.compile_attention', '--cases=covering',
       f'--out={out}'], cwd=ROOT, text=True, capture_output=True,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu'})
  assert done.returncode == 0, done.stderr
  return [json.loads(line) for line in out.read_text(encoding='utf-8').splitlines()]


def test_in_the_covering_set_every_two_values_meet():
  cases = tpu_programs.covering_cases()
  assert len(cases) == len(set(cases)) == 24
  rows = [(case.topology.split(':')[0], case.length, case.width, case.dtype, case.window)
          for case in cases]
  for i, j in itertools.combinations(range(len(CHOICES)), 2):
    assert {(row[i], row[j]) for row in rows} == set(itertools.product(CHOICES[i], CHOICES[j]))
  assert {case.topology for case in cases} >= {'v4:2x2x1', 'v4:2x2x2'}


@pytest.mark.slow
def test_forward_and_backward_compile_for_every_chip(covering):
  assert [record.get('error') for record in covering] == [None] * 24
  assert [record['kernels'] for record in covering] == [KERNELS] * 24


def _head_rows(record: dict) -> float:
  """Returns temporary bytes in rows of one token and one head, whose lanes come by the 128."""
  size = 2 if record['dtype'] == 'bfloat16' else 4
  return record['temporary_bytes'] / (record['length'] * max(record['width'], 128) * size)


@pytest.mark.slow
def test_temporary_memory_is_the_same_per_token_at_every_length(covering):
  # Per token four heads of queries, outputs, their cotangents, gradients; two of keys and values.
  for record in covering:
    assert 19 < _head_rows(record) < 21, record


@pytest.mark.slow
def test_the_estimates_count_the_products_of_live_blocks(covering):
  for record in covering:
    length, window = record['length'], record['window']
    block = 512
    if record['dtype'] == 'bfloat16' and record['width'] <= 128 and not window and length > 1024:
      block = 1024  # as blocks.TABLE has it for all four chips
    n = length // block
    reach = -(-(window - 1) // block) if window else n
    pairs = sum(min(i, reach) + 1 for i in range(n))
    products = 9 * 2 * pairs * block**2 * record['width'] * 4  # 2 forward, 3 + 4 backward, heads
    assert products <= record['flops'] < 1.02 * products, record


@pytest.mark.slow
@pytest.mark.parametrize('topology', EXAMPLES)
def test_blocks_of_the_table_leave_room_for_every_feature(topology):
  def attend(q_BLHE, k_BMKE, v_BMKE, **options):
    return flash_tpu.attention(
        q_BLHE, k_BMKE, v_BMKE, segment_ids_BL=jnp.ones(q_BLHE.shape[:2], jnp.int32),
        softcap=50.0, alibi_slopes_H=alibi_slopes(q_BLHE.shape[2]), **options)

  case = tpu_programs.Case(topology, 'flash_tpu', 4096, 128, 'bfloat16', 0)
  assert (compile_only_devices(topology)[0].device_kind, 'bfloat16', 128, 4096) in blocks.TABLE
  tpu_programs.lowered(case, attend).compile(tpu_programs.IN_HBM)


def test_dense_attention_takes_memory_for_every_pair_of_tokens():
  small, large = (
      tpu_programs.compiled_case(tpu_programs.Case('v5e:2x4', 'jax.nn', length, 128, 'bfloat16', 0),
                                 tpu_programs.IN_HBM) for length in (1024, 4096))
  assert _head_rows(large) > 3.5 * _head_rows(small)
