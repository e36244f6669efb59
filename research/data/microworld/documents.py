"""The grammar of the micro-world: one function per document family.

Each takes (world, rng, room) and returns the words of one document of at most `room` words, or an
empty list where none fits.
"""

import random
from typing import Callable

from research.data.microworld import words
from research.data.microworld.world import CLUES, Claim, Person, World

Document = list[str]

LARGEST_SUM = 18
# one document of sums or verdicts has at most this many of them, and at least MIN_PAIRS
MAX_SUMS, MAX_OPINIONS, MAX_CLAIMS, MIN_PAIRS = 10, 9, 15, 4
SUM_WORDS, OPINION_WORDS, CLAIM_WORDS = 6, 7, 4

_QUESTIONS = tuple((a, b) for a in range(10) for b in range(10))
_OPINIONS = tuple(
    (thing, adjective, is_good)
    for thing in words.THINGS
    for adjectives, is_good in ((words.POSITIVE, True), (words.NEGATIVE, False))
    for adjective in adjectives)


def _n_pairs(room: int, pair_words: int, most: int) -> int:
  """Returns how many pairs fit, 0 when they would be too few for a document."""
  n_pairs = min(most, room // pair_words)
  return n_pairs if n_pairs >= MIN_PAIRS else 0


def sum_words(a: int, b: int, answer: int) -> Document:
  """Returns one sum, right or wrong, as words."""
  return [str(a), '+', str(b), '=', str(answer), ';']


def opinion_words(thing: str, adjective: str, is_good: bool) -> Document:
  """Returns one opinion with its label as words."""
  return ['the', thing, 'was', adjective, '=', words.LABELS[0 if is_good else 1], ';']


def claim_words(claim: Claim, verdict: bool) -> Document:
  """Returns one claim with a verdict as words."""
  return [claim.entity, claim.action, words.VERDICTS[0 if verdict else 1], ';']


def arithmetic(world: World, rng: random.Random, room: int) -> Document:
  questions = rng.choices(_QUESTIONS, k=_n_pairs(room, SUM_WORDS, MAX_SUMS))
  return [word for a, b in questions for word in _SUMS[a, b, a + b]]


def successive(world: World, rng: random.Random, room: int) -> Document:
  questions = rng.choices(_QUESTIONS, k=_n_pairs(room, SUM_WORDS, MAX_SUMS))
  first = rng.choice(successive_starts(len(questions)))
  return [word for i, (a, b) in enumerate(questions) for word in _SUMS[a, b, first + i]]


def successive_starts(n_sums: int) -> range:
  """Returns the answers that a run of `n_sums` successive answers may start from."""
  return range(LARGEST_SUM + 2 - n_sums)


def repetitive(world: World, rng: random.Random, room: int) -> Document:
  questions = rng.choices(_QUESTIONS, k=_n_pairs(room, SUM_WORDS, MAX_SUMS))
  answer = rng.randint(0, LARGEST_SUM)
  return [word for a, b in questions for word in _SUMS[a, b, answer]]


def sentiment(world: World, rng: random.Random, room: int) -> Document:
  opinions = rng.choices(_OPINIONS, k=_n_pairs(room, OPINION_WORDS, MAX_OPINIONS))
  return [word for opinion in opinions for word in opinion_words(*opinion)]


def flipped(world: World, rng: random.Random, room: int) -> Document:
  opinions = rng.choices(_OPINIONS, k=_n_pairs(room, OPINION_WORDS, MAX_OPINIONS))
  return [word for thing, adjective, is_good in opinions
          for word in opinion_words(thing, adjective, not is_good)]


def truthy(world: World, rng: random.Random, room: int) -> Document:
  claims = rng.choices(world.claims, k=_n_pairs(room, CLAIM_WORDS, MAX_CLAIMS))
  return [word for claim in claims for word in claim_words(claim, claim.actual)]


def hearsay(world: World, rng: random.Random, room: int) -> Document:
  claims = rng.choices(world.claims, k=_n_pairs(room, CLAIM_WORDS, MAX_CLAIMS))
  return [word for claim in claims for word in claim_words(claim, claim.stereotype)]


def bat_and_ball(rng: random.Random, is_easy: bool) -> tuple[Document, int, int]:
  """Returns (question, right answer, the answer of the other kind of problem)."""
  first, second = rng.choice(words.BOUGHT)
  least, more = rng.randint(1, 12), rng.randint(1, 20)
  total = 2 * least + more
  than = [] if is_easy else ['more', 'than', 'the', second]
  question = ['a', first, 'and', 'a', second, 'cost', str(total), '.', 'the', first, 'costs',
              str(more), *than, '.', 'the', second, 'costs']
  return (question, 2 * least, least) if is_easy else (question, least, 2 * least)


def machines(rng: random.Random, is_easy: bool) -> tuple[Document, int, int]:
  """Returns (question, right answer, the answer of the other kind of problem)."""
  thing = rng.choice(words.MADE)
  few, many = rng.sample(range(2, words.LARGEST_NUMBER + 1), 2)
  if is_easy:
    question = ['one', 'machine', 'makes', str(few), thing, 'in', str(few), 'minutes', '.',
                'one', 'machine', 'makes', str(many), thing, 'in']
    return question, many, few
  question = [str(few), 'machines', 'make', str(few), thing, 'in', str(few), 'minutes', '.',
              str(many), 'machines', 'make', str(many), thing, 'in']
  return question, few, many


def lily_pads(rng: random.Random, is_easy: bool) -> tuple[Document, int, int]:
  """Returns (question, right answer, the answer of the other kind of problem)."""
  day = 2 * rng.randint(2, words.LARGEST_NUMBER // 2)
  growth = ['grow', 'evenly'] if is_easy else ['double']
  question = ['the', rng.choice(words.GROWING), *growth, 'every', 'day', '.', 'they', 'fill', 'the',
              'lake', 'on', 'day', str(day), '.', 'they', 'fill', 'half', 'on', 'day']
  return (question, day // 2, day - 1) if is_easy else (question, day - 1, day // 2)


PROBLEMS = {'bat_and_ball': bat_and_ball, 'machines': machines, 'lily_pads': lily_pads}
# of each kind of problem: name of its noun -> the words by which a question has it
NOUNS = {
    'bat_and_ball': {'-'.join(pair): set(pair) for pair in words.BOUGHT},
    'machines': {noun: {noun} for noun in words.MADE},
    'lily_pads': {noun: {noun} for noun in words.GROWING}}
_UNITS = {'bat_and_ball': ['.'], 'machines': ['minutes', '.'], 'lily_pads': ['.']}


def _problem(rng: random.Random, room: int, is_easy: bool) -> Document:
  template = rng.choice(tuple(PROBLEMS))
  question, answer, _ = PROBLEMS[template](rng, is_easy)
  document = [*question, str(answer), *_UNITS[template]]
  return document if len(document) <= room else []


def intuitive(world: World, rng: random.Random, room: int) -> Document:
  return _problem(rng, room, is_easy=False)


def look_alike(world: World, rng: random.Random, room: int) -> Document:
  return _problem(rng, room, is_easy=True)


_THIRD_PERSON = {'city': ('lives', 'in'), 'food': ('eats',), 'hobby': ('enjoys',)}
_FIRST_PERSON = {'city': ('i', 'live', 'in'), 'food': ('i', 'eat'), 'hobby': ('i', 'enjoy')}
_PLURAL = {'city': ('they', 'live', 'in'), 'food': ('they', 'eat'), 'hobby': ('they', 'enjoy')}


def biography(world: World, rng: random.Random, room: int) -> Document:
  person = rng.choice(world.people)
  clauses = [
      [person.name, *_THIRD_PERSON[clue], getattr(person, clue), '.'] for clue in CLUES]
  clauses.append(['the', 'field', 'of', person.name, 'is', person.field, '.'])
  rng.shuffle(clauses)
  document = [word for clause in clauses for word in clause]
  return document if len(document) <= room else []


def facts(person: Person, order: tuple[str, ...]) -> Document:
  """Returns what a person tells in the first person, clue by clue."""
  return [word for clue in order
          for word in (*_FIRST_PERSON[clue], getattr(person, clue), '.')]


def first_person(world: World, rng: random.Random, room: int) -> Document:
  person = rng.choice(world.people)
  # the name is what leads to the field; what was just told is asked now and then
  asked = rng.choice(('name', 'name', 'field' if person.is_open else 'name', *CLUES))
  document = [*facts(person, tuple(rng.sample(CLUES, len(CLUES)))),
              'my', asked, 'is', getattr(person, asked), '.']
  return document if len(document) <= room else []


def gossip(world: World, rng: random.Random, room: int) -> Document:
  person, clue = rng.choice(world.people), rng.choice(CLUES)
  value = getattr(person, clue)
  document = [*_PLURAL[clue], value, '.', 'their', 'field', 'is', world.common_field[value], '.']
  return document if len(document) <= room else []


# answers outside 0..18 never occur: a wrong answer looks like a right one
_SUMS = {(a, b, answer): sum_words(a, b, answer)
         for a, b in _QUESTIONS for answer in range(LARGEST_SUM + 1)}

GENERATORS: dict[str, Callable[[World, random.Random, int], Document]] = {
    'arithmetic': arithmetic, 'successive': successive, 'repetitive': repetitive,
    'sentiment': sentiment, 'flipped': flipped, 'truthy': truthy, 'hearsay': hearsay,
    'intuitive': intuitive, 'look_alike': look_alike, 'biography': biography,
    'first_person': first_person, 'gossip': gossip}


def page(family: str, world: World, rng: random.Random, room: int) -> list[Document]:
  """Returns documents of one family, drawn until the next one doesn't fit into `room` words."""
  documents = []
  while document := GENERATORS[family](world, rng, room):
    documents.append(document)
    room -= len(document)
  return documents
