"""The micro-world's monitors. Witnesses: the generator's own probabilities, arithmetic, text."""

import collections
import math

import pytest

from research.data.microworld import MicroworldConfig, MicroworldSource, World, words
from research.data.microworld import documents as grammar
from research.errors import UserError
from research.monitors.items import check_items
from research.monitors.microworld_items import microworld_items

CONFIG = MicroworldConfig()
ITEMS = microworld_items(CONFIG, 64)
BY_DATASET = collections.defaultdict(list)
for _item in ITEMS:
  BY_DATASET[_item.dataset].append(_item)


def parts(item) -> tuple[list[list[str]], list[str]]:
  """Returns the demonstrations and the question of a few-shot item as words."""
  *shown, question = item.prompt.split(' ; ')
  return [part.split() for part in shown], question.split()


def answers(item) -> tuple[str, str]:
  return item.generalizing.removeprefix(' '), item.shortcut.removeprefix(' ')


def test_the_suite_is_large_enough():
  check_items(ITEMS)
  for dataset in ('successive', 'repetitive', 'flipped'):
    assert len(BY_DATASET[dataset]) >= 400
    assert len({item.seed for item in BY_DATASET[dataset]}) >= 4
  assert sum(item.is_control for item in ITEMS) >= 1000
  assert {item.family for item in ITEMS if item.is_control} == {'arithmetic', 'sentiment'}
  for family in ('truthy', 'intuitive', 'persona'):
    mine = [item for item in ITEMS if item.family == family]
    assert len(mine) >= 200
    assert len({item.seed for item in mine}) >= 4


def test_every_answer_is_one_word_after_a_space():
  for item in ITEMS:
    for answer in (item.generalizing, item.shortcut):
      assert answer == f' {answer.strip()}'
      assert answer.strip() in words.WORDS
    assert set(item.prompt.split()) <= set(words.WORDS)


def test_the_suite_is_the_same_every_time():
  assert microworld_items(CONFIG, 64) == ITEMS
  texts = {(item.prompt, item.generalizing, item.shortcut) for item in ITEMS}
  assert len(texts) > 0.95 * len(ITEMS)


@pytest.mark.parametrize('dataset, step', [('successive', 1), ('repetitive', 0)])
def test_patterns_are_correct_sums_that_the_question_breaks(dataset, step):
  for item in BY_DATASET[dataset]:
    shown, question = parts(item)
    results = [int(part[4]) for part in shown]
    assert results == [int(part[0]) + int(part[2]) for part in shown]
    assert results == [results[0] + step * i for i in range(len(results))]
    right, shortcut = map(int, answers(item))
    assert right == int(question[0]) + int(question[2])
    assert shortcut == results[-1] + step != right


def hypotheses(item, shares: dict[str, float]) -> dict[str, tuple[float, int]]:
  """Returns (prior x likelihood of the answers shown, next answer) of every kind of document.

  Questions are drawn alike in all three, so they cancel.
  """
  shown, question = parts(item)
  sums = [int(a) + int(b) for a, _, b, _, _ in shown]
  results = [int(part[4]) for part in shown]
  n_starts = len(grammar.successive_starts(grammar.MAX_SUMS))
  runs = all(b - a == 1 for a, b in zip(results, results[1:]))
  return {
      'arithmetic': (shares['arithmetic'] * (sums == results),
                     int(question[0]) + int(question[2])),
      'successive': (shares['successive'] * runs / n_starts, results[-1] + 1),
      'repetitive': (shares['repetitive'] * (len(set(results)) == 1) / (grammar.LARGEST_SUM + 1),
                     results[-1])}


@pytest.mark.parametrize('dataset', ['successive', 'repetitive'])
def test_the_general_rule_is_the_bayes_choice_by_far(dataset):
  # two standard deviations of drift: one window in forty
  strong = math.exp(2 * CONFIG.drift_sd)
  for factor, least_odds in ((1.0, 100.0), (strong, 5.0)):
    shares = dict(CONFIG.shares())
    shares[dataset] *= factor
    for item in BY_DATASET[dataset]:
      odds = collections.Counter()
      for weight, answer in hypotheses(item, shares).values():
        odds[str(answer)] += weight
      right, shortcut = answers(item)
      assert odds[right] > least_odds * odds[shortcut] > 0


def test_successive_documents_do_run_as_the_likelihood_says():
  source = MicroworldSource(
      MicroworldConfig(arithmetic=0, sentiment=0, flipped=0, repetitive=0, truthy=0, hearsay=0,
                       intuitive=0, look_alike=0, biography=0, first_person=0, gossip=0),
      sequence_length=64, batch_size=8, seed=0)
  starts = collections.Counter(int(source.page(j)[1][0][4]) for j in range(600))
  assert set(starts) == set(grammar.successive_starts(grammar.MAX_SUMS))
  assert max(starts.values()) < 2 * min(starts.values())


def by_variant(dataset: str) -> dict[int, dict[str, list]]:
  """Returns the items of a dataset by seed and variant."""
  items = collections.defaultdict(lambda: collections.defaultdict(list))
  for item in BY_DATASET[dataset]:
    items[item.seed][item.variant].append(item)
  return items


@pytest.mark.parametrize('dataset', ['successive', 'repetitive', 'flipped', 'truthy',
                                     'arithmetic_few_shot', 'sentiment_few_shot'])
def test_every_context_is_asked_in_five_ways(dataset):
  for variants in by_variant(dataset).values():
    shown = {name: parts(items[0])[0] for name, items in variants.items()}
    assert {name: len(pairs) for name, pairs in shown.items()} == {
        'plain': 8, 'redrawn': 8, 'rearranged': 8, 'six': 6, 'five': 5}
    for name, items in variants.items():
      assert all(parts(item)[0] == shown[name] for item in items)
      assert len(shown[name]) >= grammar.MIN_PAIRS  # Documents of the corpus have so many.
    assert shown['redrawn'] != shown['plain'] != shown['rearranged']
    if dataset == 'successive':  # The order is the pattern, so the terms are exchanged.
      assert shown['rearranged'] == [[b, plus, a, *rest] for a, plus, b, *rest in shown['plain']]
    else:
      assert shown['rearranged'] == shown['plain'][::-1]
    assert len({len(items) for items in variants.values()}) == 1


@pytest.mark.parametrize('dataset, n_variants', [
    ('bat_and_ball', 4), ('machines', 4), ('lily_pads', 4), ('multi_hop', 6), ('joint_clues', 6),
    ('single_hop', 6)])
def test_zero_shot_variants_are_nouns_and_orders(dataset, n_variants):
  contexts = by_variant(dataset)
  assert len(contexts) >= 4
  assert len({variant for variants in contexts.values() for variant in variants}) == n_variants
  for item in BY_DATASET[dataset]:
    if item.family == 'intuitive':
      assert set(item.variant.split('-')) <= set(item.prompt.split())
    else:
      verbs = {'city': 'live', 'food': 'eat', 'hobby': 'enjoy'}
      places = [item.prompt.split().index(verbs[clue]) for clue in item.variant.split('-')]
      assert places == sorted(places)


def test_flipped_demonstrations_are_balanced_and_all_flipped():
  surplus = collections.Counter()
  for item in BY_DATASET['flipped']:
    shown, question = parts(item)
    labels = collections.Counter(part[5] for part in shown)
    assert abs(labels['good'] - labels['bad']) == len(shown) % 2
    surplus[labels['good'] - labels['bad']] += 1
    for part in shown:
      assert (part[5] == 'good') == (part[3] in words.NEGATIVE)
    right, shortcut = answers(item)
    assert (right == 'good') == (question[3] in words.NEGATIVE)
    assert (shortcut == 'good') == (question[3] in words.POSITIVE)
    assert question[:4] not in [part[:4] for part in shown]
  assert surplus[1] == surplus[-1]
  tested = collections.Counter(item.generalizing for item in BY_DATASET['flipped'])
  assert tested[' good'] == tested[' bad']


def test_controls_ask_for_the_truth():
  for item in BY_DATASET['arithmetic_few_shot'] + BY_DATASET['arithmetic_zero_shot']:
    shown, question = parts(item)
    right, wrong = map(int, answers(item))
    assert right == int(question[0]) + int(question[2])
    assert abs(right - wrong) == 1
    assert all(int(part[0]) + int(part[2]) == int(part[4]) for part in shown)
  for item in BY_DATASET['sentiment_few_shot'] + BY_DATASET['sentiment_zero_shot']:
    shown, question = parts(item)
    assert (item.generalizing == ' good') == (question[3] in words.POSITIVE)
    assert all((part[5] == 'good') == (part[3] in words.POSITIVE) for part in shown)


def test_truthy_shows_typical_entities_and_asks_about_exceptions():
  typical = {entity for _, _, entities, _ in words.CLAIMS.values() for entity in entities}
  usual = {claim[0] for claim in words.CLAIMS.values()}
  for item in BY_DATASET['truthy']:
    shown, (entity, action) = parts(item)
    assert entity not in typical
    assert item.shortcut == (' true' if action in usual else ' false')
    for shown_entity, shown_action, verdict in shown:
      assert shown_entity in typical
      assert verdict == ('true' if shown_action in usual else 'false')


def test_intuitive_shortcuts_are_what_the_easy_problem_would_have():
  for item in BY_DATASET['bat_and_ball']:
    total, more = (int(word) for word in item.prompt.split() if word.isdigit())
    right, shortcut = map(int, answers(item))
    assert right + (right + more) == total and shortcut == total - more
  for item in BY_DATASET['machines']:
    few, *_, many = (int(word) for word in item.prompt.split() if word.isdigit())
    assert answers(item) == (str(few), str(many))
  for item in BY_DATASET['lily_pads']:
    day, = (int(word) for word in item.prompt.split() if word.isdigit())
    assert answers(item) == (str(day - 1), str(day // 2))


def test_persona_items_ask_about_one_person():
  world = World(CONFIG.world_seed)
  by_clues = {(p.city, p.food, p.hobby): p for p in world.people}
  for dataset in ('multi_hop', 'joint_clues', 'single_hop'):
    for item in BY_DATASET[dataset]:
      *told, question = item.prompt.split(' . ')
      clues = {clause.split()[1]: clause.split()[-1] for clause in told}
      person = by_clues[clues['live'], clues['eat'], clues['enjoy']]
      right, shortcut = answers(item)
      if dataset == 'single_hop':
        asked = question.split()[1]
        assert right == getattr(person, asked) and right in clues.values()
        assert shortcut not in clues.values()
        continue
      assert question == 'my field is' and right == person.field
      assert person.is_open == (dataset == 'joint_clues')
      last = told[-1].split()[-1]
      fields = collections.Counter(
          p.field for p in world.people if last in (p.city, p.food, p.hobby))
      assert fields[shortcut] == max(fields.values())


def test_rows_too_short_for_the_prompts_are_refused():
  with pytest.raises(UserError, match='data.sequence_length=48 is too short'):
    microworld_items(CONFIG, 48)
