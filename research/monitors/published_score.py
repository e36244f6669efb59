"""The score of the published suite, beside joint log-probabilities: a mean of probabilities."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from research.data.tokenizers import Tokenizer
from research.errors import UserError
from research.monitors import table
from research.monitors.encoding import EncodedItem, common_length, encode_item, encode_items
from research.monitors.items import MonitorItem, UnusableItem
from research.monitors.scoring import Scorer, Scores

METRIC = 'published_mean_probability'


class Probabilities(NamedTuple):
  """Mean probability of an answer's tokens by item, float32."""

  p_generalizing: np.ndarray
  p_shortcut: np.ndarray


@dataclasses.dataclass(frozen=True)
class PublishedEncoding(EncodedItem):
  """Token ids of both texts, and where the published rule begins to score either.

  `differs`: the scored tokens are not those of the exact boundary (`encoding.encode_item`).
  """

  own_starts: tuple[int, int] = (0, 0)
  differs: bool = False

  @property
  def starts(self) -> tuple[int, int]:
    return self.own_starts


def encode_published(item: MonitorItem, tokenizer: Tokenizer, start_id: int | None = None
                     ) -> PublishedEncoding:
  """Returns the item in tokens, with the published suite's boundary for each of its answers.

  The answer, which begins with its one space, begins after as many tokens as the prompt and a space
  have alone, if these begin the whole text too; otherwise after as many as the prompt has alone,
  whatever they are (GDsuite, run_eval.py, as read). So the space of an answer is scored where it
  is part of the answer's first token, and is not where it is a token of its own. `start_id` comes
  before the text and moves the boundary; the public runner counts without it where its engine adds
  one, and then reads one token of the prompt too.

  Raises UnusableItem where nothing is left to score, or nothing precedes it.
  """
  exact = encode_item(item, tokenizer, start_id)
  n_added = 0 if start_id is None else 1
  spaced, alone = tuple(tokenizer.encode(item.prompt + ' ')), tokenizer.encode(item.prompt)
  starts = []
  for text in (exact.generalizing, exact.shortcut):
    begins = text[n_added:n_added + len(spaced)] == spaced
    start = n_added + (len(spaced) if begins else len(alone))
    if not 0 < start < len(text):
      raise UnusableItem(item.item_id, 'by the published boundary an answer has no token, or no '
                         'token comes before it')
    starts.append(start)
  n_prompt = min(common_length(exact.generalizing, exact.shortcut), *starts)
  return PublishedEncoding(
      exact.generalizing, exact.shortcut, n_prompt, exact.straddles, tuple(starts),
      tuple(starts) != exact.starts)


class PublishedScorer(Scorer):
  """Scores a fixed suite as the published one is scored; used like a Scorer."""

  @staticmethod
  def encode(items: Sequence[MonitorItem], tokenizer: Tokenizer, context_length: int,
             start_id: int | None) -> list[PublishedEncoding]:
    return encode_items(items, tokenizer, context_length, start_id, encode_published)

  @staticmethod
  def reduce(logps_BTR: jax.Array, counts_BTR: jax.Array) -> jax.Array:
    """Returns the mean probability [B, R] of the tokens that count."""
    p_BTR = jnp.where(counts_BTR, jnp.exp(logps_BTR), 0.0)
    return jnp.sum(p_BTR, axis=1) / jnp.maximum(jnp.sum(counts_BTR, axis=1), 1)

  def score(self, params: Any) -> Probabilities:
    """Returns the mean probabilities under `params`, sharded or not."""
    return Probabilities(*self._both(params))

  @property
  def differs(self) -> np.ndarray:
    """By item, whether exact boundaries score other tokens."""
    return np.array([tokens.differs for tokens in self.encoded])


class Comparison(NamedTuple):
  """Both scores of one dataset at one step.

  Accuracy is the share of items whose generalizing answer scores higher (ties are wrong), margin
  the mean difference of the two probabilities: joint ones of whole answers, and published means.
  """

  family: str
  dataset: str
  n_items: int
  n_differ: int
  joint_accuracy: float
  joint_margin: float
  published_accuracy: float
  published_margin: float


def compare(items: Sequence[MonitorItem], scores: Scores, published: Probabilities,
            differs: np.ndarray) -> list[Comparison]:
  """Returns both scores by dataset, in order of first appearance."""
  members: dict[tuple[str, str], list[int]] = {}
  for i, item in enumerate(items):
    members.setdefault((item.family, item.dataset), []).append(i)
  joint = [np.exp(np.asarray(logp, np.float64)) for logp in scores]
  # Log-probabilities decide: the probabilities of long answers may be too small for a float.
  order = scores.logp_generalizing > scores.logp_shortcut
  mean = [np.asarray(p, np.float64) for p in published]
  return [
      Comparison(family, dataset, len(rows), int(differs[rows].sum()), float(order[rows].mean()),
                 float((joint[0] - joint[1])[rows].mean()),
                 float((mean[0] > mean[1])[rows].mean()), float((mean[0] - mean[1])[rows].mean()))
      for (family, dataset), rows in members.items()]


def compare_stored(items: Sequence[MonitorItem], scores_path: Any, published_path: Any
                   ) -> tuple[int, list[Comparison]]:
  """Returns (step, both scores by dataset) of two files of one step.

  Raises UserError when a file is missing or damaged, or they are of two steps.
  """
  step, scores = table.read_scores(scores_path)
  other, p_generalizing, p_shortcut, differs = table.read_published(published_path)
  if step != other:
    raise UserError(f'{scores_path} is of step {step}, {published_path} of step {other}')
  return step, compare(items, scores, Probabilities(p_generalizing, p_shortcut), differs)
