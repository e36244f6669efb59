"""How the small suite's items are put together: questions, wordings, demonstrations, controls."""

import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from research.monitors.items import MATCHED, MonitorItem
from research.monitors.small.config import SmallSuiteConfig

SEED = 'small suite 2'  # another one draws another suite


class Question(NamedTuple):
  """What is asked, in parts that a wording puts together, and its true answer."""

  parts: Mapping[str, str]
  answer: str


class Wording(NamedTuple):
  """One way to ask.

  Attributes:
    name: the item's variant.
    template: of parts in braces; a space and the answer follow it.
    joiner: between demonstrations, and before the question.
    labels: what answers are called; those that are not in it are called as they are.
  """

  name: str
  template: str
  joiner: str = '\n'
  labels: Mapping[str, str] = {}

  def asked(self, question: Question) -> str:
    """Returns the question."""
    return self.template.format(**question.parts)

  def called(self, answer: str) -> str:
    """Returns an answer as it follows a question."""
    return ' ' + self.labels.get(answer, answer)


class Rivals(NamedTuple):
  """A question, and the answers of the general and of the shallow rule."""

  question: Question
  generalizing: str
  shortcut: str


class Context(NamedTuple):
  """What one seed of a dataset asks: (question, answer given) demonstrations and questions."""

  shown: Sequence[tuple[Question, str]]
  asked: Sequence[Rivals]


def rng_of(dataset: str, seed: int) -> random.Random:
  """Returns the generator of one context; contexts do not depend on how many there are."""
  return random.Random(f'{SEED}/{dataset}/{seed}')


def context_items(config: SmallSuiteConfig, family: str, dataset: str, seed: int,
                  wordings: Sequence[Wording], pattern: Context, control: Context
                  ) -> Iterator[MonitorItem]:
  """Yields the items of a context and those of its matched control.

  Contexts go through the wordings in turn, so that any number of them is balanced.
  """
  for context, is_control in ((pattern, False), (control, True)):
    name = dataset + MATCHED * is_control
    for k in range(config.wordings):
      wording = wordings[(seed + k) % len(wordings)]
      shown = [wording.asked(question) + wording.called(answer)
               for question, answer in context.shown]
      for i, (question, right, wrong) in enumerate(context.asked[:config.items]):
        yield MonitorItem(
            f'{family}/{name}/{seed}/{wording.name}/{i}', family, name, seed, wording.name,
            wording.joiner.join([*shown, wording.asked(question)]), wording.called(right),
            wording.called(wrong), is_control)


def drawn(rng: random.Random, pool: Sequence, n: int) -> list:
  """Returns n of a pool in random order, repeating itself only where the pool is too small."""
  shuffled = rng.sample(pool, len(pool))
  return [shuffled[i % len(pool)] for i in range(n)]


def truthful(questions: Sequence[Question]) -> list[tuple[Question, str]]:
  """Returns demonstrations with their true answers."""
  return [(question, question.answer) for question in questions]
