"""Owns what the Hopper kernels are written in: products of a warpgroup and rings of copied blocks.

The interpreter of Mosaic GPU knows neither accumulators nor layouts of registers; under it the
same operations are plain JAX, while copies, barriers and threads remain those of the kernel.
"""

from typing import Any, Callable, NamedTuple, Sequence

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
import jax.numpy as jnp

SHARED_BYTES = 232_448  # of a block of threads, less what the runtime keeps
ROWS = 64  # of a warpgroup's product
COMPUTE_GROUPS = 2  # warpgroups that multiply; one more copies
MATRIX, ROW_VALUES, COLUMN_VALUES = 'matrix', 'row values', 'column values'  # layouts


class Warpgroup(NamedTuple):
  """Operations of one warpgroup; `interpreted` where no GPU runs them."""

  interpreted: bool

  def _cast(self, x: jax.Array, layout: str) -> jax.Array:
    """Returns x in registers as the products lay them out."""
    if self.interpreted:
      return x
    wgmma = plgpu.Layout.WGMMA
    layouts = {MATRIX: wgmma, ROW_VALUES: wgmma.reduce(1), COLUMN_VALUES: wgmma.reduce(0)}
    return plgpu.layout_cast(x, layouts[layout])

  def full(self, shape: tuple[int, ...], value: float, layout: str) -> jax.Array:
    """Returns a float32 constant."""
    return self._cast(jnp.full(shape, value, jnp.float32), layout)

  def iota(self, shape: tuple[int, int], dimension: int) -> jax.Array:
    """Returns the row or column index of each cell, int32."""
    return self._cast(jax.lax.broadcasted_iota(jnp.int32, shape, dimension), MATRIX)

  def load(self, ref: Any, layout: str) -> jax.Array:
    """Returns a vector of shared memory, one value per row or column of a product."""
    return self._cast(ref[...] if self.interpreted else plgpu.load(ref, ()), layout)

  def spread(self, values: jax.Array, shape: tuple[int, int], layout: str) -> jax.Array:
    """Returns a matrix of row or column values."""
    return jax.lax.broadcast_in_dim(values, shape, [0 if layout == ROW_VALUES else 1])

  def _multiply(self, sum_ref: Any, a: Any, b_ref: Any, transpose: bool) -> None:
    """Starts adding a product to an accumulator."""
    plgpu.wgmma(sum_ref, a, plgpu.transpose_ref(b_ref, (1, 0)) if transpose else b_ref)

  def _interpreted_product(self, a: Any, b_ref: Any, transpose: bool) -> jax.Array:
    """Returns a product in plain JAX."""
    a = a if isinstance(a, jax.Array) else a[...]
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    return jax.lax.dot_general(a, b_ref[...], contract, preferred_element_type=jnp.float32)

  def transposed_product(
    self, a_ref: Any, b_ref: Any, started: Callable[[], None] = lambda: None
  ) -> jax.Array:
    """Returns a b^T, float32 [rows of a, rows of b]; `started` runs while it is computed."""
    if self.interpreted:
      started()
      return self._interpreted_product(a_ref, b_ref, True)

    def multiply(sum_ref: Any) -> jax.Array:
      self._multiply(sum_ref, a_ref, b_ref, True)
      started()
      return sum_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC((a_ref.shape[0], b_ref.shape[0]), jnp.float32))

  def plus_product(self, total: jax.Array, a: jax.Array, b_ref: Any) -> jax.Array:
    """Returns total + a b for a matrix a in registers."""
    if self.interpreted:
      return total + self._interpreted_product(a, b_ref, False)
    return pl.run_state(lambda sum_ref: self._multiply(sum_ref, a, b_ref, False))(
      plgpu.ACC.init(total)
    )


def tiles(shape: Sequence[int], dtype: Any) -> Any:
  """Returns shared memory for blocks [..., rows, width] that products read."""
  swizzle = plgpu.find_swizzle(shape[-1] * jnp.dtype(dtype).itemsize * 8)
  tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
  return plgpu.SMEM(tuple(shape), dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))


class Held(NamedTuple):
  """Blocks that each computing warpgroup copies once and keeps, [groups, ...] each."""

  refs: tuple[Any, ...]
  arrived: Any

  def fetch(self, group: jax.Array, sources: Sequence[Any]) -> list[Any]:
    """Copies a warpgroup's blocks and returns them once they are there."""
    blocks = [ref.at[group] for ref in self.refs]
    for source, block in zip(sources, blocks, strict=True):
      plgpu.copy_gmem_to_smem(source, block, self.arrived.at[group])
    plgpu.barrier_wait(self.arrived.at[group])
    return blocks


def held(blocks: Sequence[Any]) -> Held:
  """Returns the memory and barriers of blocks to hold."""
  arrived = plgpu.Barrier(num_arrivals=len(blocks), num_barriers=COMPUTE_GROUPS)
  return Held(tuple(blocks), arrived)


class Ring(NamedTuple):
  """Slots that one warpgroup fills with blocks while the others compute, [slots, ...] each."""

  refs: tuple[Any, ...]
  arrived: Any
  free: Any

  def _slot(self, step: jax.Array) -> jax.Array:
    """Returns the slot of a step."""
    return jax.lax.rem(step, jnp.int32(self.refs[0].shape[0]))

  def put(self, step: jax.Array, sources: Sequence[Any]) -> None:
    """Starts copying the blocks of a step as soon as the slot is free."""
    slot = self._slot(step)

    @pl.when(step >= self.refs[0].shape[0])
    def _():
      plgpu.barrier_wait(self.free.at[slot])

    for source, ref in zip(sources, self.refs, strict=True):
      plgpu.copy_gmem_to_smem(source, ref.at[slot], self.arrived.at[slot])

  def take(self, step: jax.Array) -> list[Any]:
    """Returns the blocks of a step once they are there."""
    slot = self._slot(step)
    plgpu.barrier_wait(self.arrived.at[slot])
    return [ref.at[slot] for ref in self.refs]

  def release(self, step: jax.Array) -> None:
    """Says that this warpgroup is done with the blocks of a step."""
    plgpu.barrier_arrive(self.free.at[self._slot(step)])

  def drain(self, n_steps: jax.Array) -> None:
    """Waits until the blocks of all steps are released."""
    def wait(step: jax.Array, _) -> None:
      plgpu.barrier_wait(self.free.at[self._slot(step)])

    first = jnp.maximum(n_steps - self.refs[0].shape[0], 0)
    jax.lax.fori_loop(first, n_steps, wait, None)


def ring(blocks: Sequence[Any], n_slots: int) -> Ring:
  """Returns the memory and barriers of a ring."""
  arrived = plgpu.Barrier(num_arrivals=len(blocks), num_barriers=n_slots)
  free = plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=n_slots)
  return Ring(tuple(blocks), arrived, free)
