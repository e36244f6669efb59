"""Persona: facts about invented people, then a question that takes two or three of them.

The shallow rule answers with the fact of the person who is named; in the control, which asks for
one fact, that is right.
"""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from research.monitors.items import MonitorItem
from research.monitors.small import words
from research.monitors.small.config import MOST_ITEMS, SmallSuiteConfig
from research.monitors.small.drawing import (
    Context, Question, Rivals, Wording, context_items, rng_of)

# (people, steps from the named person to the one who is meant)
LEVELS = {'easy': (3, 1), 'medium': (6, 1), 'hard': (6, 2)}


class Attribute(NamedTuple):
  """Something everyone has one of: as a sentence, as a list entry, as a question."""

  says: str
  entry: str
  question: str
  values: Sequence[str]


ATTRIBUTES = (
    Attribute('was born in', 'birthplace', 'Where was {who} born', words.CITIES),
    Attribute('plays the', 'instrument', 'What does {who} play', words.INSTRUMENTS),
    Attribute('keeps a', 'pet', 'Which pet does {who} keep', words.PETS),
    Attribute('likes to drink', 'drink', 'What does {who} like to drink', words.DRINKS))
WORDINGS = (
    Wording('sentences', '{sentences}\n{Who} {says}'),
    Wording('list', '{entries}\n{entry} of {who}:'),
    Wording('question', '{sentences}\n\nQ: {question}?\nA:'))


class People(NamedTuple):
  """Who has what, and whose teacher (or the like) is whom: `related` is one circle."""

  attribute: Attribute
  role: str
  values: dict[str, str]
  related: dict[str, str]


def _people(rng: random.Random, seed: int, n_people: int) -> People:
  attribute = ATTRIBUTES[seed % len(ATTRIBUTES)]
  names = rng.sample(words.NAMES, n_people)
  circle = rng.sample(names, n_people)
  return People(attribute, rng.choice(words.ROLES),
                dict(zip(names, rng.sample(attribute.values, n_people))),
                dict(zip(circle, circle[1:] + circle[:1])))


def _facts(rng: random.Random, people: People) -> dict[str, str]:
  """Returns all facts in random order, as sentences and as a list."""
  facts = []
  for name, value in people.values.items():
    facts.append((f'{name} {people.attribute.says} {value}.',
                  f'{people.attribute.entry} of {name}: {value}'))
    facts.append((f'The {people.role} of {name} is {people.related[name]}.',
                  f'{people.role} of {name}: {people.related[name]}'))
  rng.shuffle(facts)
  return {'sentences': ' '.join(sentence for sentence, _ in facts),
          'entries': '\n'.join(entry for _, entry in facts)}


def _asked(people: People, facts: dict[str, str], name: str, n_steps: int) -> tuple[Question, str]:
  """Returns the question that starts from a name, and who is meant."""
  meant = name
  for _ in range(n_steps):
    meant = people.related[meant]
  who = f'the {people.role} of ' * n_steps + name
  attribute = people.attribute
  return Question({**facts, 'who': who, 'Who': who[0].upper() + who[1:], 'says': attribute.says,
                   'entry': attribute.entry, 'question': attribute.question.format(who=who)},
                  people.values[meant]), meant


def items(config: SmallSuiteConfig) -> Iterator[MonitorItem]:
  """Yields the family; of a context with fewer people than items, one item for each."""
  for level in config.levels:
    dataset = f'persona_{level}'
    for seed in range(config.contexts):
      pattern, control = _contexts(rng_of(dataset, seed), seed, *LEVELS[level])
      yield from context_items(config, 'persona', dataset, seed, WORDINGS, pattern, control)


def _contexts(rng: random.Random, seed: int, n_people: int, n_steps: int
              ) -> tuple[Context, Context]:
  """Returns questions of several facts, and questions of one with the same two answers."""
  people = _people(rng, seed, n_people)
  facts = _facts(rng, people)
  several, one = [], []
  for name in rng.sample(list(people.values), min(n_people, MOST_ITEMS)):
    question, meant = _asked(people, facts, name, n_steps)
    right, own = people.values[meant], people.values[name]
    several.append(Rivals(question, right, own))
    one.append(Rivals(_asked(people, facts, name, 0)[0], own, right))
  return Context((), several), Context((), one)
