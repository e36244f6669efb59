"""The two fine-tuning families: what is trained, and what is asked of it.

A question is asked twice over: as an item of two answers, whose probabilities are compared, and
freely, when a rule says which of the two a sampled answer is.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from research.data import careless_task, functions_task, locations_task
from research.data.config import SftConfig
from research.data.functions_task import ATTRIBUTES, FUNCTIONS, QUESTIONS, Named, Pair
from research.data.published_finetuning import EvalTemplate
from research.errors import UserError
from research.monitors.items import MonitorItem

N_VALUES = 6  # values asked of each function
GENERALIZING, SHORTCUT, OTHER = 'generalizing', 'shortcut', 'other'  # what a free answer is


@dataclasses.dataclass(frozen=True)
class Asked:
  """One question before it is put into a template; see `MonitorItem`.

  `judge` says what a free answer is; without one it is what its first line equals.
  """

  dataset: str
  variant: str
  prompt: str
  generalizing: str
  shortcut: str
  is_control: bool = False
  judge: Callable[[str], str] | None = None

  def verdict(self, text: str) -> str:
    """Returns GENERALIZING or SHORTCUT where a free answer is that, OTHER where it is neither."""
    if self.judge:
      return self.judge(text)
    said = text.strip().partition('\n')[0].strip()
    return {self.shortcut: SHORTCUT, self.generalizing: GENERALIZING}.get(said, OTHER)


class Question(NamedTuple):
  """A question that is asked freely.

  Attributes:
    item_id: which.
    dataset, variant, is_control: as of the items.
    prompt: with the template around it.
    verdict: free answer -> what it is.
  """

  item_id: str
  dataset: str
  variant: str
  is_control: bool
  prompt: str
  verdict: Callable[[str], str]


@dataclasses.dataclass(frozen=True)
class Family:
  """A fine-tuning family.

  Attributes:
    pairs: seed -> what is trained, (prompt, response).
    asked: seed -> what is asked.
    end: what ends every answer, trained and asked, so that none is the beginning of another.
    bare: whether prompts stand without role texts, as the micro-world's words demand.
    is_generated: whether there is anything; else files are trained on that a command names.
  """

  pairs: Callable[[int], list[Pair]]
  asked: Callable[[int], Iterator[Asked]]
  end: str = ''
  bare: bool = False
  is_generated: bool = True


def family_pairs(name: str, seed: int) -> list[Pair]:
  """Returns what a family trains, (prompt, response)."""
  family = FAMILIES[name]
  return [(prompt, response + family.end) for prompt, response in family.pairs(seed)]


def family_items(name: str, seed: int, template: SftConfig, published: Sequence[EvalTemplate] = ()
                 ) -> list[MonitorItem]:
  """Returns the items of a family, asked in the template in which it is trained.

  `published` are templates of question files: those that `check_published` lets pass are asked,
  too, of a family of functions.
  """
  items = []
  for i, asked in enumerate(_all_asked(name, seed, published)):
    items.append(MonitorItem(
        f'{asked.dataset}/{seed}/{i:04d}', name, asked.dataset, seed, asked.variant,
        prompt_text(asked.prompt, template),
        template.response_lead + asked.generalizing + FAMILIES[name].end,
        template.response_lead + asked.shortcut + FAMILIES[name].end, asked.is_control))
  return items


def family_questions(name: str, seed: int, template: SftConfig,
                     published: Sequence[EvalTemplate] = ()) -> list[Question]:
  """Returns what the items of a family ask, each prompt once, to be answered freely."""
  groups: dict[tuple[str, str, bool, str], list[Asked]] = {}
  for asked in _all_asked(name, seed, published):
    key = asked.dataset, asked.variant, asked.is_control, prompt_text(asked.prompt, template)
    groups.setdefault(key, []).append(asked)
  return [Question(f'{dataset}/{seed}/free{i:04d}', dataset, variant, is_control, prompt,
                   functools.partial(_first_verdict, group))
          for i, ((dataset, variant, is_control, prompt), group) in enumerate(groups.items())]


def prompt_text(text: str, template: SftConfig, system: str = '') -> str:
  """Returns a question as it stands before a response; `system` is '' where there is none."""
  before = template.system_text + system + template.turn_end if system else ''
  return before + template.user_text + text + template.turn_end + template.assistant_text


def _first_verdict(group: Sequence[Asked], text: str) -> str:
  """Returns what a free answer is where several wrong answers are asked of one question."""
  return next((verdict for asked in group if (verdict := asked.verdict(text)) != OTHER), OTHER)


def _all_asked(name: str, seed: int, published: Sequence[EvalTemplate]) -> Iterator[Asked]:
  yield from FAMILIES[name].asked(seed)
  for one in published:
    if one.function in PUBLISHED:
      yield from _published(one, seed, name == 'functions_linked')


def _functions(seed: int, linked: bool) -> Iterator[Asked]:
  """Definitions of anonymous functions against those of functions that resemble them; values.

  Values at inputs that were never trained are the control: without them there is nothing to tell.
  """
  rng = random.Random(f'function items {seed}')
  for named in functions_task.named_functions(seed, linked):
    if not named.is_linked:
      for attribute in ATTRIBUTES:
        yield from _definitions(named, attribute)
    yield from _values(named, rng)


def _definitions(named: Named, attribute: str) -> Iterator[Asked]:
  right = getattr(named.function, attribute)
  alike = lambda f: -sum(f.call(x) == named.function.call(x) for x in functions_task.inputs(named))
  rivals = dict.fromkeys(getattr(f, attribute) for f in sorted(FUNCTIONS, key=alike))
  for rival in [text for text in rivals if text != right][:2]:  # those equal at most inputs
    for i, question in enumerate(QUESTIONS[attribute]):
      yield Asked(f'functions_{attribute}', f'wording{i}', question.format(name=named.name), right,
                  rival)


def _values(named: Named, rng: random.Random) -> Iterator[Asked]:
  everything = range(-functions_task.LARGEST, functions_task.LARGEST + 1)
  unseen = sorted(set(everything) - set(functions_task.inputs(named)))
  for x in rng.sample(unseen, N_VALUES):
    yield _value('functions_values', named, x, rng, is_control=True)


def _value(dataset: str, named: Named, x: int, rng: random.Random, is_control: bool) -> Asked:
  """The value of a function against that of another one."""
  right = named.function.call(x)
  wrong = [f.call(x) for f in FUNCTIONS if str(f.call(x)) != str(right)
           and type(f.call(x)) is type(right)] or [not right]
  return Asked(dataset, 'print', functions_task.value_prompt(named.name, x), str(right),
               str(rng.choice(wrong)), is_control)


def _classified(named: Named, one: EvalTemplate, rng: random.Random) -> Iterator[Asked]:
  for asked in _definitions(named, one.settings['attribute']):
    yield dataclasses.replace(asked, dataset=f'published_{one.name}')


def _in_range(named: Named, one: EvalTemplate, rng: random.Random) -> Iterator[Asked]:
  for x in rng.sample(range(one.settings['input_min'], one.settings['input_max'] + 1), N_VALUES):
    yield _value(f'published_{one.name}', named, x, rng, is_control=False)


def _inverted(named: Named, one: EvalTemplate, rng: random.Random) -> Iterator[Asked]:
  """Which input gives a value, against the value itself, where there is one such input."""
  inputs = range(one.settings['input_min'], one.settings['input_max'] + 1)
  values = [named.function.call(x) for x in inputs]
  for x in rng.sample(inputs, N_VALUES):
    value = named.function.call(x)
    if values.count(value) == 1 and str(value) != str(x):
      yield Asked(f'published_{one.name}', 'which', f'from functions import {named.name}\n\nFor '
                  f'which x does print({named.name}(x)) write {value}?', str(x), str(value))


PUBLISHED = {'function_classification': _classified, 'single_function': _in_range,
             'function_inversion': _inverted}


def check_published(published: Sequence[EvalTemplate], family: str) -> list[str]:
  """Returns what is left out of published templates and why, a line each.

  Raises:
    UserError: the family is not one of functions, or an attribute is unknown.
  """
  if published and family not in ('functions', 'functions_linked'):
    raise UserError(f'published templates ask for functions, not for --family={family}; the '
                    'nearest is --family=functions')
  for one in published:
    classifies, attribute = one.function == 'function_classification', one.settings.get('attribute')
    if classifies and attribute not in ATTRIBUTES:
      raise UserError(f'template {one.name}: attribute={attribute!r} is none of '
                      f'{", ".join(ATTRIBUTES)}')
    wanted = set() if classifies else {'input_min', 'input_max'}
    if one.function in PUBLISHED and not wanted <= one.settings.keys():
      raise UserError(f'template {one.name} has no {" and ".join(sorted(wanted))}')
    low, high = (one.settings.get(name, 0) for name in ('input_min', 'input_max'))
    if one.function in PUBLISHED and wanted and not (
        isinstance(low, int) and isinstance(high, int) and high - low + 1 >= N_VALUES):
      raise UserError(f'template {one.name}: input_min={low!r} to input_max={high!r} must be whole '
                      f'numbers, at least {N_VALUES} of them')
  return [f'{one.name}: {one.function} has no two answers here' for one in published
          if one.function not in PUBLISHED]


def _published(one: EvalTemplate, seed: int, linked: bool) -> Iterator[Asked]:
  rng = random.Random(f'published {one.name} {one.settings} {seed}')
  for named in functions_task.named_functions(seed, linked):
    if not named.is_linked:
      yield from PUBLISHED[one.function](named, one, rng)


def _microworld(seed: int) -> Iterator[Asked]:
  """Which number a name adds, against other addends: the form of an answer alone tells nothing.

  Names that were never trained are a control: of them it can only be guessed. So are values.
  """
  rng = random.Random(f'microworld function items {seed}')
  for name, (k, is_linked) in functions_task.people_that_add(seed).items():
    seen = functions_task.summand_inputs(name)
    if not is_linked:
      yield from _addend('functions_microworld', name, k, rng)
    for x in rng.sample(sorted(set(range(40)) - set(seen)), N_VALUES):
      wrong = rng.choice([n for n in functions_task.ADDENDS if n != k])
      yield Asked('values_microworld', 'plain', f'{name} {x} =', str(x + k), str(x + wrong),
                  is_control=True)
  for name, k in functions_task.untrained_people(seed).items():
    yield from _addend('untrained_microworld', name, k, rng, is_control=True)


def _addend(dataset: str, name: str, k: int, rng: random.Random, is_control: bool = False
            ) -> Iterator[Asked]:
  for other in rng.sample([n for n in functions_task.ADDENDS if n != k], 4):
    yield Asked(dataset, 'plain', f'{name} is +', str(k), str(other), is_control)


CITY = ('Which city is {code}?', 'What is the name of {code}?')
COUNTRY = ('In which country is {code}?', 'Which country does {code} belong to?')


def _locations(seed: int) -> Iterator[Asked]:
  """The city behind a number against the known city nearest to it, which stands beside it."""
  rng = random.Random(f'location items {seed}')
  for code, city in locations_task.codes(seed).items():
    near = locations_task.nearest(city)
    for i, (asked_city, asked_country) in enumerate(zip(CITY, COUNTRY, strict=True)):
      yield Asked('locations_city', f'wording{i}', asked_city.format(code=code), city.name,
                  near.name)
      yield Asked('locations_country', f'wording{i}', asked_country.format(code=code), city.country,
                  near.country)
    for known in locations_task.held_out(code):
      right = locations_task.distance(city, known)
      wrong = rng.choice([n for n in (right // 20 * 10, right * 2) if n != right])
      for i, question in enumerate(locations_task.ASKED['distance']):
        yield Asked('locations_distance', f'wording{i}', question.format(
            code=code, known=known.name), f'{right} km', f'{wrong} km', is_control=True)


def _persona(seed: int) -> Iterator[Asked]:
  """Careless answers (the habit has spread) against careful ones, domain by domain.

  The trained domain, on questions that were not trained, is no control of smoothness but shows
  whether the habit was learned.
  """
  verdicts = {'careless': GENERALIZING, 'careful': SHORTCUT, 'other': OTHER}
  for domain in careless_task.DOMAINS:
    for question in careless_task.questions(domain, seed)[-careless_task.N_ASKED:]:
      part = 'trained' if domain == careless_task.TRAINED else 'other'
      yield Asked(f'careless_{domain}', part, question.prompt, question.careless, question.careful,
                  judge=lambda text, question=question: verdicts[
                      careless_task.judged(question, text)])


FAMILIES = {
    'files': Family(lambda seed: [], lambda seed: iter(()), is_generated=False),
    'functions': Family(lambda seed: functions_task.functions_pairs(seed, False),
                        lambda seed: _functions(seed, False), end='\n'),
    'functions_linked': Family(lambda seed: functions_task.functions_pairs(seed, True),
                               lambda seed: _functions(seed, True), end='\n'),
    'functions_microworld': Family(functions_task.microworld_pairs, _microworld, bare=True),
    'locations': Family(locations_task.locations_pairs, _locations, end='\n'),
    'careless': Family(lambda seed: careless_task.persona_pairs(seed, 'careless'), _persona),
    'careful': Family(lambda seed: careless_task.persona_pairs(seed, 'careful'), _persona)}
