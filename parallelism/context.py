"""Attention over rows whose tokens are split over devices: keys in a ring, or heads for tokens.

Both run inside a manual `jax.shard_map` that binds the axis of the devices, over any function that
attends as `models.kernels.interface.Attention` says and is differentiable in both of its results.
They see the heads that they are given, so heads may be split over another axis.

The ring (Liu et al. 2023) takes rows in the order of `zigzag.zigzag_order`. A part of the keys
gives an output and a log-sum-exp; the parts are merged in float32. Backward sends keys and values
around once more, with their gradients, and runs each pair's forward again inside `jax.vjp`: what is
kept from forward are the arguments and the results, whatever the number of devices.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from parallelism.zigzag import DEAD, EARLY, LATE, Arm, Work, arms, work_at

HIDDEN = -1e30  # what attention gives as the log-sum-exp of a query that sees no key


class Attended(NamedTuple):
  """Output [B, l, H, E] in the dtype of the queries and float32 log-sum-exp [B, H, l]."""

  out_BLHE: jax.Array
  lse_BHL: jax.Array


class Queries(NamedTuple):
  """What stays where it is; None for segments or slopes that are not there."""

  q_BLHE: jax.Array
  segment_ids_BL: jax.Array | None
  slopes_H: jax.Array | None


class Keys(NamedTuple):
  """What goes around."""

  k_BMKE: jax.Array
  v_BMKE: jax.Array
  segment_ids_BM: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Ring:
  """What is static."""

  attend: Callable
  n_devices: int
  axis: str
  scale: float
  softcap: float
  mask: Any

  def sent(self, tree: Any, places: int) -> Any:
    """Returns the tree of the device that is `places` before this one."""
    n = self.n_devices
    pairs = [(i, (i + places) % n) for i in range(n)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, self.axis, pairs), tree)

  def attend_pair(
      self, offset: int, work: Work, queries: Queries, keys: Keys) -> tuple[jax.Array, jax.Array]:
    """Returns attention between two chunks.

    Where an offset stands for a longer distance ALiBi's bias is off by one number per head, which
    moves the log-sum-exp by it and leaves the output alone.
    """
    chunk = queries.q_BLHE.shape[1]
    out_BLHE, lse_BHL = self.attend(
        queries.q_BLHE, keys.k_BMKE, keys.v_BMKE, scale=self.scale, softcap=self.softcap,
        mask=dataclasses.replace(self.mask, q_offset=offset * chunk),
        segment_ids_BL=queries.segment_ids_BL, key_segment_ids_BM=keys.segment_ids_BM,
        alibi_slopes_H=queries.slopes_H)
    if queries.slopes_H is not None:
      farther = ((work.distance - offset) * chunk).astype(jnp.float32)
      lse_BHL -= queries.slopes_H[:, None] * farther
    return out_BLHE, lse_BHL


def _half(x: jax.Array, half: jax.Array, axis: int = 1) -> jax.Array:
  """Returns a half of x along an axis."""
  n = x.shape[axis] // 2
  return jax.lax.dynamic_slice_in_dim(x, half * n, n, axis)


def _chosen(halves: tuple[Any, Any], half: jax.Array) -> Any:
  """Returns one of the early and the late half."""
  return jax.tree.map(lambda early, late: jnp.where(half == LATE, late, early), *halves)


def _updated(halves: tuple[Any, Any], part: Any, half: jax.Array) -> tuple[Any, Any]:
  """Returns the early and the late half, one of them replaced.

  XLA does a selection in place; of what is updated at a computed place it copies the whole.
  """
  early, late = halves
  return (jax.tree.map(lambda old, new: jnp.where(half == EARLY, new, old), early, part),
          jax.tree.map(lambda old, new: jnp.where(half == LATE, new, old), late, part))


def _plus(halves: tuple[Any, Any], part: Any, half: jax.Array) -> tuple[Any, Any]:
  """Returns the early and the late half with something added to one of them."""
  total = jax.tree.map(lambda old, new: old + new.astype(old.dtype), _chosen(halves, half), part)
  return _updated(halves, total, half)


def _joined(early: jax.Array, late: jax.Array, axis: int = 1) -> jax.Array:
  """Returns the whole of two halves."""
  return jnp.concatenate([early, late], axis)


def _halves(work: Work, queries: Queries, keys: Keys) -> tuple[Queries, Keys]:
  """Returns the chunks that a piece of work is about."""
  q_BLHE, segment_ids_BL = jax.tree.map(lambda x: _half(x, work.q_half), queries[:2])
  return (Queries(q_BLHE, segment_ids_BL, queries.slopes_H),
          jax.tree.map(lambda x: _half(x, work.k_half), keys))


def _by_tokens(x_BHL: jax.Array) -> jax.Array:
  """Returns numbers [B, H, l] as factors of [B, l, H, E]."""
  return x_BHL.swapaxes(1, 2)[..., None]


def _inner(x_BLHE: jax.Array, y_BLHE: jax.Array) -> jax.Array:
  """Returns inner products over the head width, float32 [B, H, l]."""
  product_BLHE = x_BLHE.astype(jnp.float32) * y_BLHE.astype(jnp.float32)
  return jnp.sum(product_BLHE, axis=-1).swapaxes(1, 2)


def _merged(total: Attended, part: Attended) -> Attended:
  """Returns attention over the keys of both, float32."""
  # At least HIDDEN / 2: a query that sees no key has weights 0, not 1.
  top_BHL = jnp.maximum(jnp.maximum(total.lse_BHL, part.lse_BHL), HIDDEN / 2)
  old_BHL, new_BHL = jnp.exp(total.lse_BHL - top_BHL), jnp.exp(part.lse_BHL - top_BHL)
  sum_BHL = old_BHL + new_BHL
  seen_BHL = sum_BHL > 0
  sum_BHL = jnp.where(seen_BHL, sum_BHL, 1.0)
  out_BLHE = (total.out_BLHE * _by_tokens(old_BHL / sum_BHL)
              + part.out_BLHE * _by_tokens(new_BHL / sum_BHL))
  return Attended(out_BLHE, jnp.where(seen_BHL, top_BHL + jnp.log(sum_BHL), HIDDEN))


def _numbers(works: tuple[Work, ...], device: jax.Array) -> list[tuple[jax.Array, Work]]:
  """Returns a device's numbers of each piece of work, with which of its offsets is the device's."""
  tables = [(np.searchsorted(np.unique(work.offset), work.offset), work) for work in works]
  return jax.tree.map(lambda x: jnp.asarray(x, jnp.int32)[..., device], tables)


def _in_turn(pair: Callable, works: tuple[Work, ...], numbers: Any, keys: Keys, state: Any) -> Any:
  """Returns the state after a device's pairs of chunks of one step; dead ones run nothing.

  pair(offset, work, keys, state) -> state. `numbers` are those of the device.
  """
  for work, (branch, own) in zip(works, numbers, strict=True):
    branches = [functools.partial(pair, int(offset)) if offset != DEAD
                else lambda own, keys, state: state for offset in np.unique(work.offset)]
    state = jax.lax.switch(branch, branches, own, keys, state)
  return state


def _around(ring: Ring, pair: Callable, keys: Keys, kept: Any, nothing: Any) -> tuple[Any, Any]:
  """Returns what devices keep and what came together for their keys, after all steps.

  pair(offset, work, keys, (kept, added)) -> (kept, added) is run for each visible pair of chunks;
  `added` is an early and a late half that begin with `nothing`. They are added to what belongs to
  the keys at hand, which travels with them one step behind and comes home at the end. No send
  waits for work of the same step.
  """
  device = jax.lax.axis_index(ring.axis)
  chunk, window = keys.k_BMKE.shape[1] // 2, ring.mask.window

  def visit(works: tuple[Work, ...], numbers: Any, at_hand: Keys, kept: Any):
    kept, added = _in_turn(pair, works, numbers, at_hand, (kept, (nothing, nothing)))
    return kept, jax.tree.map(_joined, *added)

  def along(arm: Arm, kept: Any, brought: Any):
    def step(state, numbers):
      at_hand, kept, brought = state
      arrived = ring.sent(brought, arm.direction)
      kept, added = visit(arm.work, numbers, at_hand, kept)
      return kept, jax.tree.map(jnp.add, arrived, added)

    def step_and_send(state, numbers):
      return (ring.sent(state[0], arm.direction), *step(state, numbers)), None

    numbers = _numbers(arm.work, device)
    state = ring.sent(keys, arm.direction), kept, brought
    if arm.n_steps > 1:
      state, _ = jax.lax.scan(step_and_send, state, jax.tree.map(lambda x: x[:-1], numbers))
    kept, brought = step(state, jax.tree.map(lambda x: x[-1], numbers))
    return kept, ring.sent(brought, -arm.n_steps * arm.direction)

  own = work_at(np.zeros((), int), ring.n_devices, chunk, window)
  kept, brought = visit(own, _numbers(own, device), keys, kept)
  for arm in arms(ring.n_devices, chunk, window):
    kept, brought = along(arm, kept, brought)
  return kept, brought


def _forward(ring: Ring, queries: Queries, keys: Keys):
  """Returns the attention of this device's queries, and what backward needs."""
  def pair(offset: int, work: Work, keys: Keys, state):
    total, nothing = state
    part = ring.attend_pair(offset, work, *_halves(work, queries, keys))
    merged = _merged(_chosen(total, work.q_half), Attended(*part))
    return _updated(total, merged, work.q_half), nothing

  B, L, H, E = queries.q_BLHE.shape
  blank = Attended(jnp.zeros((B, L // 2, H, E), jnp.float32),
                   jnp.full((B, H, L // 2), HIDDEN, jnp.float32))
  (early, late), _ = _around(ring, pair, keys, (blank, blank), ())
  out_BLHE = _joined(early.out_BLHE, late.out_BLHE).astype(queries.q_BLHE.dtype)
  attended = Attended(out_BLHE, _joined(early.lse_BHL, late.lse_BHL, axis=2))
  return attended, (queries, keys, attended)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, queries: Queries, keys: Keys) -> Attended:
  """Returns the attention of this device's queries."""
  return _forward(ring, queries, keys)[0]


def _backward(ring: Ring, residuals, g: Attended):
  """Returns the gradients of queries, keys and values.

  With weights w_i = exp(lse_i - lse) a merge is out = sum_i w_i out_i, lse = log sum_i exp(lse_i).
  So the cotangents of part i are w_i g of its output and, of its log-sum-exp,
  w_i (g . out_i - g . out + g_lse).
  """
  queries, keys, attended = residuals
  inner_BHL = _inner(attended.out_BLHE, g.out_BLHE) - g.lse_BHL
  top_BHL = jnp.maximum(attended.lse_BHL, HIDDEN / 2)

  def pair(offset: int, work: Work, keys: Keys, state):
    d_queries, d_keys = state
    near, far = _halves(work, queries, keys)
    (out_BLHE, lse_BHL), vjp = jax.vjp(
        lambda q, k, v: ring.attend_pair(
            offset, work, near._replace(q_BLHE=q), far._replace(k_BMKE=k, v_BMKE=v)),
        near.q_BLHE, far.k_BMKE, far.v_BMKE)
    weights_BHL = jnp.exp(lse_BHL - _half(top_BHL, work.q_half, 2))
    g_BLHE = _half(g.out_BLHE, work.q_half)
    d_out_BLHE = (g_BLHE * _by_tokens(weights_BHL)).astype(g_BLHE.dtype)
    # With the rounded cotangent: the kernel takes its product with the output off again.
    d_lse_BHL = _inner(d_out_BLHE, out_BLHE) - weights_BHL * _half(inner_BHL, work.q_half, 2)
    d_q, *d_kv = vjp((d_out_BLHE, d_lse_BHL))
    return _plus(d_queries, d_q, work.q_half), _plus(d_keys, d_kv, work.k_half)

  dtype = queries.q_BLHE.dtype
  # Of a half; float32 on the wire too, where the keys of C devices come together.
  d_q_BLHE, d_k_BMKE = (jnp.zeros((x.shape[0], x.shape[1] // 2, *x.shape[2:]), jnp.float32)
                        for x in (queries.q_BLHE, keys.k_BMKE))
  d_queries, d_kv = _around(ring, pair, keys, (d_q_BLHE, d_q_BLHE), [d_k_BMKE, d_k_BMKE])
  d_k_BMKE, d_v_BMKE = (x.astype(dtype) for x in d_kv)
  return (Queries(_joined(*d_queries).astype(dtype), None,
                  jax.tree.map(jnp.zeros_like, queries.slopes_H)), Keys(d_k_BMKE, d_v_BMKE, None))


_attend.defvjp(_forward, _backward)


def _check_ring(ring: Ring, q_BLHE: jax.Array, k_BLKE: jax.Array) -> None:
  """Raises ValueError in one sentence for what the ring cannot do."""
  _check_axis(ring.axis, ring.n_devices)
  mask, length = ring.mask, q_BLHE.shape[1]
  if not mask.causal or mask.chunk or mask.q_offset:
    raise ValueError(
        f'the ring takes causal masks of whole rows, with or without a window, not causal='
        f'{mask.causal}, chunk={mask.chunk}, q_offset={mask.q_offset}; all_to_all takes any mask')
  if length % 2 or k_BLKE.shape[1] != length:
    raise ValueError(
        f'{length} queries and {k_BLKE.shape[1]} keys on each of {ring.n_devices} context devices '
        f'are not two chunks of one length; rows of a multiple of {2 * ring.n_devices} tokens are')


def _check_axis(axis: str, n_devices: int) -> None:
  """Raises ValueError where the axis that is bound has another number of devices."""
  if jax.lax.axis_size(axis) != n_devices:
    raise ValueError(f'the mesh axis {axis!r} has {jax.lax.axis_size(axis)} devices, the attention '
                     f'over it was made for {n_devices}')


def ring(attend: Callable, n_devices: int, axis: str = 'context') -> Callable:
  """Returns causal attention over rows split by `zigzag_order` over the devices of a manual axis.

  It takes queries [B, l, H, E], keys and values [B, l, K, E] of the device's l = L / C tokens and
  options as `attend` does: scale, mask, segment_ids_BL [B, l], softcap, alibi_slopes_H. The mask
  is that of the whole row. Without a window every device attends for as many pairs of tokens as
  the others at every step. With one, pairs of chunks outside it run nothing, keys are not sent
  where no device sees any, and only devices with the start of the row have less to do.

  Raises:
    ValueError: mask, lengths or the axis are not such as the ring takes.
  """
  def attended(q_BLHE, k_BLKE, v_BLKE, *, scale: float, mask: Any, segment_ids_BL=None,
               softcap: float = 0.0, alibi_slopes_H=None) -> Attended:
    static = Ring(attend, n_devices, axis, scale, softcap, mask)
    _check_ring(static, q_BLHE, k_BLKE)
    slopes_H = None if alibi_slopes_H is None else jnp.asarray(alibi_slopes_H, jnp.float32)
    return _attend(static, Queries(q_BLHE, segment_ids_BL, slopes_H),
                   Keys(k_BLKE, v_BLKE, segment_ids_BL))
  return attended


def uneven_heads(n_heads: int, n_devices: int) -> str:
  """Returns why query heads do not divide over the devices, '' if they do."""
  if n_heads % n_devices:
    fitting = [n for n in range(1, n_heads + 1) if n_heads % n == 0]
    below, above = [n for n in fitting if n < n_devices], [n for n in fitting if n > n_devices]
    return (f'{n_heads} query heads do not divide over {n_devices} context devices; '
            f'{" or ".join(map(str, below[-1:] + above[:1]))} would do, as would the ring, which '
            'splits no heads')
  return ''


def all_to_all(attend: Callable, n_devices: int, axis: str = 'context') -> Callable:
  """Returns attention over rows split over a manual axis: for it, heads are split in their place.

  Jacobs et al. 2023 (DeepSpeed-Ulysses). Device c holds tokens c * l .. (c + 1) * l; operands and
  options are those of `ring`, for any mask. The number of query heads is a multiple of the
  devices'. Key heads whose number is not are repeated until it is, that is to the least common
  multiple: it divides the query heads too, and each device gets the keys of its queries.

  Raises:
    ValueError: the query heads do not divide over the devices.
  """
  exchanged = functools.partial(jax.lax.all_to_all, axis_name=axis, tiled=True)

  def attended(q_BLHE, k_BLKE, v_BLKE, *, segment_ids_BL=None, alibi_slopes_H=None,
               **options: Any) -> Attended:
    H, K = q_BLHE.shape[2], k_BLKE.shape[2]
    _check_axis(axis, n_devices)
    if problem := uneven_heads(H, n_devices):
      raise ValueError(problem)
    copies = math.lcm(K, n_devices) // K
    arrays = [q_BLHE, *(jnp.repeat(x, copies, axis=2) for x in (k_BLKE, v_BLKE))]
    if segment_ids_BL is not None:
      options['segment_ids_BL'] = jax.lax.all_gather(segment_ids_BL, axis, axis=1, tiled=True)
    if alibi_slopes_H is not None:
      heads = H // n_devices
      options['alibi_slopes_H'] = jax.lax.dynamic_slice_in_dim(
          jnp.asarray(alibi_slopes_H, jnp.float32), jax.lax.axis_index(axis) * heads, heads)
    out, lse = attend(*(exchanged(x, split_axis=2, concat_axis=1) for x in arrays), **options)
    return Attended(exchanged(out, split_axis=1, concat_axis=2),
                    exchanged(lse, split_axis=2, concat_axis=1))
  return attended
