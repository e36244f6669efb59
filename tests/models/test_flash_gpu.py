"""Hopper's attention kernels: in the interpreter against the oracle, compiled for an H100."""

import contextlib
import functools
import json
import pathlib
import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st
import jax
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
import jax.numpy as jnp
import numpy as np
import pytest

from models.attention import hardware
from models.kernels import flash_gpu, flash_gpu_gradients, flash_gpu_tiles, hopper
from models.kernels.interface import Mask
from models.kernels.pairs import live_pairs, live_ranges
from tests.models.attention_harness import Case, errors, rejected

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Every feature at least once; two tiles of queries or keys, and lengths that end inside a tile.
CASES = {
  'bidirectional, one key head, soft-cap': Case(
    B=1, L=70, M=150, H=2, K=1, E=64, mask=Mask(causal=False), softcap=1.5
  ),
  'window, segments, alibi': Case(
    B=1, L=150, M=150, H=2, K=2, E=32, mask=Mask(window=40), segments=True, alibi=True
  ),
  'chunk before all keys, padded width': Case(
    B=1, L=140, M=140, H=2, K=1, E=40, mask=Mask(chunk=48, q_offset=-30), softcap=0.7
  ),
  'wide heads': Case(B=1, L=130, M=130, H=2, K=1, E=192, scale=-0.07),
  'padded queries that see nothing': Case(
    B=1, L=65, M=128, H=1, K=1, E=64, mask=Mask(chunk=128, q_offset=63)
  ),
  'large logits under a soft-cap': Case(
    B=1, L=100, M=100, H=1, K=1, E=64, scale=2.0, softcap=50.0
  ),
  'batch and window both ways': Case(
    B=2, L=130, M=100, H=1, K=1, E=128, mask=Mask(causal=False, window=30), segments=True
  ),
}


@contextlib.contextmanager
def interpreter(races: bool = False):
  """Gives attention in the interpreter; fails unless it sees `races`, and leaves no state behind."""
  params = InterpretGPUParams(detect_races=True)
  try:
    yield functools.partial(flash_gpu.attention, interpret=params)
    assert interpret_pallas_call.get_races().races_found == races
  finally:
    interpret_pallas_call.reset_gpu_interpret_mode_state()


def test_the_kernels_equal_the_oracle():
  with interpreter() as attend:
    measured = errors(attend, Case(B=1, L=150, M=150, H=2, K=1, E=64), 'bfloat16')
  assert not rejected(measured, 'bfloat16'), measured


@pytest.mark.slow
@pytest.mark.parametrize('case', CASES)
def test_every_feature_equals_the_oracle(case):
  with interpreter() as attend:
    measured = errors(attend, CASES[case], 'bfloat16')
  assert not rejected(measured, 'bfloat16'), measured


@pytest.mark.slow
@settings(max_examples=3, deadline=None, derandomize=True, database=None)
@given(
  lengths=st.tuples(st.integers(1, 200), st.integers(1, 200)), K=st.sampled_from([1, 2]),
  width=st.integers(32, 128), causal=st.booleans(), window=st.integers(0, 150),
  chunk=st.integers(0, 150), q_offset=st.integers(-50, 100), segments=st.booleans(),
  alibi=st.booleans(),
)
def test_any_shape(lengths, K, width, causal, window, chunk, q_offset, segments, alibi):
  mask = Mask(causal, window, chunk, q_offset)
  case = Case(
    *lengths, B=1, H=2, K=K, E=width, mask=mask, segments=segments, alibi=alibi
  )
  with interpreter() as attend:
    measured = errors(attend, case, 'bfloat16')
  assert not rejected(measured, 'bfloat16'), measured


@pytest.mark.parametrize('case', [*CASES, 'long'])
def test_a_hopper_gpu_equals_the_oracle(case):
  """Run it where there is one: JAX_PLATFORMS=cuda,cpu python -m pytest -k a_hopper_gpu."""
  if hardware(jax.devices()[0]) != 'hopper':
    pytest.skip('no Hopper GPU')
  long = Case(B=2, L=2100, M=2100, H=8, K=2, E=128, mask=Mask(window=700), segments=True)
  measured = errors(flash_gpu.attention, CASES.get(case, long), 'bfloat16')
  assert not rejected(measured, 'bfloat16'), measured


def _mask_ignored(pairs, *, by_keys):
  """Returns ranges that call every live block whole."""
  return live_ranges(pairs, by_keys=by_keys)[:, [0, 0, 3, 3]]


@pytest.mark.slow
def test_a_kernel_that_skips_its_mask_is_rejected(monkeypatch):
  monkeypatch.setattr(flash_gpu_tiles, 'live_ranges', _mask_ignored)
  with interpreter() as attend:
    measured = errors(attend, Case(B=1, L=100, M=100, H=1, K=1, E=64), 'bfloat16')
  assert {'out', 'lse', 'd_q', 'd_k', 'd_v'} == set(rejected(measured, 'bfloat16')), measured


@pytest.mark.slow
def test_a_gradient_without_the_softcap_is_rejected(monkeypatch):
  right = flash_gpu_gradients._gradient
  monkeypatch.setattr(
    flash_gpu_gradients, '_gradient', lambda weights, d, inner, _: right(weights, d, inner, None)
  )
  with interpreter() as attend:
    case = Case(B=1, L=100, M=100, H=1, K=1, E=64, softcap=1.0)
    measured = errors(attend, case, 'bfloat16')
  assert {'d_q', 'd_k'} == set(rejected(measured, 'bfloat16')), measured


def _taken_without_waiting(ring, step):
  """Returns the blocks of a step, there or not."""
  return [ref.at[ring._slot(step)] for ref in ring.refs]


@pytest.mark.slow
def test_a_block_that_is_read_before_it_is_copied_is_a_race(monkeypatch):
  monkeypatch.setattr(hopper.Ring, 'take', _taken_without_waiting)
  with interpreter(races=True) as attend:
    errors(attend, Case(B=1, L=100, M=100, H=1, K=1, E=64), 'bfloat16')


def _compiled_for_h100(*arguments: str) -> list[dict]:
  """Returns the records of the benchmark that compiles for an H100."""
  ended = subprocess.run(
    [sys.executable, '-m', 'experiments.benchmarks.compile_attention_gpu', '--json', *arguments],
    cwd=ROOT, capture_output=True, text=True, check=True,
  )
  return [json.loads(line) for line in ended.stdout.splitlines()]


@pytest.mark.slow
def test_cudas_compiler_takes_every_width_and_feature():
  records = _compiled_for_h100(
    '--contenders=flash_gpu', '--lengths=1024', '--widths=32,64,128,256',
    '--features=,window+segments+softcap+alibi',
  )
  for record in records:
    kernels = record['kernels']
    gradients = {'flash_kv_gradients'}
    if record['width'] > 128:
      gradients = {'flash_k_gradients', 'flash_v_gradients'}
    assert kernels.keys() == {'flash_forward', 'flash_queries_gradient', *gradients}
    assert {kernel['architecture'] for kernel in kernels.values()} == {'sm_90a'}
    if record['width'] <= 128 and not record['features']:
      # The two sums of the keys' kernel nearly fill the registers; the others have room.
      assert kernels['flash_forward']['spill_stores'] == 0
      assert kernels['flash_queries_gradient']['spill_stores'] == 0
      assert kernels['flash_kv_gradients']['spill_stores'] <= 64


@pytest.mark.slow
def test_memory_on_an_h100_is_linear_in_the_length():
  lengths = (1024, 8192, 32768, 131072)
  small, *larger = (record['temporary_bytes'] for record in _compiled_for_h100(
    '--contenders=flash_gpu', '--widths=128', f'--lengths={",".join(map(str, lengths))}'))
  for length, size in zip(lengths[1:], larger, strict=True):
    assert size < 1.2 * small * length / lengths[0]
  dense = [record['temporary_bytes'] for record in _compiled_for_h100(
    '--contenders=jax', '--widths=128', '--lengths=1024,4096')]
  assert dense[1] > 12 * dense[0]


def _lowered_for_h100(case: Case, backward: bool = True) -> str:
  """Returns the program of a case lowered for an H100, which may not be there."""
  h100 = AbstractDevice(device_kind='NVIDIA H100 80GB HBM3', num_cores=132, platform='gpu')
  mesh = AbstractMesh((1,), ('x',), axis_types=(AxisType.Auto,), abstract_device=h100)
  q, k, v, g, g_lse = case.operands()
  operands = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in (q, k, v, g)]

  def program(q, k, v, g):
    attended, vjp = jax.vjp(
      lambda *qkv: tuple(flash_gpu.attention(*qkv, **case.options())), q, k, v
    )
    return attended, vjp((g, jnp.zeros(g_lse.shape, jnp.float32))) if backward else None

  with jax.sharding.use_abstract_mesh(mesh):
    return jax.jit(program).trace(*operands).lower(lowering_platforms=('cuda',)).as_text()


@pytest.mark.parametrize('width', [32, 64, 96, 128, 256])
def test_the_kernels_lower_for_an_h100_on_any_machine(width):
  case = Case(
    B=1, L=1000, M=1100, H=4, K=2, E=width, mask=Mask(window=300), segments=True, alibi=True,
    softcap=20.0,
  )
  program = _lowered_for_h100(case)
  assert program.count('custom_call @mosaic_gpu_v2') == (3 if width <= 128 else 4)


@pytest.mark.parametrize('width', range(32, 257, 8))
def test_plans_fit_into_shared_memory(width):
  for n_held, largest in ((1, 128), (1, 64), (2, 128), (2, 64)):
    block, n_slots = flash_gpu_tiles.plan(-(-width // 64) * 64, n_held, largest)
    cells = n_held * flash_gpu_tiles.TILE + 2 * n_slots * block
    assert block <= largest and n_slots >= 1
    assert cells * (2 * -(-width // 64) * 64 + 16) + 1024 <= hopper.SHARED_BYTES


@pytest.mark.parametrize('mask', [
  Mask(), Mask(causal=False), Mask(window=100), Mask(causal=False, window=70), Mask(chunk=96),
  Mask(chunk=96, window=50, q_offset=40), Mask(q_offset=-200), Mask(q_offset=150),
])
@pytest.mark.parametrize('by_keys', [False, True])
def test_ranges_of_live_blocks_are_those_of_the_mask(mask, by_keys):
  n_queries, n_keys, q_block, k_block = 300, 420, 128, 64
  pairs = live_pairs(mask, n_queries, n_keys, q_block, k_block, by_keys=by_keys)
  visible_LM = mask.visible(
    np.arange(n_queries)[:, None] + mask.q_offset, np.arange(n_keys)
  )
  whole_LM = np.pad(visible_LM, ((0, -n_queries % q_block), (0, 0)), mode='edge')
  whole_LM = np.pad(whole_LM, ((0, 0), (0, -n_keys % k_block)))
  blocks = whole_LM.reshape(-(-n_queries // q_block), q_block, -1, k_block).swapaxes(1, 2)
  some, all_ = blocks.any((2, 3)), blocks.all((2, 3))
  if by_keys:
    some, all_ = some.T, all_.T
  for i, (low, whole_low, whole_high, high) in enumerate(live_ranges(pairs, by_keys=by_keys)):
    others = np.arange(some.shape[1])
    if some[i].any():
      assert (some[i] == (low <= others) & (others < high)).all()
    else:
      assert high - low == 1
    # What is called whole must be; a window may leave whole blocks to the masked parts.
    assert all_[i][whole_low:whole_high].all() and low <= whole_low <= whole_high <= high


X = np.zeros((2, 8, 4, 64), jnp.bfloat16)


@pytest.mark.parametrize('x, says', [
  (X.astype(np.float32), 'flash_gpu takes bfloat16, not float32; blockwise takes it'),
  (X[..., :16], 'heads of width 32 to 256, not 16; blockwise takes it'),
  (np.zeros((1, 8, 1, 320), jnp.bfloat16), 'not 320; blockwise takes it'),
])
def test_what_the_kernels_lack_is_said_with_the_alternative(x, says):
  with pytest.raises(ValueError, match=says):
    flash_gpu.attention(x, x, x, scale=1.0)
