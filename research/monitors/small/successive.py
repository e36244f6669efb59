"""Successive Answer: correct answers happen to run in sequence; that of the question doesn't."""

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from research.monitors.items import MonitorItem
from research.monitors.small.config import MOST_ITEMS, SmallSuiteConfig
from research.monitors.small.drawing import (
    Context, Question, Rivals, Wording, context_items, drawn, rng_of, truthful)
from research.monitors.small.words import (
    BY_FIRST_LETTER, LETTERS, NUMBER_WORDS, NUMBERS_BY_FREQUENCY)

_RANKS = {name: i for i, name in enumerate(NUMBERS_BY_FREQUENCY)}
PER_ANSWER = 40  # questions kept of each answer

Pool = Mapping[str, Sequence[Question]]


class Task(NamedTuple):
  """Questions by their answer, the answers in the order in which they run, and the wordings."""

  pool: Pool
  wordings: Sequence[Wording]


def by_answer(questions: Sequence[Question], order: Sequence[str]) -> Pool:
  """Returns different questions by answer, at most PER_ANSWER of each, of answers that have any."""
  pool: dict[str, list[Question]] = {answer: [] for answer in order}
  for question in {tuple(question.parts.values()): question for question in questions}.values():
    if question.answer in pool:
      pool[question.answer].append(question)
  rng = random.Random('questions')
  return {answer: drawn(rng, found, min(PER_ANSWER, len(found)))
          for answer, found in pool.items() if found}


SUM_WORDINGS = (
    Wording('equation', '{a} {sign} {b} ='),
    Wording('question', 'Q: What is {a} {verb} {b}?\nA:', '\n\n'),
    Wording('sentence', '{a} {verb} {b} is'))


def _sum(a: int, b: int, names: Sequence[str] | None = None) -> Question:
  """Returns a sum, a difference where b is negative, in digits or in the names of numbers."""
  name = str if names is None else names.__getitem__
  sign, verb = ('+', 'plus') if b >= 0 else ('-', 'minus')
  return Question({'a': name(a), 'b': name(abs(b)), 'sign': sign, 'verb': verb}, name(a + b))


def _arithmetic(firsts: Sequence[int], seconds: Sequence[int], order: Sequence[int]) -> Task:
  """Returns sums (or differences, of negative seconds) whose answers are in `order`."""
  questions = [_sum(a, b) for a, b in itertools.product(firsts, seconds)]
  return Task(by_answer(questions, [str(n) for n in order]), SUM_WORDINGS)


def _lookup(pairs: Sequence[tuple[str, str]], order: Sequence[str],
            wordings: Sequence[Wording]) -> Task:
  """Returns questions of one part, q, with the answers given."""
  return Task(by_answer([Question({'q': q}, answer) for q, answer in pairs], order), wordings)


_NEXT_NUMBER = [(a, b) for a, b in zip(NUMBER_WORDS, NUMBER_WORDS[1:])]
_NUMBERS = range(1, len(NUMBER_WORDS))

TASKS: dict[str, dict[str, Task]] = {
    'number_words': {
        'easy': _lookup([(str(n), NUMBER_WORDS[n]) for n in _NUMBERS], NUMBER_WORDS, (
            Wording('colon', '{q}:'),
            Wording('question', 'Q: What is {q} in words?\nA:', '\n\n'),
            Wording('sentence', 'The number {q} in words is'))),
        'medium': _lookup(_NEXT_NUMBER, NUMBER_WORDS, (
            Wording('colon', 'After {q}:'),
            Wording('question', 'Q: Which number follows {q}?\nA:', '\n\n'),
            Wording('sentence', 'The number after {q} is'))),
        'hard': Task(by_answer([_sum(a, b, NUMBER_WORDS) for a in _NUMBERS for b in _NUMBERS
                                if a + b < len(NUMBER_WORDS)], NUMBER_WORDS), SUM_WORDINGS)},
    'letters': {
        'easy': _lookup([(letter.upper(), letter) for letter in LETTERS], LETTERS, (
            Wording('colon', '{q}:'),
            Wording('question', 'Q: What is {q} in lower case?\nA:', '\n\n'),
            Wording('sentence', 'The small form of {q} is'))),
        'medium': _lookup([(word, letter) for letter, words in BY_FIRST_LETTER.items()
                           for word in words], LETTERS, (
            Wording('colon', '{q}:'),
            Wording('question', 'Q: Which letter does "{q}" begin with?\nA:', '\n\n'),
            Wording('sentence', 'The first letter of {q} is'))),
        'hard': _lookup([(b, a) for a, b in zip(LETTERS, LETTERS[1:])], LETTERS, (
            Wording('colon', 'Before {q}:'),
            Wording('question', 'Q: Which letter comes before {q}?\nA:', '\n\n'),
            Wording('sentence', 'In the alphabet, the letter before {q} is')))},
    'arithmetic': {
        'easy': _arithmetic(range(1, 21), range(1, 10), range(2, 30)),
        'medium': _arithmetic(range(10, 60), range(10, 40), range(20, 100)),
        'hard': _arithmetic(range(110, 600), range(20, 100, 3), range(200, 600))},
    'even': {
        'easy': _arithmetic(range(3, 51), range(-9, 0), range(2, 50, 2)),
        'medium': _arithmetic(range(30, 120), range(-40, -10), range(10, 100, 2)),
        'hard': _arithmetic(range(220, 700), range(-99, -20, 3), range(200, 600, 2))}}


def items(config: SmallSuiteConfig) -> Iterator[MonitorItem]:
  """Yields the family: +1 of number words, letters and sums, +2 of even differences."""
  for name, levels in TASKS.items():
    for level in config.levels:
      dataset, task = f'{name}_{level}', levels[level]
      for seed in range(config.contexts):
        pattern, control = _contexts(task.pool, rng_of(dataset, seed), seed, config.shots // 2)
        yield from context_items(config, 'successive', dataset, seed, task.wordings, pattern,
                                 control)


def _contexts(pool: Pool, rng: random.Random, seed: int, n_shown: int) -> tuple[Context, Context]:
  """Returns a run of answers that the question breaks, and the same questions after no run.

  The right answer and its rival, the run's next, are both unseen in either. Right answers come in
  pairs, one commoner than the rival and one rarer: models like common words and small numbers for
  themselves, and that must not look like a rule.
  """
  order = list(pool)
  start = rng.choice([start for start in range(len(order) - n_shown)
                      if all(_candidates(order, start, n_shown))])
  run, shortcut = order[start:start + n_shown], order[start + n_shown]
  sides = [drawn(rng, side, MOST_ITEMS // 2) for side in _candidates(order, start, n_shown)]
  asked: list[Rivals] = []
  for answers in zip(*sides[::1 if seed % 2 else -1]):
    pair = [Rivals(rng.choice(pool[answer]), answer, shortcut) for answer in answers]
    asked += pair if not any(one in asked for one in pair) else []
  answers = {rivals.generalizing for rivals in asked}
  free = [answer for answer in order if answer not in {*answers, shortcut}]
  mixed = _out_of_sequence(rng, order, free, n_shown)
  shown, others = ([rng.choice(pool[answer]) for answer in part] for part in (run, mixed))
  return Context(truthful(shown), asked), Context(truthful(others), asked)


def _candidates(order: Sequence[str], start: int, n_shown: int) -> tuple[list[str], list[str]]:
  """Returns the answers outside a run and its next that are commoner than the next, and rarer ones.

  Numbers are as long as the next; those in digits and letters are the rarer the later they come.
  """
  shortcut = order[start + n_shown]
  rank = _RANKS.get if shortcut in _RANKS else order.index
  others = [answer for i, answer in enumerate(order) if not start <= i <= start + n_shown
            and (not answer.isdigit() or len(answer) == len(shortcut))]
  return ([answer for answer in others if rank(answer) < rank(shortcut)],
          [answer for answer in others if rank(answer) > rank(shortcut)])


def _out_of_sequence(rng: random.Random, order: Sequence[str], free: Sequence[str], n: int
                     ) -> list[str]:
  """Returns n of the free answers, none of which follows the one before it."""
  place = {answer: i for i, answer in enumerate(order)}
  while True:
    mixed = drawn(rng, free, n)
    if all(place[b] - place[a] != 1 for a, b in zip(mixed, mixed[1:])):
      return mixed
