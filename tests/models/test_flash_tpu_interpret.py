"""The TPU kernels in TPU interpret mode: two cores, races watched, memory checked."""

import dataclasses
import functools

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import numpy as np
import pytest

from models.kernels import flash_tpu, tpu_grid
from models.kernels.interface import Mask
from models.kernels.pairs import live_pairs
from tests.models.attention_harness import Case, errors, rejected

pytestmark = pytest.mark.slow  # minutes of interpreter
BIDIRECTIONAL = Mask(causal=False)
MODES = ('eager', 'on_wait')
CASES = {
  'grouped heads, causal, ragged': Case(L=200, M=200, H=2, K=1, E=32, B=1),
  'window, segments, alibi, ragged': Case(
    L=150, M=150, H=4, K=2, E=40, B=1, mask=Mask(window=50), segments=True, alibi=True
  ),
  'bidirectional, more keys than queries': Case(
    L=100, M=300, H=2, K=1, E=64, B=1, mask=BIDIRECTIONAL, softcap=1.5
  ),
}
SMALL = Case(L=256, M=256, H=1, K=1, E=32, B=1)  # two blocks of queries, three live pairs
# A block that accumulates over two pairs of blocks, and which of the three kernels does so.
SHARED = {
  'queries': (Case(L=128, M=256, H=1, K=1, E=32, B=1, mask=BIDIRECTIONAL), [True, True, False]),
  'keys': (Case(L=256, M=128, H=1, K=1, E=32, B=1, mask=BIDIRECTIONAL), [False, False, True]),
}
# From jax 0.12 on a race raises unless told otherwise; 0.10 only prints and sets a flag.
WARN = {
  field.name: 'warn' for field in dataclasses.fields(pltpu.InterpretParams)
  if field.name == 'on_race'
}


def _attend(mode: str):
  """Returns the kernels on two interpreted cores, blocks of 128 rows."""
  params = pltpu.InterpretParams(
    detect_races=True, dma_execution_mode=mode, uninitialized_memory='nan',
    out_of_bounds_reads='raise', num_cores_or_threads=2, **WARN,
  )
  return functools.partial(flash_tpu.attention, q_block=128, k_block=128, interpret=params)


@pytest.fixture
def races(monkeypatch):
  """Returns f() -> one flag per kernel that ran so far: whether it raced.

  The interpreter starts a new state for every kernel, so its own flag is the last kernel's.
  """
  states, make = [], interpret_pallas_call.RaceDetectionState

  def recorded(*args, **kwargs):
    states.append(make(*args, **kwargs))
    return states[-1]

  monkeypatch.setattr(interpret_pallas_call, 'RaceDetectionState', recorded)
  return lambda: [state.races_found for state in states]


@pytest.mark.parametrize('mode', MODES)
@pytest.mark.parametrize('case', CASES)
def test_two_cores_agree_with_the_oracle_without_a_race(case, mode, races):
  measured = errors(_attend(mode), CASES[case])
  assert races() == [False] * 3  # forward, gradients of queries, of keys and values
  assert not rejected(measured), measured


def _all_parallel(dimension_semantics):
  """Returns compiler parameters that let cores share what has to be one core's sequence."""
  return _compiler_params(dimension_semantics=('parallel',) * len(dimension_semantics))


_compiler_params = pltpu.CompilerParams


@pytest.mark.parametrize('block, mode', [
  ('queries', 'eager'), ('queries', 'on_wait'), ('keys', 'on_wait')
])
def test_a_block_accumulated_by_two_cores_is_a_race(block, mode, races, monkeypatch):
  case, racing = SHARED[block]
  monkeypatch.setattr(pltpu, 'CompilerParams', _all_parallel)
  errors(_attend(mode), case)
  assert races() == racing


def test_sums_that_are_never_started_are_seen(monkeypatch):
  on_pair = flash_tpu._on_pair

  def without_start(problem, flags, start, step, finish, **options):
    del start
    on_pair(problem, flags, lambda: None, step, finish, **options)

  monkeypatch.setattr(flash_tpu, '_on_pair', without_start)
  assert rejected(errors(_attend('eager'), SMALL)) == ['out', 'lse', 'd_q', 'd_k', 'd_v']


def test_a_block_past_the_end_of_the_keys_is_seen(monkeypatch):

  def one_too_far(*args, **options):
    pairs = live_pairs(*args, **options)
    return pairs._replace(k_block=(pairs.k_block + 1).astype(np.int32))

  monkeypatch.setattr(tpu_grid, 'live_pairs', one_too_far)
  with pytest.raises(Exception, match='(?i)out-of-bounds'):
    errors(_attend('eager'), SMALL)
  interpret_pallas_call.reset_tpu_interpret_mode_state()
