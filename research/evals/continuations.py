"""Log-probabilities of continuations after contexts, many together in few static shapes.

Requests with the same context are an item with as many texts, laid out like those of monitors.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from models import transformer
from research.build import Build
from research.errors import UserError
from research.monitors.buckets import make_buckets
from research.monitors.encoding import Tokens
from research.monitors.scoring import Chunk, chunk_of, in_chunks, read, summed
from research.training.divisions import replicas

CHUNK_TOKENS = 16_384  # run at a time on a replica, at most
CHUNK_LOGITS = 1 << 28  # made at a time on a replica, at most: 1 GiB in float32
# Another compiled shape has to save as many: it takes time once, and padding at every checkpoint.
SHAPE_TOKENS = 1 << 12


class Request(NamedTuple):
  """Tokens to be scored after a context of one token or more."""

  context: Tokens
  continuation: Tokens


class Answer(NamedTuple):
  """Log-probability of a continuation in nats, and whether each of its tokens is the likeliest."""

  logp: float
  is_greedy: bool


class Continued(NamedTuple):
  """A context and all that shall be scored after it; see `buckets.Item`."""

  prompt: Tokens
  texts: tuple[Tokens, ...]

  @property
  def starts(self) -> tuple[int, ...]:
    return (len(self.prompt),) * len(self.texts)


class Plan(NamedTuple):
  """Requests laid out: chunks, the request [B, R] that each sum is of (-1: none), their number."""

  chunks: list[Chunk]
  slots: list[np.ndarray]
  n_requests: int


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
  members: dict[Tokens, list[int]] = collections.defaultdict(list)
  for i, request in enumerate(requests):
    members[request.context].append(i)
  items = [Continued(context, tuple(context + requests[i].continuation for i in mine))
           for context, mine in members.items()]
  buckets = make_buckets(
      items, context_length=built.config.model.context_length,
      row_multiple=replicas(built.mesh.shape), tokens=CHUNK_TOKENS,
      reads=CHUNK_LOGITS // built.config.model.vocab_size, shape_tokens=SHAPE_TOKENS)
  numbers = np.array([*(i for mine in members.values() for i in mine), -1])  # slot -1 stays -1
  parts = [(bucket, z) for bucket in reversed(buckets) for z in range(len(bucket.tokens_ZBS))]
  return Plan([chunk_of(in_chunks(bucket), z) for bucket, z in parts],
              [numbers[bucket.slots_ZBR[z]] for bucket, z in parts], len(requests))


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
        slots_BR, results = waiting.popleft()
        used_BR = slots_BR >= 0
        logps[slots_BR[used_BR]], likeliest[slots_BR[used_BR]] = (
            np.asarray(x_BR)[used_BR] for x_BR in results)
        done += int(used_BR.sum())
        progress(done)
    return [Answer(float(logp), bool(greedy)) for logp, greedy in zip(logps, likeliest)]


def _scored(graphdef: nnx.GraphDef, constrain: Callable, params: Any, chunk: Chunk
            ) -> tuple[jax.Array, jax.Array]:
  """Returns log-probabilities and whether every token of them is the likeliest, both [B, R]."""
  logps_BTR, likeliest_BTR = read(transformer.apply(graphdef, params), constrain, chunk)
  greedy_BR = jnp.all(likeliest_BTR | ~chunk.counts_BTR, axis=1)
  return constrain(summed(logps_BTR, chunk.counts_BTR), (None, None)), constrain(
      greedy_BR, (None, None))
