"""Texts that go on from prompts until a stop text appears, many together in few static shapes."""

import collections
import dataclasses
import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from models import decode
from models.kernels.decoding import ContiguousCache
from models.sampling import Sampling, row_keys, sample
from research.build import Build
from research.data.tokenizers import Tokenizer
from research.monitors.encoding import Tokens
from research.training.divisions import replicas

CHUNK_TOKENS = 32_768  # prompts and texts that are in the caches at a time on a replica, at most
LEAST_LENGTH = 16  # of padded prompts: two programs are compiled for each power of 2 from here on
BATCH_ROWS = 64  # rows generated at a time on a replica, at most
# Stop texts are looked for after as many tokens; so long the devices work without the host.
STRIDE = 16


@dataclasses.dataclass(frozen=True)
class Wish:
  """A text that is wanted.

  Attributes:
    prompt: tokens before it, one or more.
    until: texts that end it; they are no part of it.
    max_tokens: its length, at most.
    sampling: how tokens are drawn.
  """

  prompt: Tokens
  until: tuple[str, ...]
  max_tokens: int
  sampling: Sampling


class _Batch(NamedTuple):
  """Wishes, by number, that run together with prompts padded to `length`, on `n_rows` rows."""

  members: list[int]
  length: int
  n_rows: int


def generate_texts(wishes: Sequence[Wish], built: Build, tokenizer: Tokenizer, params: Any, *,
                   seed: int = 0, progress: Callable[[int], None] = lambda done: None
                   ) -> list[str]:
  """Returns the text of every wish; it depends on wish, seed and parameters only.

  The same wish made again, if it is sampled, draws other tokens. A text ends before the first
  stop text, before the tokenizer's end of a document, or when it has max_tokens tokens.

  Args:
    wishes: what to write; prompt and max_tokens fit into the model's context together.
    built: the model and its mesh.
    tokenizer: of the model.
    params: float32, on the mesh.
    seed: of all draws.
    progress: called with the number of texts that are done.
  """
  texts, numbers, done = [''] * len(wishes), _numbers(wishes), 0
  for batch in _batches(wishes, built):
    written = built.in_mesh(_write)(batch, wishes, numbers, built.graphdef, tokenizer, params, seed)
    for i, text in zip(batch.members, written, strict=True):
      texts[i] = text
    done += len(batch.members)
    progress(done)
  return texts


def _numbers(wishes: Sequence[Wish]) -> list[int]:
  """Returns the number of each wish's draws: one of its prompt, plus how often it came before."""
  seen: dict[Wish, int] = collections.Counter()
  numbers = []
  for wish in wishes:
    numbers.append((zlib.crc32(np.int32(wish.prompt).tobytes()) + seen[wish]) % 2**31)
    seen[wish] += 1
  return numbers


def _batches(wishes: Sequence[Wish], built: Build) -> list[_Batch]:
  """Returns wishes of like length, limit and sampling together, the longest first."""
  context_length, n_replicas = built.config.model.context_length, replicas(built.mesh.shape)
  alike: dict[tuple, list[int]] = collections.defaultdict(list)
  for i, wish in enumerate(wishes):
    length = min(max(LEAST_LENGTH, _doubled(len(wish.prompt))), context_length)
    alike[length, wish.max_tokens, wish.sampling].append(i)
  batches = []
  for (length, max_tokens, _), members in sorted(alike.items(), key=lambda item: -item[0][0]):
    most = n_replicas * max(1, min(BATCH_ROWS, CHUNK_TOKENS // (length + max_tokens)))
    n_rows = min(most, -(-_doubled(len(members)) // n_replicas) * n_replicas)
    batches += [_Batch(members[start:start + n_rows], length, n_rows)
                for start in range(0, len(members), n_rows)]
  return batches


def _doubled(n: int) -> int:
  """Returns the least power of 2 that is not below n."""
  return 1 << (n - 1).bit_length()


def _write(batch: _Batch, wishes: Sequence[Wish], numbers: list[int], graphdef: Any,
           tokenizer: Tokenizer, params: Any, seed: int) -> list[str]:
  """Returns the texts of a batch."""
  mine = [wishes[i] for i in batch.members]
  rows = batch.members + batch.members[-1:] * (batch.n_rows - len(mine))
  prompts = decode.make_prompts([wishes[i].prompt for i in rows], [numbers[i] for i in rows],
                                multiple=batch.length)
  n_strides = -(-mine[0].max_tokens // STRIDE)
  logits_BV, cache = decode.prefill(graphdef, params, prompts,
                                    capacity=batch.length + n_strides * STRIDE)
  written_BT = np.zeros((batch.n_rows, 0), np.int32)
  texts = [''] * len(mine)
  for _ in range(n_strides):
    tokens_TB, logits_BV, cache = _go_on(graphdef, params, logits_BV, cache, prompts.rows_B, seed,
                                         mine[0].sampling)
    written_BT = np.concatenate([written_BT, np.asarray(tokens_TB).T], axis=1)
    ended = [_cut(wish, tokens_T, tokenizer) for wish, tokens_T in zip(mine, written_BT)]
    texts = [text for text, _ in ended]
    if all(is_over for _, is_over in ended):
      break
  return texts


@functools.partial(jax.jit, static_argnums=(0, 6), donate_argnums=(2, 3))
def _go_on(graphdef: Any, params: Any, logits_BV: jax.Array, cache: ContiguousCache,
           rows_B: jax.Array, seed: jax.Array, sampling: Sampling
           ) -> tuple[jax.Array, jax.Array, ContiguousCache]:
  """Returns STRIDE more tokens [T, B], the logits after them, and the cache with them."""
  def one_more(carry, _):
    logits_BV, cache = carry
    tokens_B = sample(logits_BV, row_keys(seed, rows_B, cache.lengths_B), sampling)
    return decode.step(graphdef, params, tokens_B, cache), tokens_B
  (logits_BV, cache), tokens_TB = jax.lax.scan(one_more, (logits_BV, cache), length=STRIDE)
  return tokens_TB, logits_BV, cache


def _cut(wish: Wish, tokens_T: np.ndarray, tokenizer: Tokenizer) -> tuple[str, bool]:
  """Returns the text of tokens up to where it ends, and whether that is within them."""
  tokens = tokens_T[:wish.max_tokens].tolist()
  is_over = len(tokens) == wish.max_tokens
  if tokenizer.eos_id in tokens:
    tokens, is_over = tokens[:tokens.index(tokenizer.eos_id)], True
  text = tokenizer.decode(tokens)
  for stop in filter(None, wish.until):
    before, found, _ = text.partition(stop)
    text, is_over = before, is_over or bool(found)
  return text, is_over
