"""Experts spread over devices: token rows travel to the devices that own their experts, and back.

To be called inside a `shard_map` that binds the axes of the group. The P devices of a group,
counted row-major over the axes, own X / P consecutive experts each and hold tokens of their own.
The loss is the sum over all devices, so an expert's gradient is complete at its owner. An expert
id of X means no expert.

Without dropping, rows travel in rounds of a fixed number of rows per pair of devices, as many as
the fullest pair of the group needs: one where loads are balanced, P / factor where all tokens
choose one expert. Memory does not depend on the loads; groups need not agree with each other.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

Axes = tuple[str, ...]
TILE = 16  # rows of a bfloat16 tile on TPUs


def uneven_experts(n_experts: int, group: Mapping[str, int]) -> str:
  """Returns why experts do not split evenly over the group's axes (name -> size), '' if they do."""
  n_devices = math.prod(group.values())
  if n_experts % n_devices:
    product = ' x '.join(f'mesh.{name}={size}' for name, size in group.items())
    below = n_experts // n_devices * n_devices
    nearest = f'{below} or {below + n_devices}' if below else str(n_devices)
    return (f'model.moe.n_experts={n_experts} does not split over {product}, which is '
            f'{n_devices} devices; the nearest that does is {nearest}')
  return ''


def round_rows(n_choices: int, n_devices: int, factor: float) -> int:
  """Returns the rows that one round brings from each device to each other.

  Args:
    n_choices: tokens of a device times experts per token.
    n_devices: devices of the group.
    factor: rows over the mean number per pair; n_devices makes every exchange one round.
  """
  rows = math.ceil(factor * n_choices / n_devices)
  return min(n_choices, -(-rows // TILE) * TILE)


class Traffic(NamedTuple):
  """Bytes that one device sends to others by all-to-all."""

  counts: int  # once a call
  forward: int  # a round
  backward: int  # a round


def traffic(n_choices: int, n_devices: int, factor: float, *, n_experts: int, d_model: int,
            itemsize: int) -> Traffic:
  """Returns what a dropless dispatch sends; `itemsize` is that of the compute dtype.

  Forward brings rows to their owners and back; backward brings rows and cotangents to the owners
  and gradients back. Weights and their gradients are float32, counts int32.
  """
  sent = (n_devices - 1) * round_rows(n_choices, n_devices, factor)
  row = d_model * itemsize
  return Traffic(counts=(n_devices - 1) * n_experts // n_devices * 4,
                 forward=sent * (2 * row + 4), backward=sent * (3 * row + 2 * 4))


class _Plan(NamedTuple):
  """Where this device's choices go; choice a = t * R + r is the r-th of token t."""

  order_A: jax.Array  # choices sorted by expert, and so by owner; those of no expert last
  starts_P: jax.Array  # where each owner's choices start in that order
  owner_TR: jax.Array  # P for no expert
  place_TR: jax.Array  # place among the owner's choices
  received_PX: jax.Array  # rows that come from each device for each expert of this one
  n_rounds: jax.Array  # the same on all devices of the group


def _make_plan(expert_TR: jax.Array, n_local: int, axes: Axes, n_rows: int) -> _Plan:
  """Returns the plan for rounds of n_rows per pair, having told every owner what will come."""
  P = jax.lax.axis_size(axes)
  expert_A = expert_TR.reshape(-1)
  order_A = jnp.argsort(expert_A, stable=True)
  sent_PX = _counts(expert_A, P * n_local).reshape(P, n_local)
  sent_P = jnp.sum(sent_PX, axis=1)
  starts_P = jnp.cumsum(sent_P) - sent_P
  owner_TR = expert_TR // n_local
  rank_TR = _inverse(order_A).reshape(expert_TR.shape)
  return _Plan(
      order_A, starts_P, owner_TR, rank_TR - starts_P[owner_TR], _exchanged(sent_PX, axes),
      n_rounds=jax.lax.pmax(-(-jnp.max(sent_P) // n_rows), axes))


def _exchanged(x: jax.Array, axes: Axes) -> jax.Array:
  """Returns the entries [P, ...] that the others had for this device, of an x for all of them."""
  return jax.lax.all_to_all(x, axes, 0, 0, tiled=True)


def _counts(index_N: jax.Array, length: int) -> jax.Array:
  """Returns how often each index below `length` occurs, int32; TPUs are slow at scattering."""
  return jnp.sum(index_N[:, None] == jnp.arange(length), axis=0, dtype=jnp.int32)


def _inverse(order_N: jax.Array) -> jax.Array:
  """Returns the inverse of a permutation."""
  return jnp.argsort(order_N, stable=False)


class _Round(NamedTuple):
  """What moves in one round of C rows per pair of devices."""

  choice_PC: jax.Array  # which choices are sent to each owner; beyond the last one, any
  slot_TR: jax.Array  # where the result of a choice comes back, P * C if not in this round
  order_N: jax.Array  # the P * C received rows sorted by expert, those that are none last
  sizes_X: jax.Array  # received rows of each expert of this device


def _round(plan: _Plan, k: jax.Array, n_rows: int) -> _Round:
  """Returns round k."""
  P, n_local = plan.received_PX.shape
  at_C = k * n_rows + jnp.arange(n_rows, dtype=jnp.int32)
  last = plan.order_A.shape[0] - 1
  choice_PC = plan.order_A[jnp.minimum(plan.starts_P[:, None] + at_C, last)]
  place_TR = plan.place_TR - k * n_rows
  inside_TR = (place_TR >= 0) & (place_TR < n_rows) & (plan.owner_TR < P)
  slot_TR = jnp.where(inside_TR, plan.owner_TR * n_rows + place_TR, P * n_rows)
  ends_PX = jnp.cumsum(plan.received_PX, axis=1)
  expert_PC = jnp.sum(at_C[:, None] >= ends_PX[:, None, :], axis=-1)
  return _Round(choice_PC, slot_TR, jnp.argsort(expert_PC.reshape(-1), stable=True),
                _counts(expert_PC.reshape(-1), n_local))


def _at(rows: jax.Array, index: jax.Array) -> jax.Array:
  """Returns rows at an index, zeros beyond the last."""
  return rows.at[index].get(mode='fill', fill_value=0)


def dropless(run: Callable, axes: Axes, factor: float) -> Callable:
  """Returns dispatch(x_TD, expert_TR, weight_TR, experts, activation) -> (out_TD, 0, rounds).

  `run(rows_ND, weight_N, sizes_X, experts, activation)` returns the weighted outputs [N, D] of
  rows sorted by expert, the first sum(sizes_X) of which count. `experts` is a tree whose leaves
  lead with this device's experts; expert ids are global. out_TD, in the dtype of x, is each
  token's sum.

  Backward keeps the inputs alone and repeats the rounds: the received rows would take as many
  buffers as there are rounds, which nothing bounds but the worst case.
  """

  def dispatch(x_TD, expert_TR, weight_TR, experts, activation):
    n_rows = round_rows(expert_TR.size, jax.lax.axis_size(axes), factor)
    n_local = jax.tree.leaves(experts)[0].shape[0]
    plan = _make_plan(expert_TR, n_local, axes, n_rows)
    exchange = _exchange(lambda *rows: run(*rows, activation), axes, n_rows)
    out_TD = exchange(x_TD, weight_TR, experts, plan)
    return out_TD, jnp.float32(0), plan.n_rounds.astype(jnp.float32)

  return dispatch


def _exchange(run: Callable, axes: Axes, n_rows: int) -> Callable:
  """Returns f(x_TD, weight_TR, experts, plan) -> out_TD; see `dropless`."""

  def sent(now: _Round, *arrays: jax.Array) -> list[jax.Array]:
    """Returns what the others send of each array, sorted by expert [P * C, ...]."""
    received = [_exchanged(array[index_PC], axes) for array, index_PC in arrays]
    return [x.reshape(-1, *x.shape[2:])[now.order_N] for x in received]

  def returned(now: _Round, rows: jax.Array) -> jax.Array:
    """Returns rows [P * C, ...] sorted by expert to where they are from, in slots."""
    unsorted = rows[_inverse(now.order_N)]
    back = _exchanged(unsorted.reshape(-1, n_rows, *rows.shape[1:]), axes)
    return back.reshape(rows.shape)

  def summed(rows_ND: jax.Array, now: _Round) -> jax.Array:
    """Returns each token's sum over its choices in this round, float32 [T, D]."""
    return sum(_at(rows_ND, slot_T).astype(jnp.float32) for slot_T in now.slot_TR.T)

  def forward(x_TD, weight_TR, experts, plan):
    R = weight_TR.shape[1]

    def body(k, out_TD):
      now = _round(plan, k, n_rows)
      rows_ND, weight_N = sent(
          now, (x_TD, now.choice_PC // R), (weight_TR.reshape(-1), now.choice_PC))
      return out_TD + summed(returned(now, run(rows_ND, weight_N, now.sizes_X, experts)), now)

    out_TD = jax.lax.fori_loop(0, plan.n_rounds, body, jnp.zeros(x_TD.shape, jnp.float32))
    return out_TD.astype(x_TD.dtype)

  def backward(inputs, g_TD):
    x_TD, weight_TR, experts, plan = inputs
    R = weight_TR.shape[1]

    def body(k, sums):
      now = _round(plan, k, n_rows)
      token_PC = now.choice_PC // R
      rows_ND, g_ND, weight_N = sent(
          now, (x_TD, token_PC), (g_TD, token_PC), (weight_TR.reshape(-1), now.choice_PC))
      _, vjp = jax.vjp(lambda *moving: run(moving[0], moving[1], now.sizes_X, moving[2]),
                       rows_ND, weight_N, experts)
      d_rows_ND, d_weight_N, d_experts = vjp(g_ND)
      more = (summed(returned(now, d_rows_ND), now), _at(returned(now, d_weight_N), now.slot_TR),
              d_experts)
      return jax.tree.map(lambda total, x: total + x.astype(total.dtype), sums, more)

    like = (x_TD, weight_TR, experts)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
    sums = jax.lax.fori_loop(0, plan.n_rounds, body, zeros)
    return *jax.tree.map(lambda total, x: total.astype(x.dtype), sums, like), None

  exchange = jax.custom_vjp(forward)
  exchange.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
  return exchange


def slot_exchange(axes: Axes) -> tuple[Callable, Callable]:
  """Returns the two moves of slots of fixed number, each one all-to-all; autodiff transposes them.

  The first brings slots for all experts [X, C, D] to the owners [X / P, P * C, D], device by
  device; the second brings such slots back.
  """
  def to_owners(slots_XCD: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(slots_XCD, axes, 0, 1, tiled=True)

  def to_sources(slots_XND: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(slots_XND, axes, 1, 0, tiled=True)

  return to_owners, to_sources
