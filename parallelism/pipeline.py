"""Runs a pipeline schedule inside a manual `shard_map`: every stage on its own devices.

Each tick of the table is one step of a scan. A stage looks up what it has to do, runs it under
`lax.cond`, so that idle halves of a tick execute nothing, and hands its output to the next stage
and its input's gradient to the previous one. Between forward and backward a stage stores the
inputs of its chunks only; backward runs a chunk's forward again inside `jax.vjp`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from parallelism.schedules import IDLE, Schedule, slots

AXIS = 'stage'
# Names of the conditionals in a compiled program, see `branch_shares`.
FORWARD, BACKWARD = 'pipeline_forward', 'pipeline_backward'
AT_FIRST, AT_LAST = 'pipeline_at_first', 'pipeline_at_last'


class Parts(NamedTuple):
  """A model cut into what the ends of the pipeline do and what every chunk does.

  first(shared, micro) -> x; chunk(params, place, x, micro) -> (x, loss, sums); last(shared, x,
  micro) -> (loss, sums). A place is chunk c * S + s of the model, an int32 scalar. The losses are
  scalars and add up to the objective, over chunks, ends and microbatches; sums are trees of
  scalars of one structure, added up the same way. x has one shape throughout.
  """

  first: Callable[[Any, Any], jax.Array]
  chunk: Callable[[Any, jax.Array, jax.Array, Any], tuple[jax.Array, jax.Array, Any]]
  last: Callable[[Any, jax.Array, Any], tuple[jax.Array, Any]]


class Row(NamedTuple):
  """What one stage does in one tick: microbatch, chunk and slot of each half, IDLE if nothing."""

  forward: jax.Array
  forward_slot: jax.Array
  backward: jax.Array
  backward_slot: jax.Array


class Carry(NamedTuple):
  """What a stage holds between ticks."""

  x: jax.Array  # the previous place's output
  g: jax.Array  # the next place's gradient of its input
  stored: jax.Array  # inputs of chunks, [slots, ...]
  loss: jax.Array
  sums: Any
  d_chunks: Any
  d_shared: Any
  ran: jax.Array  # int32 [2]: forwards and backwards of this tick, counted where they run


def _at(tree: Any, index: jax.Array) -> Any:
  """Returns the entry of every leaf at an index of its leading axis."""
  return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _plus_at(tree: Any, index: jax.Array, addends: Any) -> Any:
  """Returns the tree with addends added to one entry of every leaf."""
  def add(x, addend):
    old = jax.lax.dynamic_index_in_dim(x, index, keepdims=False)
    return jax.lax.dynamic_update_index_in_dim(x, old + addend.astype(x.dtype), index, 0)
  return jax.tree.map(add, tree, addends)


def _plus(tree: Any, addends: Any) -> Any:
  """Returns the sum of two trees in the dtypes of the first."""
  return jax.tree.map(lambda x, addend: x + addend.astype(x.dtype), tree, addends)


def _cond(name: str, *arguments: Any) -> Any:
  """Returns `jax.lax.cond(*arguments)`, under a name that the compiled program keeps."""
  with jax.named_scope(name):
    return jax.lax.cond(*arguments)


def branch_shares(schedule: Schedule, stage: int | None = None) -> dict[str, tuple[float, float]]:
  """Returns how often the conditionals of a tick take either branch when they are reached.

  Shares are those of (false, true), by the conditional's name.

  Args:
    schedule: what stages do when.
    stage: whose, None for the mean over stages.
  """
  S, C = schedule.n_stages, schedule.n_chunks
  stages = range(S) if stage is None else [stage]
  runs = schedule.n_microbatches * C / schedule.n_ticks
  ends = {AT_FIRST: 0, AT_LAST: S - 1}
  shares = {FORWARD: runs, BACKWARD: runs,
            **{name: sum(s == end for s in stages) / len(stages) / C for name, end in ends.items()}}
  return {name: (1 - share, share) for name, share in shares.items()}


class _Stage:
  """One stage's work, traced once per program; the stage's number is a traced scalar."""

  def __init__(self, parts: Parts, schedule: Schedule, chunks: Any, shared: Any, micros: Any):
    self.parts, self.chunks, self.shared, self.micros = parts, chunks, shared, micros
    self.number = jax.lax.axis_index(AXIS)
    self.n_stages, self.n_chunks = schedule.n_stages, schedule.n_chunks

  def _is_first(self, chunk: jax.Array) -> jax.Array:
    return (self.number == 0) & (chunk == 0)

  def _place(self, chunk: jax.Array) -> jax.Array:
    return chunk * self.n_stages + self.number

  def _is_last(self, chunk: jax.Array) -> jax.Array:
    return (self.number == self.n_stages - 1) & (chunk == self.n_chunks - 1)

  def forward(self, row: Row, carry: Carry) -> Carry:
    """Stores a chunk's input and computes its output; the last chunk's is left to backward."""
    microbatch, chunk = row.forward
    micro = _at(self.micros, microbatch)
    x = _cond(
        AT_FIRST, self._is_first(chunk),
        lambda: self.parts.first(self.shared, micro).astype(carry.x.dtype), lambda: carry.x)
    y = _cond(AT_LAST, self._is_last(chunk), lambda: x,
              lambda: self.parts.chunk(_at(self.chunks, chunk), self._place(chunk), x, micro)[0])
    return carry._replace(
        x=y, stored=jax.lax.dynamic_update_index_in_dim(carry.stored, x, row.forward_slot, 0),
        ran=carry.ran.at[0].add(1))

  def backward(self, row: Row, carry: Carry) -> Carry:
    """Adds the gradients of a chunk, and of the ends where it is at one."""
    microbatch, chunk = row.backward
    micro, params = _at(self.micros, microbatch), _at(self.chunks, chunk)
    x, place = _at(carry.stored, row.backward_slot), self._place(chunk)

    def inner(carry: Carry) -> tuple[Carry, jax.Array]:
      (_, loss, sums), vjp = jax.vjp(
          lambda p, x: self.parts.chunk(p, place, x, micro), params, x)
      d_params, d_x = vjp((carry.g, jnp.ones_like(loss), jax.tree.map(jnp.zeros_like, sums)))
      return self._added(carry, chunk, loss, sums, d_params), d_x

    def final(carry: Carry) -> tuple[Carry, jax.Array]:
      def whole(p, shared, x):
        x, loss, sums = self.parts.chunk(p, place, x, micro)
        end_loss, end_sums = self.parts.last(shared, x, micro)
        return loss + end_loss, _plus(sums, end_sums)
      loss, vjp, sums = jax.vjp(whole, params, self.shared, x, has_aux=True)
      d_params, d_shared, d_x = vjp(jnp.ones_like(loss))
      carry = self._added(carry, chunk, loss, sums, d_params)
      return carry._replace(d_shared=_plus(carry.d_shared, d_shared)), d_x

    def through_first(carry: Carry) -> Carry:
      _, vjp = jax.vjp(lambda shared: self.parts.first(shared, micro).astype(x.dtype), self.shared)
      return carry._replace(d_shared=_plus(carry.d_shared, vjp(carry.g)[0]))

    carry, d_x = _cond(AT_LAST, self._is_last(chunk), final, inner, carry)
    carry = carry._replace(g=d_x)
    return _cond(AT_FIRST, self._is_first(chunk), through_first, lambda carry: carry, carry)

  def _added(self, carry: Carry, chunk: jax.Array, loss, sums, d_params) -> Carry:
    """Returns the carry with a chunk's loss, sums and gradients added."""
    return carry._replace(loss=carry.loss + loss, sums=_plus(carry.sums, sums),
                          d_chunks=_plus_at(carry.d_chunks, chunk, d_params),
                          ran=carry.ran.at[1].add(1))

  def tick(self, carry: Carry, rows: Row) -> tuple[Carry, jax.Array]:
    """Runs one tick and exchanges with the neighbors; also returns what ran."""
    row = _at(rows, self.number)
    carry = carry._replace(ran=jnp.zeros_like(carry.ran))
    carry = _cond(FORWARD, row.forward[0] != IDLE, self.forward, lambda _, c: c, row, carry)
    y = carry.x
    carry = _cond(BACKWARD, row.backward[0] != IDLE, self.backward, lambda _, c: c, row, carry)
    ring = range(self.n_stages)
    onward = [(s, (s + 1) % self.n_stages) for s in ring]
    back = [(s, (s - 1) % self.n_stages) for s in ring]
    return carry._replace(x=jax.lax.ppermute(y, AXIS, onward),
                          g=jax.lax.ppermute(carry.g, AXIS, back)), carry.ran


def _zeros(tree: Any, dtype: Any = None) -> Any:
  """Returns zeros of the shapes of a tree, of its dtypes unless one is given."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, dtype or x.dtype), tree)


def _check(schedule: Schedule, chunks: Any, micros: Any) -> None:
  """Raises ValueError where parameters or microbatches are not those of the schedule."""
  for what, tree, size in (('chunks', chunks, schedule.n_chunks),
                           ('micros', micros, schedule.n_microbatches)):
    for path, leaf in jax.tree.leaves_with_path(tree):
      if leaf.shape[:1] != (size,):
        raise ValueError(f'{what}{jax.tree_util.keystr(path)} of shape {leaf.shape} does not begin '
                         f'with {size}, as {schedule.name} of {schedule.n_stages} stages wants')


def run(parts: Parts, schedule: Schedule, chunks: Any, shared: Any, micros: Any):
  """Returns the stage's (loss, sums), (gradients of chunks, of shared), ran.

  To be called by every device, with the mesh axis 'stage' manual. All that comes back is the
  stage's own share: the objective and the gradients of `shared` are sums over stages. Gradients
  are float32. `ran`, int32 [ticks, 2], counts the forwards and backwards that the stage ran.

  Args:
    parts: the model.
    schedule: of two stages or more.
    chunks: parameters of the stage's chunks, leaves [C, ...].
    shared: parameters of the ends; every stage holds them.
    micros: microbatches, leaves [M, ...].

  Raises:
    ValueError: parameters or microbatches do not have the schedule's numbers.
  """
  _check(schedule, chunks, micros)
  kept = slots(schedule)
  rows = Row(*map(jnp.asarray, (schedule.forward, kept.forward, schedule.backward, kept.backward)))
  stage = _Stage(parts, schedule, chunks, shared, micros)
  one = jax.tree.map(lambda x: x[0], (chunks, micros))
  x = jax.eval_shape(parts.first, shared, one[1])
  _, loss, sums = jax.eval_shape(parts.chunk, one[0], jnp.int32(0), x, one[1])
  carry = Carry(_zeros(x), _zeros(x), jnp.zeros((kept.n_slots, *x.shape), x.dtype), _zeros(loss),
                _zeros(sums), _zeros(chunks, jnp.float32), _zeros(shared, jnp.float32),
                jnp.zeros(2, jnp.int32))
  carry, ran = jax.lax.scan(stage.tick, carry, rows)
  return (carry.loss, carry.sums), (carry.d_chunks, carry.d_shared), ran
