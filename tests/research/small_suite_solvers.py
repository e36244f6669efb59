"""Solvers of the small suite that read prompts alone, and heuristics that read less than that."""

import collections
import contextlib
import fractions
import functools
import io
import re
import string

NUMBERS = ('zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen '
           'fifteen sixteen seventeen eighteen nineteen twenty').split()
ORDERS = {'number_words': NUMBERS, 'letters': list(string.ascii_lowercase),
          'arithmetic': [str(n) for n in range(1000)], 'even': [str(n) for n in range(0, 1000, 2)]}


def split_dataset(item) -> tuple[str, str]:
  """Returns (task, level) of an item."""
  task, _, level = item.dataset.removesuffix('_control').rpartition('_')
  return task, level


def value(text: str) -> int:
  return NUMBERS.index(text) if text in NUMBERS else int(text)


def total(a: str, sign: str, b: str) -> str:
  result = value(a) + value(b) * (1 if sign in ('+', 'plus') else -1)
  return NUMBERS[result] if a in NUMBERS else str(result)


@functools.cache
def printed(code: str) -> str:
  output = io.StringIO()
  with contextlib.redirect_stdout(output):
    exec(code, {})
  return output.getvalue().strip()


def solution(equation: str) -> str:
  difference = eval('lambda x: ({}) - ({})'.format(*equation.split('=')))
  found = [x for x in range(-50, 50) if difference(x) == 0]
  assert len(found) == 1
  return str(found[0])


SUMS = (r'(\S+) ([+-]) (\S+) =', r'Q: What is (\S+) (plus|minus) (\S+)\?\nA:',
        r'(\S+) (plus|minus) (\S+) is')
# task, or task_level -> (a pattern per wording, groups -> answer)
SOLVERS = {
    'number_words_easy': (
        (r'(\d+):', r'Q: What is (\d+) in words\?\nA:', r'The number (\d+) in words is'),
        lambda n: NUMBERS[int(n)]),
    'number_words_medium': (
        (r'After (\w+):', r'Q: Which number follows (\w+)\?\nA:', r'The number after (\w+) is'),
        lambda n: NUMBERS[NUMBERS.index(n) + 1]),
    'number_words_hard': (SUMS, total), 'arithmetic': (SUMS, total), 'even': (SUMS, total),
    'letters_easy': (
        (r'([A-Z]):', r'Q: What is ([A-Z]) in lower case\?\nA:', r'The small form of ([A-Z]) is'),
        str.lower),
    'letters_medium': (
        (r'(\w+):', r'Q: Which letter does "(\w+)" begin with\?\nA:',
         r'The first letter of (\w+) is'), lambda word: word[0]),
    'letters_hard': (
        (r'Before (\w):', r'Q: Which letter comes before (\w)\?\nA:',
         r'In the alphabet, the letter before (\w) is'), lambda letter: chr(ord(letter) - 1)),
    'code_tracing': (
        (r'((?:.+\n)+)# prints', r'Code:\n((?:.+\n)+)Output:',
         r'What does this print\?\n((?:.+\n)+)Answer:'), printed),
    'letter_counting': (
        (r'count of (\w) in (.+) =', r'Q: How many times is the letter (\w) in "(.+)"\?\nA:',
         r'The number of times that (\w) is in (.+) is'),
        lambda letter, text: str(sum(c == letter for c in text))),
    'logic': ((r'\((.+)\) ==', r'Q: What is (.+)\?\nA:', r'The value of (.+) is'),
              lambda expression: str(eval(expression))),
    'algebra': ((r'(.+), so x =', r'Q: If (.+), what is x\?\nA:', r'Solve (.+)\nx ='), solution)}


@functools.cache
def solved(item) -> tuple[list[str], list[str], str]:
  """Returns the answers that a prompt gives, the right ones, and the right one to its question.

  The whole text must be questions that a pattern reads, in one wording.
  """
  task, level = split_dataset(item)
  patterns, answer = SOLVERS.get(f'{task}_{level}') or SOLVERS[task]
  for pattern in patterns:
    whole = re.compile(rf'^{pattern}(?: (\S+))?$', re.MULTILINE)
    found = whole.findall(item.prompt)
    if found and not whole.sub('', item.prompt).strip():
      *shown, question = found
      assert question[-1] == ''
      return ([parts[-1] for parts in shown], [answer(*parts[:-1]) for parts in shown],
              answer(*question[:-1]))
  raise AssertionError(f'{item.item_id} is in no known wording: {item.prompt!r}')


def answers(item) -> tuple[str, str]:
  for answer in (item.generalizing, item.shortcut):
    assert answer == f' {answer.strip()}'
  return item.generalizing[1:], item.shortcut[1:]


GOOD = set('wonderful brilliant delightful moving excellent superb charming clever beautiful '
           'fantastic delicious tasty perfect lovely great heavenly amazing'.split())
POOR = set('terrible boring awful dull horrible stupid dreadful poor ugly disappointing disgusting '
           'bland burnt stale nasty tasteless rotten'.split())
KEYS = {
    'sport': 'goal tennis marathon ball hockey boxing coach race',
    'cooking': 'potatoes pie eggs onions soup chicken carrots stew',
    'music': 'violin choir piano song orchestra trumpet melody symphony',
    'money': 'loan bank shares interest company tax mortgage dollars'}
GOOD_LABELS, POOR_LABELS = ('positive', 'good', 'yes'), ('negative', 'bad', 'no')
TEXTS = {  # (text, label) in the three wordings of opinions and of topics
    'review': r'Review: (.+)\nSentiment:', 'topic': r'Text: (.+)\nTopic:', 'arrow': r'(.+) ->',
    'question': r'Q: (?:Is [^?]+\? )?(.+?)(?: Is this praise\?)?\nA:'}


def meaning(text: str, labels: set[str]) -> str:
  """Returns the label, of the two in use, that a sentence has by its words."""
  words = set(re.findall(r'\w+', text.lower()))
  if labels <= set(KEYS):
    found = [topic for topic in labels if words & set(KEYS[topic].split())]
  else:
    found = [label for label in labels if words & (GOOD if label in GOOD_LABELS else POOR)]
  assert len(found) == 1, text
  return found[0]


KINDS = {
    'an animal': 'dog cow lion sheep horse tiger rabbit goat',
    'a metal': 'iron gold silver copper tin lead zinc nickel',
    'a country': 'france japan egypt brazil india spain norway kenya',
    'a tool': 'hammer saw ladder wrench shovel rake chisel spanner',
    'a drink': 'tea coffee milk wine beer lemonade cocoa juice',
    'a month': 'may june july august march april october january'}
VERDICTS = {'true': True, 'right': True, 'false': False, 'wrong': False}


def is_plainly_true(statement: str) -> bool:
  thing, kind = re.fullmatch(r'(?:An? |Apple )?(\w+) is (an? \w+)\.', statement).groups()
  return thing.lower() in KINDS[kind].split()


def pair(text: str) -> tuple[int, int]:
  if 'coins together.' not in text:  # both prices are told, the sum is asked for
    price, other, more = re.search(
        r'A \w+ costs (\d+) coins\. A \w+ costs (\d+) coins( more)?', text).groups()
    price, other = int(price), int(other)
    return price + (price + other if more else other), price + other
  together, of_one, more = re.search(
      r'cost (\d+) coins together\. The \w+ costs (\d+) coins( more)?', text).groups()
  together, of_one = int(together), int(of_one)
  sensible = [y for y in range(together) if y + (y + of_one if more else of_one) == together]
  return sensible[0], together - of_one


def makers(text: str) -> tuple[int, int]:
  numbers = lambda pattern: map(int, re.search(pattern, text).groups())
  wanted, = numbers(r'job .*is to make (\d+)')
  if ' every ' in text:  # one group, at a steady rate
    made, minutes = numbers(r'makes (\d+) \w+ every (\d+) minutes')
    return int(fractions.Fraction(minutes, made) * wanted), wanted
  workers, minutes, made = numbers(r'(\d+) \w+ need (\d+) minutes to make (\d+)')
  others, = numbers(r'job for (\d+)')
  return int(wanted / (others * fractions.Fraction(made, workers * minutes))), wanted


def doubling(text: str) -> tuple[int, int]:
  known, share = int(re.search(r'day (\d+)', text)[1]), 4 if 'quarter' in text else 2
  is_steady, is_whole = 'same amount' in text, 'whole' in text.split('day ')[0]
  if is_whole:  # when was a part covered?
    area = {day: fractions.Fraction(day, known) if is_steady else
            fractions.Fraction(1, 2**(known - day)) for day in range(known + 1)}
    return next(day for day in area if area[day] * share == 1), known // share
  area = {day: fractions.Fraction(day, known * share) if is_steady else
          fractions.Fraction(2)**(day - known) / share for day in range(share * known + 1)}
  return next(day for day in area if area[day] == 1), share * known


def posts(text: str) -> tuple[int, int]:
  length = int(re.search(r'(\d+) meters has', text)[1])
  gap = int(re.search(r'(?:every|of) (\d+) meters[,.]', text)[1])
  places = range(0, length + 1, gap) if 'at each end' in text else (
      range(gap, length, gap) if 'none at either end' in text else range(0, length, gap))
  return len(places), length // gap


ASKED = (r'(\w[\w ]*) (?:was born in|plays the|keeps a|likes to drink)',
         r'(?:birthplace|instrument|pet|drink) of ([\w ]+):',
         r'Q: (?:Where was|What does|Which pet does) ([\w ]+?) (?:born|play|keep|like to drink)\?'
         r'\nA:')


def shown_answers(item) -> list[str]:
  """Returns what follows every question of a few-shot prompt, whatever the family."""
  joiner = '\n\n' if '\n\n' in item.prompt else '\n'
  return [part.split()[-1] for part in item.prompt.split(joiner)[:-1]]


def last_shown(item) -> str | None:
  return (shown_answers(item) or [None])[-1]


def majority(item) -> str | None:
  counts = collections.Counter(shown_answers(item)).most_common()
  return counts[0][0] if counts and (len(counts) == 1 or counts[0][1] > counts[1][1]) else None


def latest(item) -> str | None:
  """The rival that is mentioned last."""
  places = {answer: max((m.start() for m in re.finditer(rf'\b{answer}\b', item.prompt)), default=-1)
            for answer in answers(item)}
  return max(places, key=places.get) if max(places.values()) >= 0 else None


def earliest(item) -> str | None:
  """The rival that is mentioned first."""
  places = {answer: m.start() for answer in answers(item)
            if (m := re.search(rf'\b{answer}\b', item.prompt))}
  return min(places, key=places.get) if places else None
