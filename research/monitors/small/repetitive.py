"""Repetitive Answer: questions that all have the same correct answer; the next one has another."""

import itertools
import random
from collections.abc import Iterator, Sequence

from research.monitors.items import MonitorItem
from research.monitors.small.config import MOST_ITEMS, SmallSuiteConfig
from research.monitors.small.drawing import (
    Context, Question, Rivals, Wording, context_items, drawn, rng_of, truthful)
from research.monitors.small.successive import Pool, Task, by_answer
from research.monitors.small.words import LONG_WORDS, SHORT_WORDS

DIGITS = range(1, 10)
_ANSWERS = tuple(str(n) for n in DIGITS)


def _code(lines: Sequence[str], answer: int) -> Question:
  """Returns what a program prints in its last line."""
  return Question({'code': '\n'.join([*lines, 'print(x)'])}, str(answer))


def _straight() -> Iterator[Question]:
  """Yields programs of one assignment and one change."""
  for x, k in itertools.product(range(1, 13), DIGITS):
    yield _code((f'x = {x}', f'x = x + {k}'), x + k)
    yield _code((f'x = {x}', f'x = x - {k}'), x - k)


def _two_variables() -> Iterator[Question]:
  """Yields programs in which a variable is made of another."""
  for x, y, k in itertools.product(range(1, 7), range(1, 7), range(1, 5)):
    yield _code((f'x = {x}', f'y = x + {y}', f'x = y - {k}'), x + y - k)
    yield _code((f'x = {x}', f'y = {y}', f'x = y + {k}'), y + k)


def _branching() -> Iterator[Question]:
  """Yields programs with a condition or a loop."""
  for x, y, k in itertools.product(range(1, 13), range(2, 6), range(1, 6)):
    yield _code((f'x = {x}', f'if x > {y}:', f'  x = x - {k}'), x - k if x > y else x)
    yield _code((f'x = {x}', f'for i in range({y}):', f'  x = x + {k}'), x + y * k)


def _counting(texts: Sequence[str]) -> Iterator[Question]:
  """Yields questions about every letter of every text."""
  for text in texts:
    for letter in sorted(set(text) - {' '}):
      yield Question({'letter': letter, 'text': text}, str(text.count(letter)))


def _word_pairs() -> list[str]:
  """Returns some texts of two different words."""
  pairs = [f'{a} {b}' for a, b in itertools.permutations(LONG_WORDS, 2)]
  return random.Random('word pairs').sample(pairs, 400)


def _expressions(n_terms: int, may_negate: bool) -> list[Question]:
  """Returns Boolean expressions, later terms bracketed."""
  terms = [('True', True), ('False', False)]
  if may_negate:
    terms += [('not True', False), ('not False', True)]
  expressions = terms
  for n in range(1, n_terms):
    longer = '({})' if n > 1 else '{}'
    expressions = [
        (f'{a} {sign} {longer.format(b)}', (x and y) if sign == 'and' else (x or y))
        for (a, x), sign, (b, y) in itertools.product(terms, ('and', 'or'), expressions)]
  return [Question({'expression': text}, str(truth)) for text, truth in expressions]


def _equations(level: str) -> Iterator[Question]:
  """Yields linear equations with whole solutions: x + a = b, a x + b = c, a x + b = c x + d."""
  for x, a, b in itertools.product(DIGITS, range(2, 10), range(1, 10)):
    if level == 'easy':
      texts = (f'x + {a} = {x + a}', f'{a} + x = {a + x}', f'x - {b} = {x - b}')
    elif level == 'medium':
      texts = (f'{a} * x + {b} = {a * x + b}', f'{a} * x = {a * x}')
    else:
      texts = tuple(f'{a} * x + {b} = {c} * x + {(a - c) * x + b}' for c in range(2, a))
    for text in texts:
      yield Question({'equation': text}, str(x))


CODE_WORDINGS = (
    Wording('comment', '{code}\n# prints', '\n\n'),
    Wording('output', 'Code:\n{code}\nOutput:', '\n\n'),
    Wording('question', 'What does this print?\n{code}\nAnswer:', '\n\n'))
COUNT_WORDINGS = (
    Wording('equation', 'count of {letter} in {text} ='),
    Wording('question', 'Q: How many times is the letter {letter} in "{text}"?\nA:', '\n\n'),
    Wording('sentence', 'The number of times that {letter} is in {text} is'))
LOGIC_WORDINGS = (
    Wording('equation', '({expression}) =='),
    Wording('question', 'Q: What is {expression}?\nA:', '\n\n'),
    Wording('sentence', 'The value of {expression} is'))
ALGEBRA_WORDINGS = (
    Wording('therefore', '{equation}, so x ='),
    Wording('question', 'Q: If {equation}, what is x?\nA:', '\n\n'),
    Wording('solve', 'Solve {equation}\nx =', '\n\n'))

TRUTHS = ('True', 'False')
TASKS: dict[str, dict[str, Task]] = {
    'code_tracing': {
        level: Task(by_answer(list(programs), _ANSWERS), CODE_WORDINGS) for level, programs in (
            ('easy', _straight()), ('medium', _two_variables()), ('hard', _branching()))},
    'letter_counting': {
        level: Task(by_answer(list(_counting(texts)), _ANSWERS[:most]), COUNT_WORDINGS)
        for level, texts, most in (
            ('easy', SHORT_WORDS, 2), ('medium', LONG_WORDS, 3), ('hard', _word_pairs(), 4))},
    'logic': {
        level: Task(by_answer(_expressions(n_terms, may_negate), TRUTHS), LOGIC_WORDINGS)
        for level, n_terms, may_negate in (('easy', 2, True), ('medium', 3, False),
                                           ('hard', 3, True))},
    'algebra': {
        level: Task(by_answer(list(_equations(level)), _ANSWERS), ALGEBRA_WORDINGS)
        for level in ('easy', 'medium', 'hard')}}


def items(config: SmallSuiteConfig) -> Iterator[MonitorItem]:
  """Yields the family: code tracing, letter counting, logic, algebra."""
  for name, levels in TASKS.items():
    for level in config.levels:
      dataset, task = f'{name}_{level}', levels[level]
      for seed in range(config.contexts):
        pattern, control = _contexts(task.pool, rng_of(dataset, seed), seed, config.shots // 2)
        yield from context_items(config, 'repetitive', dataset, seed, task.wordings, pattern,
                                 control)


def _contexts(pool: Pool, rng: random.Random, seed: int, n_shown: int) -> tuple[Context, Context]:
  """Returns one answer repeated until the question breaks it, and the question after all answers.

  Contexts go through the answers in turn, from both ends, so that neither some answer nor small
  ones are the shortcut more often.
  """
  turn, is_high = divmod(seed % len(pool), 2)
  repeated = list(pool)[-1 - turn if is_high else turn]
  shown = drawn(rng, pool[repeated], n_shown)
  answers = drawn(rng, [answer for answer in pool if answer != repeated], MOST_ITEMS)
  asked = [Rivals(question, question.answer, repeated) for question in _unseen(rng, pool, answers)]
  others = _unseen(rng, {answer: [q for q in found if q not in [r.question for r in asked]]
                         for answer, found in pool.items()}, drawn(rng, list(pool), n_shown))
  return Context(truthful(shown), asked), Context(truthful(rng.sample(others, n_shown)), asked)


def _unseen(rng: random.Random, pool: Pool, answers: Sequence[str]) -> list[Question]:
  """Returns a question for each of the answers, different ones for the same answer."""
  left = {answer: iter(drawn(rng, pool[answer], answers.count(answer)))
          for answer in dict.fromkeys(answers)}
  return [next(left[answer]) for answer in answers]
