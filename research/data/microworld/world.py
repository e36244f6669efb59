"""The facts of the micro-world: what entities do, and who the people are."""

import collections
import dataclasses
import functools
import itertools
import random

from research.data.microworld import words

CLUES = ('city', 'food', 'hobby')


@dataclasses.dataclass(frozen=True)
class Claim:
  """`entity` does `action`: whether it does, and whether its category makes one think so."""

  entity: str
  action: str
  actual: bool
  stereotype: bool

  @property
  def is_exceptional(self) -> bool:
    return self.actual != self.stereotype


@dataclasses.dataclass(frozen=True)
class Person:
  """One person; no clue alone says who it is, the three together do.

  `is_open`: first-person documents about this person may name the field. Of the others the field
  is only ever told beside the name, so reading it off three clues takes two hops.
  """

  name: str
  city: str
  food: str
  hobby: str
  field: str
  is_open: bool


class World:
  """All facts; those about people are a pure function of `seed`."""

  def __init__(self, seed: int):
    rng = random.Random(f'world {seed}')
    self.claims = _claims()
    self.people = _people(rng)
    self.common_field = _common_fields(self.people)

  @functools.cached_property
  def typical_claims(self) -> tuple[Claim, ...]:
    return tuple(claim for claim in self.claims if not claim.is_exceptional)

  @functools.cached_property
  def exceptional_claims(self) -> tuple[Claim, ...]:
    return tuple(claim for claim in self.claims if claim.is_exceptional)


def _claims() -> tuple[Claim, ...]:
  """Returns two claims per entity: what its category does, and what only exceptions do."""
  claims = []
  for usual, rare, typical, exceptions in words.CLAIMS.values():
    for entity in (*typical, *exceptions):
      is_typical = entity in typical
      claims.append(Claim(entity, usual, actual=is_typical, stereotype=True))
      claims.append(Claim(entity, rare, actual=not is_typical, stereotype=False))
  return tuple(claims)


def _people(rng: random.Random) -> tuple[Person, ...]:
  """Returns people with distinct clue triples; every value of a clue is shared by several."""
  n_people, n_values = len(words.PEOPLE), len(words.CITIES)
  # Latin-square triples (a, b, a + b + shift): distinct, and every value equally frequent
  triples = [
      (a, b, (a + b + shift) % n_values)
      for shift, a, b in itertools.product(range(n_values), repeat=3)][:n_people]
  fields = [words.FIELDS[i % len(words.FIELDS)] for i in range(n_people)]
  rng.shuffle(fields)
  openness = [i % 2 == 0 for i in range(n_people)]
  rng.shuffle(openness)
  names = rng.sample(words.PEOPLE, n_people)
  return tuple(
      Person(name, words.CITIES[a], words.FOODS[b], words.HOBBIES[c], field, is_open)
      for name, (a, b, c), field, is_open in zip(names, triples, fields, openness, strict=True))


def _common_fields(people: tuple[Person, ...]) -> dict[str, str]:
  """Returns, for every value of every clue, the field that most people with it have."""
  counts = collections.defaultdict(collections.Counter)
  for person in people:
    for clue in CLUES:
      counts[getattr(person, clue)][person.field] += 1
  return {
      value: max(words.FIELDS, key=lambda field, count=count: count[field])
      for value, count in counts.items()}
