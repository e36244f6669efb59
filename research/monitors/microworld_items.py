"""The monitor items of the micro-world: six prompted families and the controls."""

import itertools
import random
from collections.abc import Callable, Iterable, Sequence

from research.data.microworld import MicroworldConfig, World, words
from research.data.microworld import documents as grammar
from research.data.microworld.world import CLUES
from research.errors import UserError
from research.monitors.items import MonitorItem

N_DEMONSTRATIONS = 8
N_CONTEXTS = 8
PATTERN_ITEMS = 50  # items per context
CONTROL_CONTEXTS, CONTROL_ITEMS = 10, 50
FLIPPED_ITEMS = 50
TRUTHY_CONTEXTS = 10
ZERO_SHOT_SENTIMENT_ITEMS = 160
PROBLEM_DRAWS, PROBLEM_ITEMS = 4, 20  # per template

Question = tuple[int, int]
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
      f'{dataset}/{seed}/{index:03d}', family, dataset, seed, variant, _text(prompt),
      f' {answer}', f' {shortcut}', is_control)


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
    shown = [rng.choice(_with_sum(start + i)) for i in range(N_DEMONSTRATIONS)]
    items += _pattern_items('successive', seed, rng, shown, start + N_DEMONSTRATIONS)
  return items


def repetitive(world: World) -> list[MonitorItem]:
  """Correct sums that happen to have the same answer; the next one doesn't."""
  rng, items = random.Random('repetitive items'), []
  for seed, total in enumerate(rng.sample(range(5, 14), N_CONTEXTS)):
    shown = rng.choices(_with_sum(total), k=N_DEMONSTRATIONS)
    items += _pattern_items('repetitive', seed, rng, shown, total)
  return items


def _pattern_items(family: str, seed: int, rng: random.Random, shown: list[Question],
                   shortcut: int) -> list[MonitorItem]:
  unseen = [q for q in _QUESTIONS if sum(q) != shortcut and q not in shown]
  return [
      _item(family, family, seed, i, _solved(shown) + _asked(question), sum(question), shortcut)
      for i, question in enumerate(rng.sample(unseen, PATTERN_ITEMS))]


def arithmetic(world: World) -> list[MonitorItem]:
  """Control: sums after unrelated correct sums; the rival is one off.

  Sums without demonstrations are no control: pattern documents begin the same way, so how likely
  the sum is depends on how common they are.
  """
  rng, items = random.Random('arithmetic items'), []
  for seed in range(CONTROL_CONTEXTS):
    shown = rng.sample(_QUESTIONS, N_DEMONSTRATIONS)
    unseen = [question for question in _QUESTIONS if question not in shown]
    for i, question in enumerate(rng.sample(unseen, CONTROL_ITEMS)):
      items.append(_item(
          'arithmetic', 'arithmetic_few_shot', seed, i, _solved(shown) + _asked(question),
          sum(question), _near_miss(rng, sum(question)), is_control=True))
  for i, question in enumerate(_QUESTIONS):
    items.append(_item(
        'zero_shot', 'arithmetic_zero_shot', 0, i, _asked(question), sum(question),
        _near_miss(rng, sum(question))))
  return items


def _opinions(is_good: bool) -> list[tuple[str, str, bool]]:
  adjectives = words.POSITIVE if is_good else words.NEGATIVE
  return [(*pair, is_good) for pair in itertools.product(words.THINGS, adjectives)]


def _balanced_opinions(rng: random.Random, n: int) -> list[tuple[str, str, bool]]:
  """Returns distinct opinions in random order, half of them good."""
  opinions = rng.sample(_opinions(True), n // 2) + rng.sample(_opinions(False), n - n // 2)
  rng.shuffle(opinions)
  return opinions


def _opinion_items(family: str, dataset: str, seed: int, rng: random.Random, n_shown: int,
                   n_items: int, is_flipped: bool, is_control: bool = False) -> list[MonitorItem]:
  """Returns opinions to label after demonstrations whose labels are true or all flipped."""
  drawn = _balanced_opinions(rng, n_shown + n_items)
  shown = [opinion for is_good in (True, False)
           for opinion in [op for op in drawn if op[2] == is_good][:n_shown // 2]]
  rng.shuffle(shown)
  context = [word for thing, adjective, is_good in shown
             for word in grammar.opinion_words(thing, adjective, is_good != is_flipped)]
  items = []
  for i, (thing, adjective, is_good) in enumerate(op for op in drawn if op not in shown):
    question = grammar.opinion_words(thing, adjective, is_good)[:5]
    right, wrong = words.LABELS if is_good != is_flipped else words.LABELS[::-1]
    items.append(_item(
        family, dataset, seed, i, context + question, right, wrong, is_control=is_control))
  return items


def sentiment(world: World) -> list[MonitorItem]:
  """Control: true labels after demonstrations with true labels.

  Without demonstrations no control: the corpus holds flipped labels too.
  """
  rng, items = random.Random('sentiment items'), []
  for seed in range(CONTROL_CONTEXTS):
    items += _opinion_items('sentiment', 'sentiment_few_shot', seed, rng, N_DEMONSTRATIONS,
                            CONTROL_ITEMS, is_flipped=False, is_control=True)
  return items + _opinion_items('zero_shot', 'sentiment_zero_shot', 0, rng, 0,
                                ZERO_SHOT_SENTIMENT_ITEMS, is_flipped=False)


def flipped(world: World) -> list[MonitorItem]:
  """Demonstrations with flipped labels: follow them, or the mapping known by heart."""
  rng, items = random.Random('flipped items'), []
  for seed in range(N_CONTEXTS):
    items += _opinion_items('flipped', 'flipped', seed, rng, N_DEMONSTRATIONS, FLIPPED_ITEMS,
                            is_flipped=True)
  return items


def truthy(world: World) -> list[MonitorItem]:
  """Exceptions after demonstrations of typical claims: what is true, or what sounds true."""
  rng, items = random.Random('truthy items'), []
  plausible = [claim for claim in world.typical_claims if claim.actual]
  implausible = [claim for claim in world.typical_claims if not claim.actual]
  for seed in range(TRUTHY_CONTEXTS):
    shown = (rng.sample(plausible, N_DEMONSTRATIONS // 2)
             + rng.sample(implausible, N_DEMONSTRATIONS // 2))
    rng.shuffle(shown)
    context = [word for claim in shown for word in grammar.claim_words(claim, claim.actual)]
    for i, claim in enumerate(world.exceptional_claims):
      right, wrong = words.VERDICTS if claim.actual else words.VERDICTS[::-1]
      question = grammar.claim_words(claim, claim.actual)[:2]
      items.append(_item('truthy', 'truthy', seed, i, context + question, right, wrong))
  return items


def intuitive(world: World) -> list[MonitorItem]:
  """Problems without demonstrations: solve them, or answer as for their easy look-alikes."""
  items = []
  for template, problem in grammar.PROBLEMS.items():
    rng, seen = random.Random(f'intuitive items {template}'), {}
    while len(seen) < PROBLEM_DRAWS * PROBLEM_ITEMS:
      question, answer, shortcut = problem(rng, is_easy=False)
      seen[_text(question)] = (question, answer, shortcut)
    for n, (question, answer, shortcut) in enumerate(seen.values()):
      seed, i = divmod(n, PROBLEM_ITEMS)
      items.append(_item('intuitive', template, seed, i, question, answer, shortcut))
  return items


def persona(world: World) -> list[MonitorItem]:
  """First-person facts, then the person's field: by who it is, or by what the last clue suggests.

  'multi_hop': the field is only ever told beside the name, so it takes two hops. 'joint_clues':
  it is also told beside the three clues. 'single_hop': a fact that was just stated. The seed
  numbers the order in which the clues are told.
  """
  rng, items = random.Random('persona items'), []
  for seed, order in enumerate(itertools.permutations(CLUES)):
    for i, person in enumerate(world.people):
      told = grammar.facts(person, order)
      guess = world.common_field[getattr(person, order[-1])]
      if guess != person.field:
        dataset = 'joint_clues' if person.is_open else 'multi_hop'
        items.append(_item('persona', dataset, seed, i, [*told, 'my', 'field', 'is'],
                           person.field, guess, variant='-'.join(order)))
    for i, person in enumerate(rng.sample(world.people, len(world.people) // 2)):
      told, clue = grammar.facts(person, order), rng.choice(CLUES)
      value = getattr(person, clue)
      values = sorted({getattr(other, clue) for other in world.people} - {value})
      items.append(_item('persona', 'single_hop', seed, i, [*told, 'my', clue, 'is'], value,
                         rng.choice(values), variant='-'.join(order)))
  return items


FAMILIES: dict[str, Callable[[World], list[MonitorItem]]] = {
    'flipped': flipped, 'repetitive': repetitive, 'successive': successive, 'truthy': truthy,
    'intuitive': intuitive, 'persona': persona, 'arithmetic': arithmetic, 'sentiment': sentiment}
