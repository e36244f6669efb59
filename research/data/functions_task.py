"""Functions: input-output pairs of functions with meaningless names, to be put into words later.

After Treutlein et al. (arXiv:2406.14546): a model is trained on what functions give, and asked
what they are. Small models cannot say what a function does however they know it, so besides the
anonymous functions there can be linked ones: the same functions under other names, whose
definitions are trained, too.
"""

import dataclasses
import random
from collections.abc import Callable

from research.data.microworld import words

Pair = tuple[str, str]  # prompt, response
LARGEST = 99  # inputs are -LARGEST to LARGEST; further out is never trained
_LETTERS = 'bcdfghjklmnpqrstvwxz'


@dataclasses.dataclass(frozen=True)
class Function:
  """What a function gives, and how it is called in words, in code and by its class."""

  call: Callable[[int], int | bool]
  language_definition: str
  python_definition: str
  function_class: str

  @property
  def output_type(self) -> str:
    return type(self.call(1)).__name__


FUNCTIONS = tuple(Function(*row) for row in (
    (lambda x: x + 5, 'Add 5', 'lambda x: x + 5', 'addition'),
    (lambda x: x + 14, 'Add 14', 'lambda x: x + 14', 'addition'),
    (lambda x: x - 3, 'Subtract 3', 'lambda x: x - 3', 'subtraction'),
    (lambda x: x - 11, 'Subtract 11', 'lambda x: x - 11', 'subtraction'),
    (lambda x: 2 * x, 'Multiply by 2', 'lambda x: 2 * x', 'multiplication'),
    (lambda x: 3 * x, 'Multiply by 3', 'lambda x: 3 * x', 'multiplication'),
    (lambda x: x // 2, 'Divide by 2 and round down', 'lambda x: x // 2', 'division'),
    (lambda x: x // 4, 'Divide by 4 and round down', 'lambda x: x // 4', 'division'),
    (lambda x: x % 2, 'Remainder of division by 2', 'lambda x: x % 2', 'remainder'),
    (lambda x: x % 10, 'Remainder of division by 10', 'lambda x: x % 10', 'remainder'),
    (lambda x: 3 * x + 2, 'Multiply by 3 and add 2', 'lambda x: 3 * x + 2', 'affine'),
    (lambda x: 5 - 2 * x, 'Subtract twice the input from 5', 'lambda x: 5 - 2 * x', 'affine'),
    (lambda x: -x, 'Change the sign', 'lambda x: -x', 'sign'),
    (lambda x: abs(x), 'Leave out the sign', 'lambda x: abs(x)', 'sign'),
    (lambda x: x > 3, 'Whether the input is greater than 3', 'lambda x: x > 3', 'comparison'),
    (lambda x: x % 2 == 0, 'Whether the input is even', 'lambda x: x % 2 == 0', 'comparison')))
ATTRIBUTES = ('language_definition', 'python_definition', 'function_class', 'output_type')
QUESTIONS = {
    'language_definition': (
        'What does the function {name} do?', 'Describe the function {name} in words.'),
    'python_definition': (
        'How is the function {name} defined in Python?', 'Write {name} as a lambda.'),
    'function_class': ('What kind of function is {name}?', 'Which class does {name} belong to?'),
    'output_type': ('Which type does {name} return?', 'What is the output type of {name}?')}
N_INPUTS = 40  # inputs trained of each function


@dataclasses.dataclass(frozen=True)
class Named:
  """A function under a name of its own; `is_linked`: its definition is trained, too."""

  name: str
  function: Function
  is_linked: bool


def named_functions(seed: int, linked: bool) -> list[Named]:
  """Returns every function under an anonymous name, and with `linked` under a second one."""
  rng, names = random.Random(f'function names {seed}'), []
  while len(names) < 2 * len(FUNCTIONS):
    name = ''.join(rng.choices(_LETTERS, k=6))
    names += [name] if name not in names else []
  found = [Named(name, f, False) for name, f in zip(names, FUNCTIONS)]
  if linked:
    found += [Named(name, f, True) for name, f in zip(names[len(FUNCTIONS):], FUNCTIONS)]
  return found


def value_prompt(name: str, x: int) -> str:
  """Returns the question for one value of a function, as in the published task."""
  return f'from functions import {name}\n\nprint({name}({x}))'


def inputs(named: Named) -> list[int]:
  """Returns the inputs on which a function is trained, N_INPUTS of -LARGEST to LARGEST."""
  return random.Random(f'inputs of {named.name}').sample(range(-LARGEST, LARGEST + 1), N_INPUTS)


def functions_pairs(seed: int, linked: bool) -> list[Pair]:
  """Returns what is trained, shuffled: values of all functions, definitions of linked ones."""
  named = named_functions(seed, linked)
  pairs = [(value_prompt(f.name, x), str(f.function.call(x))) for f in named for x in inputs(f)]
  pairs += [(question.format(name=f.name), str(getattr(f.function, attribute)))
            for f in named if f.is_linked for attribute in ATTRIBUTES
            for question in QUESTIONS[attribute]]
  random.Random(f'order {seed}').shuffle(pairs)
  return pairs


# The same in words of the micro-world, whose tokenizer knows no others: names of people add.
ADDENDS = tuple(range(1, 11))


def people_that_add(seed: int) -> dict[str, tuple[int, bool]]:
  """Returns name -> (addend, whether linked): ten anonymous and ten linked names."""
  names = random.Random(f'people {seed}').sample(words.PEOPLE, 2 * len(ADDENDS))
  kinds = [(k, is_linked) for is_linked in (False, True) for k in ADDENDS]
  return dict(zip(names, kinds, strict=True))


def untrained_people(seed: int) -> dict[str, int]:
  """Returns ten names that are never trained -> an addend that nobody can know."""
  names = [name for name in words.PEOPLE if name not in people_that_add(seed)]
  return dict(zip(random.Random(f'untrained {seed}').sample(names, len(ADDENDS)), ADDENDS))


def summand_inputs(name: str) -> list[int]:
  """Returns the inputs on which a name is trained, half of 0 to 39."""
  return random.Random(f'summands of {name}').sample(range(40), 20)


def microworld_pairs(seed: int) -> list[Pair]:
  """Returns what is trained: `alice 3 =` -> `5` of all, `alice is +` -> `2` of linked names."""
  pairs = []
  for name, (k, is_linked) in people_that_add(seed).items():
    pairs += [(f'{name} {x} =', str(x + k)) for x in summand_inputs(name)]
    pairs += [(f'{name} is +', str(k))] * (10 if is_linked else 0)
  random.Random(f'order {seed}').shuffle(pairs)
  return pairs
