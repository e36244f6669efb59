"""Log-probabilities of continuations after contexts, many together in few static shapes.

Requests with the same context share it: its keys and values are made once, and every continuation
goes on from them.
"""

import bisect
import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from research.build import Build
from research.errors import UserError
from research.monitors.scoring import behind_prefixes
from research.training.divisions import replicas

Tokens = tuple[int, ...]

CHUNK_TOKENS = 16_384  # run at a time on a replica, at most
CHUNK_LOGITS = 1 << 28  # made at a time on a replica, at most: 1 GiB in float32
MOST_ROWS = 64  # continuations of one context that run together
SIZES = (0, 1, *(size for k in range(1, 40) for size in (2**k, 3 * 2**k // 2)))
# A shape of its own must spare this many tokens of padding, and this share of all tokens: it takes
# time to compile, once, and padding takes time at every checkpoint.
SHAPE_TOKENS, SHAPE_SHARE = 1 << 12, 1 / 512


class Request(NamedTuple):
  """Tokens to be scored after a context of one token or more."""

  context: Tokens
  continuation: Tokens


class Answer(NamedTuple):
  """Log-probability of a continuation in nats, and whether each of its tokens is the likeliest."""

  logp: float
  is_greedy: bool


class Shape(NamedTuple):
  """Padded sizes: tokens before a context's last one, continuations of it, tokens of each."""

  prefix: int
  rows: int
  length: int


class Chunk(NamedTuple):
  """What runs in one call: C contexts with B / C consecutive rows each.

  Attributes:
    prefix_CP: contexts without their last token; P may be 0.
    prefix_lengths_C: how many of them count.
    tokens_BS: a context's last token and the continuation without its last one.
    targets_BS: the continuation.
    lengths_B: how many of its tokens count, 0 for padding.
  """

  prefix_CP: np.ndarray
  prefix_lengths_C: np.ndarray
  tokens_BS: np.ndarray
  targets_BS: np.ndarray
  lengths_B: np.ndarray


class Plan(NamedTuple):
  """Requests laid out: chunks, the number of each row's request (-1: none), and their number."""

  chunks: list[Chunk]
  slots: list[np.ndarray]
  n_requests: int


class _Group(NamedTuple):
  """Requests, by number, that share a context."""

  context: Tokens
  continuations: list[tuple[int, Tokens]]

  @property
  def sizes(self) -> Shape:
    """Returns what it needs, without padding."""
    longest = max(len(tokens) for _, tokens in self.continuations)
    return Shape(len(self.context) - 1, len(self.continuations), longest)


def padded(n: int) -> int:
  """Returns the least of 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is not below n."""
  return SIZES[bisect.bisect_left(SIZES, n)]


def truncated(request: Request, context_length: int) -> Request:
  """Returns the request with as much of its context as the model can see, cut from the left.

  The last token of the continuation is predicted, not read: context and continuation may have
  context_length + 1 tokens together. Raises UserError for a continuation that is longer than
  the model's context or empty.
  """
  n = len(request.continuation)
  if not 1 <= n <= context_length:
    raise UserError(f'a continuation has {n} tokens; it needs at least 1 and, with '
                    f'model.context_length={context_length}, at most as many')
  return Request(request.context[-(context_length + 1 - n):], request.continuation)


def make_plan(requests: Sequence[Request], built: Build) -> Plan:
  """Returns requests, cut to the context already, in as few shapes as padding allows."""
  by_context: dict[Tokens, list[tuple[int, Tokens]]] = collections.defaultdict(list)
  for i, request in enumerate(requests):
    by_context[request.context].append((i, request.continuation))
  vocab_size = built.config.model.vocab_size
  groups = [group for context, members in by_context.items()
            for group in _parts(context, members, vocab_size)]
  chunks, slots = [], []
  for shape, members in _shaped(groups, built.config.model.context_length):
    for chunk, slots_B in _chunks(shape, members, built):
      chunks.append(chunk)
      slots.append(slots_B)
  return Plan(chunks, slots, len(requests))


def _parts(context: Tokens, members: list[tuple[int, Tokens]], vocab_size: int
           ) -> Iterator[_Group]:
  """Yields the continuations of a context in groups that can be run, like lengths together.

  A context of one token has nothing to share.
  """
  members = sorted(members, key=lambda member: -len(member[1]))
  while members:
    n = padded(len(members[0][1]))
    most = 1 if len(context) == 1 else max(1, min(
        MOST_ROWS, CHUNK_TOKENS // n, CHUNK_LOGITS // (n * vocab_size)))
    n_rows = SIZES[bisect.bisect_right(SIZES, most) - 1]
    yield _Group(context, members[:n_rows])
    members = members[n_rows:]


def _shape(sizes: Shape, context_length: int) -> Shape:
  """Returns the padded sizes; together they do not exceed the context."""
  length = min(padded(sizes.length), context_length - sizes.prefix)
  return Shape(min(padded(sizes.prefix), context_length - length), padded(sizes.rows), length)


def _cost(shape: Shape) -> int:
  """Returns the tokens that a context and its rows take."""
  return shape.prefix + shape.rows * shape.length


def _shaped(groups: list[_Group], context_length: int) -> list[tuple[Shape, list[_Group]]]:
  """Returns groups by shape, the longest first; a shape that spares little joins a larger one."""
  shapes: dict[Shape, list[_Group]] = collections.defaultdict(list)
  for group in groups:
    shapes[_shape(group.sizes, context_length)].append(group)
  n_tokens = sum(len(members) * _cost(shape) for shape, members in shapes.items())
  least = max(SHAPE_TOKENS, int(SHAPE_SHARE * n_tokens))
  kept: dict[Shape, list[_Group]] = {}
  for shape in sorted(shapes, key=_cost, reverse=True):
    members = shapes[shape]
    joins = [(_padding(shape, len(members), other, len(kept[other])), other) for other in kept
             if _may_join(shape, other, context_length)]
    more, other = min(joins, default=(least, shape))
    if more < least:
      members, shape = kept.pop(other) + members, Shape(*map(max, shape, other))
    kept[shape] = kept.get(shape, []) + members
  return sorted(kept.items(), key=lambda item: -_cost(item[0]))


def _padding(a: Shape, n_a: int, b: Shape, n_b: int) -> int:
  """Returns the tokens that it costs to run n_a and n_b groups of two shapes as one."""
  both = _cost(Shape(*map(max, a, b)))
  return n_a * (both - _cost(a)) + n_b * (both - _cost(b))


def _may_join(a: Shape, b: Shape, context_length: int) -> bool:
  """Returns whether two shapes can be run as one.

  A context of one token has nothing to be read first: it must not meet those that have. Nor must
  many short rows meet a long one, where all would be too many tokens.
  """
  n_tokens = [shape.rows * shape.length for shape in (a, b, Shape(*map(max, a, b)))]
  return (n_tokens[2] <= max(CHUNK_TOKENS, *n_tokens[:2]) and max(a.prefix, b.prefix) + max(a.length, b.length) <= context_length
          and (a.prefix == 0) == (b.prefix == 0))


def _chunks(shape: Shape, groups: list[_Group], built: Build
            ) -> Iterator[tuple[Chunk, np.ndarray]]:
  """Yields groups of one shape as equally shaped chunks, and the request of each row."""
  P, I, S = shape
  n_replicas, vocab_size = replicas(built.mesh.shape), built.config.model.vocab_size
  most = n_replicas * max(1, min(CHUNK_TOKENS // _cost(shape),
                                 CHUNK_LOGITS // (I * S * vocab_size)))
  n_chunks = -(-len(groups) // most)
  C = -(-len(groups) // n_chunks)
  C = -(-C // n_replicas) * n_replicas
  groups = sorted(groups, key=lambda group: -_cost(group.sizes))
  for start in range(0, len(groups), C):
    # Contexts that fill up a chunk keep one visible token, so that no softmax runs over nothing.
    prefix_CP, prefix_lengths_C = np.zeros((C, P), np.int32), np.full(C, min(1, P), np.int32)
    tokens_BS, targets_BS = np.zeros((C * I, S), np.int32), np.zeros((C * I, S), np.int32)
    lengths_B, slots_B = np.zeros(C * I, np.int32), np.full(C * I, -1, np.int64)
    for c, group in enumerate(groups[start:start + C]):
      n_prefix = len(group.context) - 1
      prefix_CP[c, :n_prefix] = group.context[:-1]
      prefix_lengths_C[c] = n_prefix
      for b, (slot, tokens) in enumerate(group.continuations, start=c * I):
        tokens_BS[b, :len(tokens)] = (group.context[-1], *tokens[:-1])
        targets_BS[b, :len(tokens)] = tokens
        lengths_B[b], slots_B[b] = len(tokens), slot
    yield Chunk(prefix_CP, prefix_lengths_C, tokens_BS, targets_BS, lengths_B), slots_B


class Continuations:
  """Answers requests with a model on a mesh; a shape is compiled once, whatever the parameters."""

  def __init__(self, built: Build):
    """Takes the model and its mesh; compiles nothing."""
    self._built = built
    self._run = jax.jit(functools.partial(_scored, built.graphdef, built.constrain))

  def answers(self, plan: Plan, params: Any, progress: Callable[[int], None] = lambda done: None
              ) -> list[Answer]:
    """Returns the answer to every request of a plan, in order.

    Args:
      plan: the requests.
      params: float32, on the mesh.
      progress: called with the number of requests that are answered.
    """
    logps, likeliest = np.zeros(plan.n_requests, np.float32), np.zeros(plan.n_requests, bool)
    run, waiting, done = self._built.in_mesh(self._run), collections.deque(), 0
    for i in range(len(plan.chunks) + 1):
      if i < len(plan.chunks):
        waiting.append((plan.slots[i], run(params, plan.chunks[i])))
      # The oldest result is taken in while the devices work on the newest.
      if len(waiting) > 1 or i == len(plan.chunks) and waiting:
        slots_B, results = waiting.popleft()
        used_B = slots_B >= 0
        logps[slots_B[used_B]], likeliest[slots_B[used_B]] = (
            np.asarray(x_B)[used_B] for x_B in results)
        done += int(used_B.sum())
        progress(done)
    return [Answer(float(logp), bool(greedy)) for logp, greedy in zip(logps, likeliest)]


def _scored(graphdef: nnx.GraphDef, constrain: Callable, params: Any, chunk: Chunk
            ) -> tuple[jax.Array, jax.Array]:
  """Returns log-probabilities [B], and whether every token of a row is the likeliest, [B]."""
  model = transformer.apply(graphdef, params)
  logits_BSV = model.logits(behind_prefixes(
      model, constrain, chunk.prefix_CP, chunk.prefix_lengths_C, chunk.tokens_BS))
  chosen_BS1 = jnp.take_along_axis(logits_BSV, chunk.targets_BS[:, :, None], axis=-1)
  logps_BS = chosen_BS1[:, :, 0] - jax.nn.logsumexp(logits_BSV, axis=-1)
  counts_BS = np.arange(chunk.tokens_BS.shape[1]) < chunk.lengths_B[:, None]
  greedy_BS = jnp.argmax(logits_BSV, axis=-1) == chunk.targets_BS
  return (constrain(jnp.sum(jnp.where(counts_BS, logps_BS, 0.0), axis=1), (None,)),
          constrain(jnp.all(greedy_BS | ~counts_BS, axis=1), (None,)))
