"""The TPU's decoding kernels in interpret mode: equal to the oracle, free of races."""

import functools

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
import jax.numpy as jnp
import pytest

from models.kernels import decode_tpu
from models.kernels.decoding import ContiguousCache, PagedCache
from tests.models.decoding_harness import (
  CASES, LONG, Case, errors, in_pages, programs, rejected,
)
from tests.models.test_flash_tpu_interpret import WARN

EVERY = {**CASES, **LONG}
pytestmark = pytest.mark.usefixtures('quick_compilation')


@pytest.fixture
def reset_interpreter():
  """Forgets the interpreter's memory and semaphores, where copies nobody waited for remain."""
  yield
  interpret_pallas_call.reset_tpu_interpret_mode_state()


def attend(block=32, **interpret):
  """Returns the kernels in plain interpret mode, or in the TPU's with some settings."""
  mode = pltpu.InterpretParams(**interpret) if interpret else True
  return functools.partial(decode_tpu.attention, block=block, interpret=mode)


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('page', [None, 16])
def test_kernels_equal_the_oracle(name, page):
  case = in_pages(EVERY[name], page)
  measured = errors(attend(), case)
  assert not rejected(measured, case), measured


@pytest.mark.slow
@pytest.mark.parametrize('page', [None, 16])
@pytest.mark.parametrize('dma', ['eager', 'on_wait'])
@pytest.mark.parametrize('name', ['long', 'long, window'])
def test_kernels_have_no_races_and_read_nothing_unwritten(name, dma, page):
  strict = attend(
    detect_races=True, dma_execution_mode=dma, uninitialized_memory='nan',
    out_of_bounds_reads='raise', num_cores_or_threads=2,
  )
  case = in_pages(EVERY[name], page)
  measured = errors(strict, case)
  assert not rejected(measured, case), measured
  assert not interpret_pallas_call.races.races_found


def test_a_row_whose_blocks_two_cores_share_is_a_race(monkeypatch, reset_interpreter):
  real = pltpu.CompilerParams
  monkeypatch.setattr(pltpu, 'CompilerParams', lambda dimension_semantics: real(
    dimension_semantics=('parallel',) * len(dimension_semantics)))
  shared = attend(detect_races=True, num_cores_or_threads=2, **WARN)
  errors(shared, Case((80,), M=96, H=8, K=1))
  assert interpret_pallas_call.races.races_found


PROGRAMS = programs(decode_tpu.attention)


@pytest.mark.parametrize('name', PROGRAMS)
def test_kernels_of_real_sizes_lower_for_tpus(name):
  call, arguments = PROGRAMS[name]
  device = AbstractDevice(device_kind='TPU v5 lite', num_cores=1, platform='tpu')
  mesh = AbstractMesh((1,), ('x',), axis_types=(AxisType.Auto,), abstract_device=device)
  with jax.sharding.use_abstract_mesh(mesh):
    lowered = jax.jit(call).trace(*arguments).lower(lowering_platforms=('tpu',))
  assert 'tpu_custom_call' in lowered.as_text()


def test_a_chunk_of_pages_fits_its_buffers():
  def pages_at_a_time(K, E, T=16, dtype=jnp.bfloat16, block=512):
    pages = jax.ShapeDtypeStruct((1, 64, K, T, E), dtype)
    table = jax.ShapeDtypeStruct((2, 64), jnp.int32)
    return decode_tpu._pages_at_a_time(PagedCache(pages, pages, table, None), block)

  assert pages_at_a_time(8, 128) == 32  # 512 keys
  assert pages_at_a_time(1, 32, T=128) == 4
  # 32 heads of 256 in float32: a page is 512 KiB, and four chunks have 8 MiB.
  assert pages_at_a_time(32, 256, dtype=jnp.float32) == 4
  assert pages_at_a_time(128, 512, T=64) == 1


Q, LENGTHS = jnp.zeros((2, 4, 32)), jnp.ones(2, jnp.int32)
KEYS, TABLE = jnp.zeros((1, 2, 2, 8, 32)), jnp.zeros((2, 1), jnp.int32)


@pytest.mark.parametrize('q, cache, options, says', [
  (Q.astype(jnp.float16), ContiguousCache(*[KEYS.astype(jnp.float16)] * 2, LENGTHS), {},
   'not float16; decode_xla takes it'),
  (Q[..., :20], ContiguousCache(*[KEYS[..., :20]] * 2, LENGTHS), {}, 'not 20; decode_xla takes'),
  (Q, ContiguousCache(KEYS, KEYS, LENGTHS), dict(block=12), 'block=12 of decode_tpu'),
  (Q, ContiguousCache(KEYS, KEYS, LENGTHS), dict(block=0), 'block=0 of decode_tpu is not a .* 8'),
  (Q, ContiguousCache(KEYS, KEYS, LENGTHS), dict(block=-8), 'block=-8 of decode_tpu'),
  (Q, PagedCache(*[KEYS[:, :, :, :5]] * 2, TABLE, LENGTHS), {}, 'a multiple of 8 tokens, not 5'),
  (Q, ContiguousCache(KEYS, KEYS[:, :1], LENGTHS), {}, 'do not fit'),
])
def test_what_the_kernels_lack_is_said_with_the_alternative(q, cache, options, says):
  with pytest.raises(ValueError, match=says):
    decode_tpu.attention(q, cache, 0, scale=1.0, **options)


def _copies_without_waiting(monkeypatch):
  """Makes every wait for a copy of pages return at once."""
  real = pltpu.make_async_copy

  def hasty(*arguments):
    copy = real(*arguments)
    return type('Hasty', (), {'start': copy.start, 'wait': lambda self: None})()

  monkeypatch.setattr(pltpu, 'make_async_copy', hasty)


def test_copies_that_nobody_waits_for_are_a_race_where_their_keys_came_in_time(
  monkeypatch, reset_interpreter
):
  _copies_without_waiting(monkeypatch)
  case = in_pages(Case((40, 20), M=40))
  eager = attend(detect_races=True, dma_execution_mode='eager', **WARN)
  assert not rejected(errors(eager, case), case)
  assert interpret_pallas_call.races.races_found


def test_a_kernel_that_does_not_wait_for_its_pages_is_rejected(monkeypatch, reset_interpreter):
  _copies_without_waiting(monkeypatch)
  case = in_pages(Case((40, 20), M=40))
  measured = errors(attend(dma_execution_mode='on_wait', uninitialized_memory='nan'), case)
  assert rejected(measured, case) == ['out', 'lse']
