"""Owns what Hopper's attention kernels share: their tiles, the blocks a tile visits, the logits.

A block of threads is three warpgroups: two compute, each 64 rows of a tile of 128, the third
copies the blocks that they need. A tile visits the live blocks of `pairs.live_ranges` only.
"""

import dataclasses
import functools
import math
from typing import Any, Callable, NamedTuple, Optional

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np

from models.kernels.hopper import (
  COLUMN_VALUES, COMPUTE_GROUPS, ROW_VALUES, ROWS, SHARED_BYTES, Ring, Warpgroup,
)
from models.kernels.interface import HIDDEN, Mask
from models.kernels.pairs import live_pairs, live_ranges

LOG2E = math.log2(math.e)
TILE = COMPUTE_GROUPS * ROWS
MAX_SLOTS = 4
COMPUTE_REGISTERS, COPY_REGISTERS = 240, 24  # of a thread; 65,536 in all


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is static about a call; lengths are those before padding to whole tiles."""

  mask: Mask
  scale: float
  softcap: float
  n_queries: int
  n_keys: int
  has_segments: bool
  has_slopes: bool
  interpret: Any

  @property
  def warpgroup(self) -> Warpgroup:
    """The operations of a warpgroup."""
    return Warpgroup(interpreted=bool(self.interpret))

  def segments(self, *refs: Any) -> tuple[Any, ...]:
    """Returns what belongs to segments where the call has some, else nothing."""
    return refs if self.has_segments else ()


class Operands(NamedTuple):
  """Arrays of a call, or references to them, lengths padded to whole tiles."""

  q_BLHE: Any
  k_BMKE: Any
  v_BMKE: Any
  slopes_H: Any
  q_segments_BL: Any
  k_segments_BM: Any


Parts = tuple[bool, bool, bool]  # which of a walk's parts any tile has


class Place(NamedTuple):
  """Where a warpgroup works: its batch row, head and tile, and the blocks that the tile visits."""

  batch: jax.Array
  head: jax.Array
  tile: jax.Array
  group: jax.Array
  range_ref: Any  # see `pairs.live_ranges`

  @property
  def low(self) -> jax.Array:
    """The first block that the tile visits."""
    return self.range_ref[0]

  @property
  def n_blocks(self) -> jax.Array:
    """How many blocks the tile visits."""
    return self.range_ref[3] - self.range_ref[0]

  @property
  def start(self) -> jax.Array:
    """The first row of this warpgroup."""
    return self.tile * TILE + self.group * ROWS

  @property
  def rows(self) -> Any:
    """The rows of this warpgroup."""
    return pl.ds(self.start, ROWS)

  def walk(self, parts: Parts, step: Callable, carry: Any) -> Any:
    """Runs step(block, carry, masked=...) over the blocks: masked ones, whole ones, masked ones."""
    for i, (present, masked) in enumerate(zip(parts, (True, False, True), strict=True)):
      if present:
        body = functools.partial(step, masked=masked)
        carry = jax.lax.fori_loop(self.range_ref[i], self.range_ref[i + 1], body, carry)
    return carry


def _place(ranges: Any) -> Place:
  """Returns where this warpgroup works; the last tile comes first, as causal ones grow."""
  tile = ranges.shape[0] - 1 - jax.lax.axis_index('tile')
  return Place(
    jax.lax.axis_index('batch'), jax.lax.axis_index('head'), tile, jax.lax.axis_index('group'),
    ranges.at[tile],
  )


def in_roles(place: Place, copy: Callable[[], None], compute: Callable[[], None]) -> None:
  """Runs `copy` in the last warpgroup and `compute` in the others."""

  @pl.when(place.group == COMPUTE_GROUPS)
  def _():
    plgpu.set_max_registers(COPY_REGISTERS, action='decrease')
    copy()

  @pl.when(place.group < COMPUTE_GROUPS)
  def _():
    plgpu.set_max_registers(COMPUTE_REGISTERS, action='increase')
    compute()


def key_head(place: Place, operands: Operands) -> jax.Array:
  """Returns the key head of the place's query head."""
  n_heads = operands.q_BLHE.shape[2] // operands.k_BMKE.shape[2]
  return jax.lax.div(place.head, jnp.int32(n_heads))


def copy_keys(
  problem: Problem, block: int, place: Place, operands: Operands, ring_k: Ring, ring_v: Ring
) -> None:
  """Copies the blocks of keys, with their segments, and of values that a tile visits."""
  head = key_head(place, operands)

  def put(step: jax.Array, _) -> None:
    at = pl.ds((place.low + step) * block, block)
    segments = problem.segments(operands.k_segments_BM.at[place.batch, at])
    ring_k.put(step, [operands.k_BMKE.at[place.batch, at, head], *segments])
    ring_v.put(step, [operands.v_BMKE.at[place.batch, at, head]])

  jax.lax.fori_loop(0, place.n_blocks, put, None)
  ring_k.drain(place.n_blocks)
  ring_v.drain(place.n_blocks)


class Axis(NamedTuple):
  """Rows or columns of a product: where they start and whose segments they have."""

  start: jax.Array
  segments: Optional[jax.Array] = None


def axis(problem: Problem, start: jax.Array, segment_refs: list, layout: str) -> Axis:
  """Returns an axis whose segments, if any, are in the one reference given."""
  return Axis(start, *(problem.warpgroup.load(x, layout) for x in segment_refs))


class Logits(NamedTuple):
  """Logits of a pair of blocks in base 2 are values * factor; `capped` is the soft-cap's tanh.

  The factor, a positive constant, is left to the exponential, where it costs nothing.
  """

  values_RC: jax.Array
  factor: float
  capped_RC: Optional[jax.Array]

  def exp2(self, minus_RC: jax.Array) -> jax.Array:
    """Returns the exponentials of the logits less `minus_RC`."""
    return jnp.exp2(self.values_RC * self.factor - minus_RC)


def _tanh(x_RC: jax.Array) -> jax.Array:
  """Returns tanh by a power of two: the GPU's own is good to 2^-11, too coarse times a soft-cap."""
  return 1 - 2 / (1 + jnp.exp2(x_RC * (2 * LOG2E)))


def logits(
  problem: Problem, products_RC: jax.Array, rows: Axis, columns: Axis, slope: jax.Array, *,
  by_keys: bool, masked: bool,
) -> Logits:
  """Returns the logits of a pair of blocks from its products.

  Rows are queries and columns keys, by keys the other way round.
  """
  warpgroup, shape, capped_RC = problem.warpgroup, products_RC.shape, None
  values_RC, factor = products_RC, problem.scale * LOG2E
  if problem.softcap:
    values_RC = capped_RC = _tanh(products_RC * (problem.scale / problem.softcap))
    factor = problem.softcap * LOG2E
  elif problem.scale <= 0:
    values_RC, factor = products_RC * problem.scale, LOG2E
  if not masked and not problem.has_slopes:
    return Logits(values_RC, factor, capped_RC)
  queries, keys = (columns, rows) if by_keys else (rows, columns)
  queries_RC = warpgroup.iota(shape, int(by_keys)) + (queries.start + problem.mask.q_offset)
  keys_RC = warpgroup.iota(shape, int(not by_keys)) + keys.start
  if problem.has_slopes:
    distance_RC = jnp.abs(queries_RC - keys_RC).astype(jnp.float32)
    values_RC -= distance_RC * (slope * (LOG2E / factor))
  if masked:
    visible_RC = problem.mask.visible(queries_RC, keys_RC) & (keys_RC < problem.n_keys)
    if rows.segments is not None and columns.segments is not None:
      rows_RC = warpgroup.spread(rows.segments, shape, ROW_VALUES)
      columns_RC = warpgroup.spread(columns.segments, shape, COLUMN_VALUES)
      visible_RC &= (rows_RC == columns_RC) & (columns_RC != 0)
    values_RC = jnp.where(visible_RC, values_RC, HIDDEN / factor)
  return Logits(values_RC, factor, capped_RC)


class Plan(NamedTuple):
  """Rows of a block and slots of a ring."""

  block: int
  n_slots: int


def plan(width: int, n_held: int, largest_block: int) -> Plan:
  """Returns blocks of 128 rows if two pairs fit beside the tiles held, else of 64.

  Beside two tiles of width 256 one pair of blocks fits, and copying waits for computing.
  A row of a block takes 16 bytes for vectors beside its bfloat16 cells.
  """
  row_bytes = 2 * width + 16
  room = SHARED_BYTES - n_held * TILE * row_bytes - 1024  # barriers
  fits = [Plan(block, min(room // (2 * block * row_bytes), MAX_SLOTS)) for block in (64, 128)]
  return max(p for p in fits if p.block == 64 or p.block <= largest_block and p.n_slots > 1)


def _ranges(problem: Problem, pairs_ranges: np.ndarray) -> tuple[np.ndarray, Parts]:
  """Returns the ranges of all tiles, [tiles, 4], and which parts of a walk any tile has.

  With segments every block is masked.
  """
  ranges = pairs_ranges[:, [0, 3, 3, 3]] if problem.has_segments else pairs_ranges
  first, whole, last = (np.diff(ranges, axis=1) > 0).any(0).tolist()
  return ranges, (first, whole, last)


def launch(
  name: str, kernel: Callable, problem: Problem, operands: Operands, extra: tuple, outs: Any,
  block: int, scratch: list, *, by_keys: bool,
) -> Any:
  """Runs a kernel over the tiles of all heads, of queries or of keys; returns its results.

  The kernel takes (problem, block, parts, place, operands), references to `extra`, to the
  results `outs` and to `scratch`.
  """
  B, L, H, _ = operands.q_BLHE.shape
  M, K = operands.k_BMKE.shape[1:3]
  sizes = (block, TILE) if by_keys else (TILE, block)
  pairs = live_pairs(problem.mask, problem.n_queries, problem.n_keys, *sizes, by_keys=by_keys)
  ranges, parts = _ranges(problem, live_ranges(pairs, by_keys=by_keys))

  def body(*refs: Any) -> None:
    n = len(operands)
    kernel(problem, block, parts, _place(refs[n]), Operands(*refs[:n]), *refs[n + 1 :])

  return plgpu.kernel(
    body, out_type=outs, scratch_types=scratch,
    grid=(K if by_keys else H, len(ranges), B), grid_names=('head', 'tile', 'batch'),
    num_threads=COMPUTE_GROUPS + 1, thread_name='group', kernel_name=name,
    compiler_params=plgpu.CompilerParams(approx_math=True), interpret=problem.interpret,
  )(*operands, jnp.asarray(ranges), *extra)
