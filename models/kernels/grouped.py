"""Owns grouped products: blocks of sorted rows, each times the matrix of its expert.

A product takes rows [N, K] sorted by expert, matrices [X, K, F] and the number of rows of
each expert, int32 [X]; it returns [N, F] in the dtype of the rows. Rows beyond the blocks are
left open: they may hold anything, in the operands, the result and the gradients, and reach no
other row and no gradient of a matrix. Whoever reads rows masks them, which costs nothing in a
sum that follows.
"""

import functools
import itertools
from typing import Callable, NamedTuple

import jax
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm
import jax.numpy as jnp

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

MIB = 2**20
VMEM = 14 * MIB  # of the 16 that a kernel may use on all chips unless told otherwise
SIZES = (128, 256, 512, 1024, 2048)
SUBLANES = 16  # rows of a bfloat16 tile
# What a FLOP and a step of the grid cost in bytes of memory traffic, on chips of 240 FLOP per
# byte and 0.35 us per step of 1 TB/s; they only rank tilings.
FLOPS_PER_BYTE, STEP_BYTES = 240, 350_000


def _inside(x_NK: jax.Array, sizes_X: jax.Array) -> jax.Array:
  """Returns the rows, zero beyond the blocks."""
  return jnp.where((jnp.arange(x_NK.shape[0]) < jnp.sum(sizes_X))[:, None], x_NK, 0)


def ragged_dot(x_NK: jax.Array, weight_XKF: jax.Array, sizes_X: jax.Array) -> jax.Array:
  """Returns XLA's product, which is dense over all experts on CPU, TPU v5e and v6e.

  A dense product multiplies rows beyond the blocks by zero, which they have to be finite for.
  """
  rows_NK = _inside(x_NK, sizes_X)
  return _inside(jax.lax.ragged_dot(rows_NK, weight_XKF, sizes_X), sizes_X)


class Tiling(NamedTuple):
  """Sizes of a grid step: rows of x, their width and the width of the other operand."""

  rows: int
  k: int
  f: int


def _tile_bytes(tile: Tiling, itemsize: int, to_weights: bool) -> int:
  """Returns the fast memory that a grid step takes: two buffers of each block, the float32 sum
  and what the kernels convert to float32."""
  blocks = tile.rows * tile.k + tile.k * tile.f + tile.rows * tile.f
  if to_weights:
    return 2 * itemsize * blocks + 4 * tile.k * tile.f + 8 * tile.rows * (tile.k + tile.f)
  return 2 * itemsize * blocks + 12 * tile.rows * tile.f


def _cost(
  tile: Tiling, n_rows: int, k: int, f: int, n_experts: int, itemsize: int, to_weights: bool
) -> float:
  """Returns what a product takes, in bytes of memory traffic."""
  n_k, n_f, n_blocks = -(-k // tile.k), -(-f // tile.f), -(-n_rows // tile.rows) + n_experts
  products = 2 * n_blocks * tile.rows * n_k * tile.k * n_f * tile.f / FLOPS_PER_BYTE
  # A block that the next grid step uses as well is not fetched again.
  matrices = (n_experts if to_weights or n_k == 1 else n_blocks) * k * f
  rows = n_rows * (k * n_f + f * (n_k if to_weights else 1))
  return max(itemsize * (matrices + rows), products) + n_blocks * n_k * n_f * STEP_BYTES


@functools.cache
def tiling(
  n_rows: int, k: int, f: int, n_experts: int, itemsize: int, to_weights: bool
) -> Tiling:
  """Returns the cheapest tiling that fits the fast memory of a TPU core.

  Args:
    n_rows, k, f, n_experts: the problem: rows [N, K] times matrices [X, K, F].
    itemsize: bytes of an operand's element.
    to_weights: whether it is the product of rows and cotangents that gives [X, K, F].
  """
  widths = [[t for t in SIZES if t < width] + [width] for width in (k, f)]
  least = -(-n_rows // SUBLANES) * SUBLANES
  heights = [t for t in SIZES[:3] if t <= least] or [least]
  whole = [t for t in heights if n_rows % t == 0]  # other heights copy the rows to pad them
  tiles = [Tiling(*sizes) for sizes in itertools.product(whole or heights[:1], *widths)]
  fitting = [t for t in tiles if _tile_bytes(t, itemsize, to_weights) <= VMEM]
  return min(fitting, key=lambda t: _cost(t, n_rows, k, f, n_experts, itemsize, to_weights))


def _padded(x_NK: jax.Array, tile: Tiling) -> jax.Array:
  """Returns the rows, their number a multiple of the tile's."""
  extra = -x_NK.shape[0] % tile.rows
  return jnp.pad(x_NK, ((0, extra), (0, 0))) if extra else x_NK


def _exactly(dtype: jnp.dtype):
  """Returns the context in which the kernels keep all bits of operands of a dtype.

  They take no 'high', and for bfloat16, which has no more bits, no 'highest'.
  """
  return jax.default_matmul_precision('highest' if dtype == jnp.float32 else 'default')


def _times(x_NK, weight_XKF, sizes_X, interpret: bool, transposed: bool = False) -> jax.Array:
  """Returns the product, or that with the transposed matrices."""
  n_experts, *shape = weight_XKF.shape
  k, f = reversed(shape) if transposed else shape
  tile = tiling(x_NK.shape[0], k, f, n_experts, x_NK.dtype.itemsize, False)
  with _exactly(x_NK.dtype):
    out_NF = gmm(_padded(x_NK, tile), weight_XKF, sizes_X, x_NK.dtype, tuple(tile),
                 transpose_rhs=transposed, interpret=interpret)
  return out_NF[: x_NK.shape[0]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _megablox(x_NK, weight_XKF, sizes_X, interpret):
  """Returns the product; see `megablox`."""
  return _times(x_NK, weight_XKF, sizes_X, interpret)


def _megablox_forward(x_NK, weight_XKF, sizes_X, interpret):
  """Returns the product and its operands."""
  return _times(x_NK, weight_XKF, sizes_X, interpret), (x_NK, weight_XKF, sizes_X)


def _megablox_backward(interpret, saved, g_NF):
  """Returns the gradients of rows and matrices."""
  x_NK, weight_XKF, sizes_X = saved
  d_x_NK = _times(g_NF, weight_XKF, sizes_X, interpret, transposed=True)
  n_experts, k, f = weight_XKF.shape
  tile = tiling(x_NK.shape[0], k, f, n_experts, x_NK.dtype.itemsize, True)
  with _exactly(x_NK.dtype):
    d_weight_XKF = tgmm(_padded(x_NK, tile).T, _padded(g_NF, tile), sizes_X, weight_XKF.dtype,
                        tuple(tile), interpret=interpret)
  return d_x_NK, d_weight_XKF, None


_megablox.defvjp(_megablox_forward, _megablox_backward)


def megablox(
  x_NK: jax.Array, weight_XKF: jax.Array, sizes_X: jax.Array, interpret: bool = False
) -> jax.Array:
  """Returns the product by JAX's TPU kernels (Gale et al. 2022, by Pallas).

  Their own gradient uses one tiling for three products of different shapes; here each has the
  cheapest that fits. Rows and matrices are bfloat16 or float32, sums float32.
  """
  return _megablox(x_NK, weight_XKF, sizes_X.astype(jnp.int32), interpret)


class _Visit(NamedTuple):
  """A block of rows of one expert: the first, and which of the following belong to it."""

  expert: jax.Array
  start: jax.Array
  inside_T1: jax.Array


def _visits(sizes_X: jax.Array, height: int) -> tuple[jax.Array, Callable]:
  """Returns the number of blocks that cover all experts' rows, and i -> the i-th block."""
  sizes_X = jnp.asarray(sizes_X)
  blocks_X = -(-sizes_X // height)
  block_ends_X, row_ends_X = jnp.cumsum(blocks_X), jnp.cumsum(sizes_X)

  def visit(i):
    expert = jnp.searchsorted(block_ends_X, i, side='right')
    nth = i - (block_ends_X[expert] - blocks_X[expert])
    start = row_ends_X[expert] - sizes_X[expert] + nth * height
    return _Visit(expert, start, (start + jnp.arange(height) < row_ends_X[expert])[:, None])

  return block_ends_X[-1], visit


def _height(n_rows: int, n_experts: int) -> int:
  """Returns the rows of a block: half an expert's mean number or less, to waste few."""
  half = max(16, n_rows // n_experts // 2)
  return min(2 ** (half.bit_length() - 1), 128)


def _product_by_blocks(x_NK, weight_XKF, sizes_X, transposed: bool) -> jax.Array:
  """Returns the product, or that with the transposed matrices."""
  height = _height(x_NK.shape[0], weight_XKF.shape[0])
  n_visits, visit = _visits(sizes_X, height)
  rows_NK = jnp.pad(x_NK, ((0, height), (0, 0)))
  axis = 2 if transposed else 1

  def body(i, out_NF):
    now = visit(i)
    block_TK = jax.lax.dynamic_slice_in_dim(rows_NK, now.start, height)
    matrix = jax.lax.dynamic_index_in_dim(weight_XKF, now.expert, keepdims=False)
    out_TF = jax.lax.dot_general(block_TK, matrix, (((1,), (axis - 1,)), ((), ())))
    # What reaches beyond the expert's rows is zero until the next block overwrites it.
    return jax.lax.dynamic_update_slice_in_dim(
      out_NF, jnp.where(now.inside_T1, out_TF, 0), now.start, 0
    )

  n_out = weight_XKF.shape[3 - axis]
  start = jnp.zeros((rows_NK.shape[0], n_out), x_NK.dtype)
  return jax.lax.fori_loop(0, n_visits, body, start)[: x_NK.shape[0]]


@jax.custom_vjp
def by_blocks(x_NK: jax.Array, weight_XKF: jax.Array, sizes_X: jax.Array) -> jax.Array:
  """Returns the product in plain XLA: a loop over blocks of rows, each of one expert."""
  return _product_by_blocks(x_NK, weight_XKF, sizes_X, False)


def _by_blocks_forward(x_NK, weight_XKF, sizes_X):
  """Returns the product and its operands."""
  return by_blocks(x_NK, weight_XKF, sizes_X), (x_NK, weight_XKF, sizes_X)


def _by_blocks_backward(saved, g_NF):
  """Returns the gradients of rows and matrices, the latter summed in float32."""
  x_NK, weight_XKF, sizes_X = saved
  height = _height(x_NK.shape[0], weight_XKF.shape[0])
  n_visits, visit = _visits(sizes_X, height)
  x_NK_, g_NF_ = (jnp.pad(a, ((0, height), (0, 0))) for a in (x_NK, g_NF))

  def body(i, d_weight_XKF):
    now = visit(i)
    block_TK = jax.lax.dynamic_slice_in_dim(x_NK_, now.start, height)
    g_TF = jax.lax.dynamic_slice_in_dim(g_NF_, now.start, height)
    x_TK, g_TF = (jnp.where(now.inside_T1, a, 0) for a in (block_TK, g_TF))
    d_KF = jax.lax.dot_general(
      x_TK, g_TF, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    return d_weight_XKF.at[now.expert].add(d_KF)

  zeros = jnp.zeros(weight_XKF.shape, jnp.float32)
  d_weight_XKF = jax.lax.fori_loop(0, n_visits, body, zeros).astype(weight_XKF.dtype)
  return _product_by_blocks(g_NF, weight_XKF, sizes_X, True), d_weight_XKF, None


by_blocks.defvjp(_by_blocks_forward, _by_blocks_backward)

PRODUCTS: dict[str, Product] = {
  'ragged_dot': ragged_dot, 'megablox': megablox, 'blocks': by_blocks,
}
