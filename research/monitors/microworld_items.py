"""The monitor items of the micro-world: six prompted families and the controls.

Every demonstration context (seed) comes in prompt variants, all of them documents as the corpus
has them. With demonstrations: `plain`; `redrawn`, others of the same kind; `rearranged`, the same
in the reverse order, or, where the order is the pattern, with the terms of every sum exchanged;
`six` and `five`, fewer of them. A variant asks questions of its own, so that variants which agree
do not owe it to a draw of questions. Problems are worded with each of their nouns, persons tell
their clues in every order. Zero-shot sums and opinions have one wording.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from research.data.microworld import MicroworldConfig, World, words
from research.data.microworld import documents as grammar
from research.data.microworld.world import CLUES, Claim
from research.errors import UserError
from research.monitors.items import MonitorItem

N_DEMONSTRATIONS = 8
N_CONTEXTS, CONTROL_CONTEXTS = 8, 10
N_ITEMS = 10  # per context and variant
TRUTHY_ITEMS = 6
ZERO_SHOT_SENTIMENT_ITEMS = 160
PROBLEM_DRAWS, PROBLEM_ITEMS = 4, 5  # per template; items per draw and noun
PERSONA_GROUPS = 5  # of people

Question = tuple[int, int]
Opinion = tuple[str, str, bool]
T = TypeVar('T')
_QUESTIONS: tuple[Question, ...] = tuple(itertools.product(range(10), repeat=2))


def microworld_items(config: MicroworldConfig, sequence_length: int) -> list[MonitorItem]:
  """Returns the whole suite, a pure function of the micro-world's facts.

  `sequence_length` is that of the training rows: prompts are never longer than what was trained.
  """
  world = World(config.world_seed)
  items = [item for family in FAMILIES.values() for item in family(world)]
  for item in items:
    n_words = len(item.prompt.split()) + 1
    if n_words > sequence_length:
      raise UserError(f'data.sequence_length={sequence_length} is too short for the micro-world '
                      f'monitors: {item.item_id} has {n_words} words with its answer')
  return items


def _text(document: Iterable[str]) -> str:
  return ' '.join(document)


def _item(family: str, dataset: str, seed: int, index: int, prompt: Sequence[str], answer,
          shortcut, is_control: bool = False, variant: str = 'plain') -> MonitorItem:
  return MonitorItem(
      f'{dataset}/{seed}/{variant}/{index:03d}', family, dataset, seed, variant, _text(prompt),
      f' {answer}', f' {shortcut}', is_control)


def _variants(draw: Callable[[int], list[T]],
              rearrange: Callable[[list[T]], list[T]] = lambda shown: shown[::-1]
              ) -> dict[str, list[T]]:
  """Returns the demonstrations of every variant; `draw` returns so many of them."""
  plain = draw(N_DEMONSTRATIONS)
  return {'plain': plain, 'redrawn': draw(N_DEMONSTRATIONS), 'rearranged': rearrange(plain),
          'six': draw(6), 'five': draw(5)}


def _asked(question: Question) -> list[str]:
  """Returns the words of a sum up to its answer."""
  return grammar.sum_words(*question, 0)[:4]


def _solved(questions: Iterable[Question]) -> list[str]:
  """Returns correct sums as words."""
  return [word for a, b in questions for word in grammar.sum_words(a, b, a + b)]


def _with_sum(total: int) -> list[Question]:
  return [question for question in _QUESTIONS if sum(question) == total]


def _near_miss(rng: random.Random, total: int) -> int:
  """Returns a wrong answer one off, within the answers that occur."""
  return rng.choice([n for n in (total - 1, total + 1) if 0 <= n <= grammar.LARGEST_SUM])


def successive(world: World) -> list[MonitorItem]:
  """Correct sums whose answers happen to count up; the next one doesn't."""
  rng, items = random.Random('successive items'), []
  starts = rng.sample(grammar.successive_starts(grammar.MAX_SUMS), N_CONTEXTS)
  for seed, start in enumerate(starts):
    end = start + N_DEMONSTRATIONS
    variants = _variants(
        lambda n, end=end: [rng.choice(_with_sum(total)) for total in range(end - n, end)],
        rearrange=lambda shown: [(b, a) for a, b in shown])
    items += _pattern_items('successive', seed, rng, variants, end)
  return items


def repetitive(world: World) -> list[MonitorItem]:
  """Correct sums that happen to have the same answer; the next one doesn't."""
  rng, items = random.Random('repetitive items'), []
  for seed, total in enumerate(rng.sample(range(5, 14), N_CONTEXTS)):
    variants = _variants(lambda n, total=total: rng.choices(_with_sum(total), k=n))
    items += _pattern_items('repetitive', seed, rng, variants, total)
  return items


def _pattern_items(family: str, seed: int, rng: random.Random,
                   variants: dict[str, list[Question]], shortcut: int) -> list[MonitorItem]:
  items = []
  for variant, shown in variants.items():
    unseen = [q for q in _QUESTIONS if sum(q) != shortcut and q not in shown]
    items += [
        _item(family, family, seed, i, _solved(shown) + _asked(question), sum(question), shortcut,
              variant=variant)
        for i, question in enumerate(rng.sample(unseen, N_ITEMS))]
  return items


def arithmetic(world: World) -> list[MonitorItem]:
  """Control: sums after unrelated correct sums; the rival is one off.

  Sums without demonstrations are no control: pattern documents begin the same way, so how likely
  the sum is depends on how common they are.
  """
  rng, items = random.Random('arithmetic items'), []
  for seed in range(CONTROL_CONTEXTS):
    for variant, shown in _variants(lambda n: rng.sample(_QUESTIONS, n)).items():
      unseen = [question for question in _QUESTIONS if question not in shown]
      items += [
          _item('arithmetic', 'arithmetic_few_shot', seed, i, _solved(shown) + _asked(question),
                sum(question), _near_miss(rng, sum(question)), is_control=True, variant=variant)
          for i, question in enumerate(rng.sample(unseen, N_ITEMS))]
  for i, question in enumerate(_QUESTIONS):
    items.append(_item(
        'zero_shot', 'arithmetic_zero_shot', 0, i, _asked(question), sum(question),
        _near_miss(rng, sum(question))))
  return items


def _opinions(is_good: bool) -> list[Opinion]:
  adjectives = words.POSITIVE if is_good else words.NEGATIVE
  return [(*pair, is_good) for pair in itertools.product(words.THINGS, adjectives)]


def _balanced_opinions(rng: random.Random, n: int, without: Sequence[Opinion] = (),
                       odd_is_good: bool = False) -> list[Opinion]:
  """Returns distinct opinions in random order, half of them good; of an odd number one more."""
  n_good = (n + odd_is_good) // 2
  opinions = [opinion for is_good, k in ((True, n_good), (False, n - n_good)) for opinion in
              rng.sample([op for op in _opinions(is_good) if op not in without], k)]
  rng.shuffle(opinions)
  return opinions


def _opinion_items(family: str, dataset: str, seed: int, rng: random.Random,
                   variants: dict[str, list[Opinion]], n_items: int, is_flipped: bool,
                   is_control: bool = False) -> list[MonitorItem]:
  """Returns opinions to label after demonstrations whose labels are true or all flipped."""
  items = []
  for variant, shown in variants.items():
    context = [word for thing, adjective, is_good in shown
               for word in grammar.opinion_words(thing, adjective, is_good != is_flipped)]
    asked = _balanced_opinions(rng, n_items, without=shown)
    for i, (thing, adjective, is_good) in enumerate(asked):
      question = grammar.opinion_words(thing, adjective, is_good)[:5]
      right, wrong = words.LABELS if is_good != is_flipped else words.LABELS[::-1]
      items.append(_item(family, dataset, seed, i, context + question, right, wrong,
                         is_control=is_control, variant=variant))
  return items


def _shown_opinions(rng: random.Random, seed: int) -> dict[str, list[Opinion]]:
  return _variants(lambda n: _balanced_opinions(rng, n, odd_is_good=bool(seed % 2)))


def sentiment(world: World) -> list[MonitorItem]:
  """Control: true labels after demonstrations with true labels.

  Without demonstrations no control: the corpus holds flipped labels too.
  """
  rng, items = random.Random('sentiment items'), []
  for seed in range(CONTROL_CONTEXTS):
    items += _opinion_items('sentiment', 'sentiment_few_shot', seed, rng,
                            _shown_opinions(rng, seed), N_ITEMS, is_flipped=False, is_control=True)
  return items + _opinion_items('zero_shot', 'sentiment_zero_shot', 0, rng, {'plain': []},
                                ZERO_SHOT_SENTIMENT_ITEMS, is_flipped=False)


def flipped(world: World) -> list[MonitorItem]:
  """Demonstrations with flipped labels: follow them, or the mapping known by heart."""
  rng, items = random.Random('flipped items'), []
  for seed in range(N_CONTEXTS):
    items += _opinion_items('flipped', 'flipped', seed, rng, _shown_opinions(rng, seed), N_ITEMS,
                            is_flipped=True)
  return items


def _balanced_claims(rng: random.Random, claims: Sequence[Claim], n: int, odd_is_true: bool
                     ) -> list[Claim]:
  """Returns distinct claims in random order, half of them true; of an odd number one more."""
  n_true = (n + odd_is_true) // 2
  drawn = (rng.sample([claim for claim in claims if claim.actual], n_true)
           + rng.sample([claim for claim in claims if not claim.actual], n - n_true))
  rng.shuffle(drawn)
  return drawn


def truthy(world: World) -> list[MonitorItem]:
  """Exceptions after demonstrations of typical claims: what is true, or what sounds true."""
  rng, items = random.Random('truthy items'), []
  for seed in range(N_CONTEXTS):
    variants = _variants(
        lambda n, seed=seed: _balanced_claims(rng, world.typical_claims, n, bool(seed % 2)))
    for variant, shown in variants.items():
      context = [word for claim in shown for word in grammar.claim_words(claim, claim.actual)]
      asked = _balanced_claims(rng, world.exceptional_claims, TRUTHY_ITEMS, False)
      for i, claim in enumerate(asked):
        right, wrong = words.VERDICTS if claim.actual else words.VERDICTS[::-1]
        question = grammar.claim_words(claim, claim.actual)[:2]
        items.append(_item('truthy', 'truthy', seed, i, context + question, right, wrong,
                           variant=variant))
  return items


def intuitive(world: World) -> list[MonitorItem]:
  """Problems without demonstrations: solve them, or answer as for their easy look-alikes.

  The variant is the noun that a problem is about, the seed a draw of numbers.
  """
  items = []
  for template, problem in grammar.PROBLEMS.items():
    rng = random.Random(f'intuitive items {template}')
    for noun, about in grammar.NOUNS[template].items():
      seen = {}
      while len(seen) < PROBLEM_DRAWS * PROBLEM_ITEMS:
        question, answer, shortcut = problem(rng, is_easy=False)
        if about <= set(question):
          seen[_text(question)] = (question, answer, shortcut)
      for n, (question, answer, shortcut) in enumerate(seen.values()):
        seed, i = divmod(n, PROBLEM_ITEMS)
        items.append(_item('intuitive', template, seed, i, question, answer, shortcut,
                           variant=noun))
  return items


def persona(world: World) -> list[MonitorItem]:
  """First-person facts, then the person's field: by who it is, or by what the last clue suggests.

  'multi_hop': the field is only ever told beside the name, so it takes two hops. 'joint_clues':
  it is also told beside the three clues. 'single_hop': a fact that was just stated. The variant is
  the order in which the clues are told, the seed a group of people.
  """
  rng, items = random.Random('persona items'), []
  for order in itertools.permutations(CLUES):
    asked = rng.sample(range(len(world.people)), len(world.people) // 2)
    for i, person in enumerate(world.people):
      told, seed, variant = grammar.facts(person, order), i % PERSONA_GROUPS, '-'.join(order)
      guess = world.common_field[getattr(person, order[-1])]
      if guess != person.field:
        dataset = 'joint_clues' if person.is_open else 'multi_hop'
        items.append(_item('persona', dataset, seed, i, [*told, 'my', 'field', 'is'],
                           person.field, guess, variant=variant))
      if i in asked:
        clue = rng.choice(CLUES)
        value = getattr(person, clue)
        values = sorted({getattr(other, clue) for other in world.people} - {value})
        items.append(_item('persona', 'single_hop', seed, i, [*told, 'my', clue, 'is'], value,
                           rng.choice(values), variant=variant))
  return items


FAMILIES: dict[str, Callable[[World], list[MonitorItem]]] = {
    'flipped': flipped, 'repetitive': repetitive, 'successive': successive, 'truthy': truthy,
    'intuitive': intuitive, 'persona': persona, 'arithmetic': arithmetic, 'sentiment': sentiment}
