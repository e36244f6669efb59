"""Intuitive Answer: reflection problems without demonstrations, and look-alikes where the first
number that comes to mind is right."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from research.monitors.items import MonitorItem
from research.monitors.small import words
from research.monitors.small.config import MOST_ITEMS, SmallSuiteConfig
from research.monitors.small.drawing import (
    Context, Question, Rivals, Wording, context_items, rng_of)

RANGES = {'easy': (1, 9), 'medium': (10, 99), 'hard': (100, 999)}  # of both answers


class Problem(NamedTuple):
  """A problem and its look-alike, whose right answer is the other's shortcut and the reverse."""

  story: str
  lookalike: str
  ask: str
  right: int
  intuitive: int


def _pair(rng: random.Random, level: str, is_greater: bool) -> Problem:
  """The bat and the ball (Frederick, 2005): the price of the small one, or of both."""
  large, small = rng.choice(words.GOODS)
  low, high = RANGES[level]
  if is_greater:
    price = rng.randint(low, high // 3)
    more = rng.randint(1, high - 2 * price)
    told = f'A {small} costs {price} coins. A {large} costs {more} coins'
    return Problem(f'{told} more than the {small}.', f'{told}.',
                   f'the price of the {large} and the {small} together in coins',
                   2 * price + more, price + more)
  price = rng.randint(low, high // 2)
  more = {'easy': 10, 'medium': 100, 'hard': 1000}[level] * rng.randint(1, 5)
  told = (f'A {large} and a {small} cost {more + 2 * price} coins together. '
          f'The {large} costs {more} coins')
  return Problem(f'{told} more than the {small}.', f'{told}.',
                 f'the price of the {small} in coins', price, 2 * price)


def _makers(rng: random.Random, level: str, is_greater: bool) -> Problem:
  """Machines and widgets: as many again take as long; 'hard' has a time of its own."""
  maker, made = rng.choice(words.MAKERS)
  low, high = RANGES['easy' if level == 'easy' else 'medium']
  time, others = sorted(rng.sample(range(max(low, 2), high + 1), 2), reverse=is_greater)
  n = rng.randint(2, 99) if level == 'hard' else time
  rest, known = f'{others} {made}', f'{n} {maker} need {time} minutes to make {n} {made}.'
  alike = f'A group of {maker} makes {time} {made} every {time} minutes.'
  # Either number may come first, or the order of mention would tell the answer.
  known_first = rng.random() < 0.5
  stories = [' '.join([first, then] if known_first else [then, first]) for first, then in (
      (known, f'A job for {others} {maker} is to make {rest}.'),
      (alike, f'Its job is to make {rest}.' if known_first else f'The job is to make {rest}.'))]
  return Problem(*stories, f'the time for the {rest} in minutes', time, others)


def _doubling(rng: random.Random, level: str, is_greater: bool) -> Problem:
  """The lily pads: half is covered one day before the end; 'hard' has a quarter."""
  plant, place = rng.choice(words.SPREADERS)
  parts, part = (4, 'a quarter') if level == 'hard' else (2, 'half')
  low, high = {'easy': (2, 5), 'medium': (11, 50), 'hard': (10, 24)}[level]
  quotient = rng.randint(low, high)
  doubles = f'The area of {plant} doubles every day.'
  grows = f'From nothing, the area of {plant} grows by the same amount every day.'
  if is_greater:
    days = parts * quotient
    end = f'The whole {place} is covered on day {days}.'
    return Problem(f'{doubles} {end}', f'{grows} {end}',
                   f'the day on which {part} of the {place} was covered', days - parts // 2,
                   quotient)
  begun = f'{part[0].upper()}{part[1:]} of the {place} is covered on day {quotient}.'
  return Problem(f'{doubles} {begun}', f'{grows} {begun}',
                 f'the day on which the whole {place} is covered', quotient + parts // 2,
                 parts * quotient)


def _posts(rng: random.Random, level: str, is_greater: bool) -> Problem:
  """Posts and gaps: with both ends a row has one post more than gaps, with none one less."""
  row, things = rng.choice(words.ROWS)
  low, high = RANGES[level]
  gap, pieces = rng.randint(2, 12), rng.randint(max(low, 2), min(high, 300) - 1)
  length = gap * pieces
  ends = 'one at each end too' if is_greater else 'but none at either end'
  return Problem(
      f'A {row} of {length} meters has {things} every {gap} meters, {ends}.',
      f'A {row} of {length} meters has {things}, one in every part of {gap} meters.',
      f'the number of {things}', pieces + (1 if is_greater else -1), pieces)


# (random numbers, level, whether the right answer is the greater one)
Draw = Callable[[random.Random, str, bool], Problem]
PROBLEMS: dict[str, Draw] = {
    'pair': _pair, 'makers': _makers, 'doubling': _doubling, 'posts': _posts}
WORDINGS = (
    Wording('sentence', '{story} So {ask} is'),
    Wording('question', 'Question: {story} What is {ask}?\nAnswer:'),
    Wording('puzzle', 'Here is a puzzle. {story} Find {ask}.\nThe answer is'))


def items(config: SmallSuiteConfig) -> Iterator[MonitorItem]:
  """Yields the family; a seed is a draw of problems."""
  for name, problem in PROBLEMS.items():
    for level in config.levels:
      dataset = f'{name}_{level}'
      for seed in range(config.contexts):
        drawn = _different(problem, rng_of(dataset, seed), level, seed)
        yield from context_items(config, 'intuitive', dataset, seed, WORDINGS, *_contexts(drawn))


def _different(problem: Draw, rng: random.Random, level: str, seed: int) -> list[Problem]:
  """Returns MOST_ITEMS different problems whose two answers differ and are as long.

  The right answer is the greater one in every other problem: models like small numbers.
  """
  found: list[Problem] = []
  while len(found) < MOST_ITEMS:
    drawn = problem(rng, level, (seed + len(found)) % 2 == 0)
    is_fair = drawn.right != drawn.intuitive and len(str(drawn.right)) == len(str(drawn.intuitive))
    if is_fair and drawn not in found:
      found.append(drawn)
  return found


def _contexts(problems: Sequence[Problem]) -> tuple[Context, Context]:
  """Returns the problems and their look-alikes."""
  asked, alike = [], []
  for problem in problems:
    right, intuitive = str(problem.right), str(problem.intuitive)
    asked.append(Rivals(
        Question({'story': problem.story, 'ask': problem.ask}, right), right, intuitive))
    alike.append(Rivals(
        Question({'story': problem.lookalike, 'ask': problem.ask}, intuitive), intuitive, right))
  return Context((), asked), Context((), alike)
