"""The small-scale suite. Witnesses: solvers that read the prompt's text alone; both rules' answers.

Arithmetic is evaluated, programs are run, letters counted, equations tried, facts chained. What
words mean is stated here again.
"""

import collections
import hashlib
import json
import re

import numpy as np
import pytest

from research import overrides
from research.config import ExperimentConfig
from research.data import tokenizers
from research.errors import UserError
from research.monitors.encoding import encode_item
from research.monitors.items import check_items
from research.monitors.small.config import FAMILIES, LEVELS, SmallSuiteConfig
from research.monitors.small.statements import MISCONCEPTIONS, SURPRISING
from research.monitors.small.suite import check_fits, small_suite
from research.monitors.watch import read_suite
from tests.research import small_suite_solvers as solvers
from tests.research.small_suite_solvers import (
    answers, earliest, is_plainly_true, last_shown, latest, majority, meaning, solved,
    split_dataset)

ITEMS = small_suite(SmallSuiteConfig(items=4))
BY_FAMILY = collections.defaultdict(list)
for _item in ITEMS:
  BY_FAMILY[_item.family].append(_item)


def test_the_suite_has_what_it_promises():
  check_items(ITEMS)
  assert set(BY_FAMILY) == set(FAMILIES)
  datasets = collections.defaultdict(set)
  for item in ITEMS:
    datasets[item.dataset].add((item.seed, item.variant))
  patterns = {name for name in datasets if not name.endswith('_control')}
  assert {name + '_control' for name in patterns} == set(datasets) - patterns
  assert {split_dataset(item)[1] for item in ITEMS} == set(LEVELS)
  for name, contexts in datasets.items():
    assert len({seed for seed, _ in contexts}) >= 8, name
    assert len({variant for _, variant in contexts}) == 3, name
    by_variant = collections.Counter(variant for _, variant in contexts)
    assert len(set(by_variant.values())) == 1, name
  assert all(item.is_control == item.dataset.endswith('_control') for item in ITEMS)
  texts = {(item.prompt, item.generalizing, item.shortcut) for item in ITEMS}
  assert len(texts) > 0.97 * len(ITEMS)


def test_the_suite_is_the_same_everywhere():
  """Random draws depend on the version of Python; a change of items must change drawing.SEED."""
  rows = [(item.item_id, item.prompt, item.generalizing, item.shortcut)
          for item in small_suite(SmallSuiteConfig())]
  digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
  assert digest == '4595b615d64685bd3504209168cb70a0d5b3acc0fd87cc5e3978bedc0ac87338'


def test_a_part_has_the_items_of_the_whole():
  part = small_suite(SmallSuiteConfig(families=('persona', 'flipped'), levels=('medium',),
                                      contexts=3, items=2))
  assert len(part) == 5 * 2 * 3 * 2
  assert set(part) <= set(ITEMS)
  crossed = small_suite(SmallSuiteConfig(families=('truthy',), contexts=3, wordings=3))
  assert len(crossed) == 3 * 2 * 3 * 2 * 3
  assert {item.variant for item in crossed if item.seed == 1} == {
      'statement', 'sentence', 'question'}
  assert set(small_suite(SmallSuiteConfig(families=('truthy',), contexts=3))) <= set(crossed)


def test_successive_answers_run_until_the_question_breaks_them():
  for item in BY_FAMILY['successive']:
    given, right, answer = solved(item)
    order = solvers.ORDERS[split_dataset(item)[0]]
    places = [order.index(one) for one in given]
    steps = {b - a for a, b in zip(places, places[1:])}
    generalizing, shortcut = answers(item)
    assert given == right and answer == generalizing and len(given) == 8
    assert not {generalizing, shortcut} & set(given)
    if item.is_control:
      assert 1 not in steps
    else:
      assert steps == {1} and shortcut == order[places[-1] + 1]
    if generalizing.isdigit():
      assert len(generalizing) == len(shortcut)


def test_repetitive_answers_are_equal_until_the_question_breaks_them():
  for item in BY_FAMILY['repetitive']:
    given, right, answer = solved(item)
    generalizing, shortcut = answers(item)
    assert given == right and answer == generalizing != shortcut and len(given) == 8
    parts = item.prompt.split('\n\n' if '\n\n' in item.prompt else '\n')
    assert len(set(parts)) == len(parts) == 9  # no question twice
    if item.is_control:
      counts = collections.Counter(given).values()
      assert len(counts) >= 2 and max(counts) - min(counts) <= 1
    else:
      assert set(given) == {shortcut}


def test_controls_ask_what_the_pattern_asks():
  """Questions of both are the same, or the two answers change places."""
  by_id = {item.item_id: item for item in ITEMS}
  for item in ITEMS:
    if not item.is_control:
      task, level = split_dataset(item)
      other = by_id[item.item_id.replace(f'/{item.dataset}/', f'/{item.dataset}_control/')]
      same = (item.generalizing, item.shortcut) == (other.generalizing, other.shortcut)
      swapped = (item.generalizing, item.shortcut) == (other.shortcut, other.generalizing)
      assert same if item.family in ('successive', 'repetitive', 'truthy') else swapped
      if same and item.family != 'truthy':
        assert solved(item)[2] == solved(other)[2]
      if item.family == 'flipped':
        labels = (item.generalizing, item.shortcut)
        blank = [re.sub('|'.join(f'{label}$' for label in labels), '', text, flags=re.MULTILINE)
                 for text in (item.prompt, other.prompt)]
        assert blank[0] == blank[1]


def test_flipped_labels_are_flipped_and_balanced():
  n_shown = collections.defaultdict(set)
  for item in BY_FAMILY['flipped']:
    whole = re.compile(rf'^{solvers.TEXTS[item.variant]}(?: (\S+))?$', re.MULTILINE)
    assert not whole.sub('', item.prompt).strip()
    *shown, (text, none) = whole.findall(item.prompt)
    labels = set(answers(item))
    assert none == '' and labels == {label for _, label in shown}
    assert text not in [sentence for sentence, _ in shown]
    assert not labels & set(re.findall(r'\w+', text.lower()))  # no answer to copy
    for sentence, label in shown:
      assert (label == meaning(sentence, labels)) == item.is_control
    generalizing, _ = answers(item)
    assert (generalizing == meaning(text, labels)) == item.is_control
    counts = collections.Counter(label for _, label in shown).values()
    assert len(set(counts)) == 1
    n_shown[split_dataset(item)[1]].add(len(shown))
  assert n_shown == {'easy': {16}, 'medium': {8}, 'hard': {4}}


def test_truthy_demonstrations_are_plain_and_its_questions_are_not():
  assert len(SURPRISING) >= 30 and len(MISCONCEPTIONS) >= 30
  assert len(set(SURPRISING + MISCONCEPTIONS)) == len(SURPRISING) + len(MISCONCEPTIONS)
  wordings = {'statement': r'Statement: (.+)\nTrue or false:', 'sentence': r'(.+\.) This is',
              'question': r'Q: (.+) Right or wrong\?\nA:'}
  for item in BY_FAMILY['truthy']:
    whole = re.compile(rf'^{wordings[item.variant]}(?: (\S+))?$', re.MULTILINE)
    assert not whole.sub('', item.prompt).strip()
    *shown, (statement, none) = whole.findall(item.prompt)
    assert none == ''
    verdicts = [solvers.VERDICTS[verdict] for _, verdict in shown]
    assert verdicts == [is_plainly_true(text) for text, _ in shown]
    assert sum(verdicts) * 2 == len(verdicts) in (4, 8, 16)
    generalizing, shortcut = (solvers.VERDICTS[answer] for answer in answers(item))
    assert generalizing != shortcut
    if item.is_control:
      assert generalizing == is_plainly_true(statement)
    else:
      assert statement in (SURPRISING if generalizing else MISCONCEPTIONS)


def test_intuitive_problems_are_solved_by_solving():
  solve = {'pair': solvers.pair, 'makers': solvers.makers, 'doubling': solvers.doubling,
           'posts': solvers.posts}
  seen = collections.Counter()
  for item in BY_FAMILY['intuitive']:
    task, _ = split_dataset(item)
    right, at_once = map(str, solve[task](item.prompt))
    generalizing, shortcut = answers(item)
    assert generalizing == right, item.prompt
    assert (shortcut if not item.is_control else generalizing) == at_once
    assert generalizing != shortcut and len(generalizing) == len(shortcut)
    seen[task, item.is_control] += 1
  assert len(seen) == 8 and min(seen.values()) >= 100


def test_persona_answers_follow_from_the_facts():
  hops = collections.defaultdict(set)
  for item in BY_FAMILY['persona']:
    facts, _, question = item.prompt.rpartition('\n' if item.variant != 'question' else '\n\n')
    related = dict(re.findall(r'(?:teacher|neighbor|boss|doctor) of (\w+)(?: is|:) (\w+)', facts))
    owned = dict(re.findall(
        r'(\w+) (?:was born in|plays the|keeps a|likes to drink) (\w+)\.', facts)
                 + re.findall(r'(?:birthplace|instrument|pet|drink) of (\w+): (\w+)', facts))
    assert len(related) == len(owned) == len(set(owned.values()))
    who = next(found[1] for pattern in solvers.ASKED if (found := re.fullmatch(pattern, question)))
    *steps, name = who.split(' of ')
    meant = name
    for _ in steps:
      meant = related[meant]
    generalizing, shortcut = answers(item)
    assert generalizing == owned[meant] and meant in owned
    hops[item.dataset].add((len(owned), len(steps)))
    if item.is_control:
      assert meant == name and shortcut in owned.values()
    else:
      assert shortcut == owned[name]
  assert {name: found.pop() for name, found in hops.items() if len(found) == 1} == {
      'persona_easy': (3, 1), 'persona_medium': (6, 1), 'persona_hard': (6, 2),
      'persona_easy_control': (3, 0), 'persona_medium_control': (6, 0),
      'persona_hard_control': (6, 0)}


@pytest.mark.parametrize('family, heuristics', [
    ('successive', (last_shown, majority, latest)), ('repetitive', (last_shown, majority, latest)),
    ('flipped', (last_shown, majority, latest, earliest)),
    ('truthy', (last_shown, majority, latest, earliest)), ('intuitive', (latest, earliest)),
    ('persona', (latest, earliest))])
def test_simple_heuristics_do_not_generalize(family, heuristics):
  items = [item for item in BY_FAMILY[family] if not item.is_control]
  for heuristic in heuristics:
    right = [{item.generalizing[1:]: 1.0, item.shortcut[1:]: 0.0}.get(heuristic(item), 0.5)
             for item in items]
    # two standard errors, were items independent
    assert np.mean(right) <= 0.5 + 1 / np.sqrt(len(items)), heuristic.__name__


# Counted in WikiText-2 (validation and test), Tiny Shakespeare and a novel, whatever the case.
COUNTS = {
    'one': 1502, 'two': 1029, 'three': 620, 'four': 367, 'five': 254, 'six': 204, 'ten': 186,
    'eight': 115, 'seven': 104, 'nine': 92, 'twenty': 89, 'twelve': 43, 'fourteen': 22,
    'fifteen': 22, 'sixteen': 21, 'thirteen': 20, 'eleven': 17, 'seventeen': 13, 'zero': 7,
    'nineteen': 6, 'eighteen': 6}


def test_liking_an_answer_for_itself_earns_nothing():
  """Small numbers, early letters, short words: what a model prefers before it can do the task."""
  letters = solvers.ORDERS['letters']
  likings = {'small': lambda answer: (int(answer) if answer.isdigit() else
                                      letters.index(answer) if answer in letters else 0),
             'short': len, 'common': lambda answer: -COUNTS.get(answer, 0)}
  items = small_suite(SmallSuiteConfig(families=FAMILIES[:-1], contexts=36, shots=8))
  datasets = collections.defaultdict(list)
  for item in items:
    datasets[item.dataset].append(answers(item))
  for name, pairs in datasets.items():
    for liking, worth in likings.items():
      liked = [np.sign(worth(shortcut) - worth(generalizing)) for generalizing, shortcut in pairs]
      # Nothing where pairs mirror each other, else three standard errors of chance.
      assert abs(np.mean(liked)) <= 3 / np.sqrt(len(liked)), (name, liking)


def test_labels_are_balanced():
  for family in ('flipped', 'truthy'):
    contexts = collections.defaultdict(collections.Counter)
    for item in BY_FAMILY[family]:
      contexts[item.dataset, item.seed][item.generalizing] += 1
    assert all(len(set(counts.values())) == 1 and len(counts) == 2 for counts in contexts.values())
  for level in LEVELS:
    logic = collections.Counter(
        item.generalizing for item in ITEMS if item.dataset == f'logic_{level}')
    assert logic[' True'] == logic[' False']


@pytest.mark.parametrize('shots, most', [(8, 256), (16, 512)])
@pytest.mark.parametrize('name, least', [
    ('allenai_dolma2.json', 1.0),
    # Some numbers of three digits, and some words of numbers, are two tokens there.
    ('gpt_neox_20B_tokenizer.json', 0.9)])
def test_prompts_fit_and_answers_are_as_long(shared_data, name, least, shots, most):
  tokenizer = tokenizers.load(shared_data / 'tokenizers' / name)
  items = small_suite(SmallSuiteConfig(contexts=3, shots=shots))
  encoded = [encode_item(item, tokenizer) for item in items]
  assert max(max(len(tokens.generalizing), len(tokens.shortcut)) for tokens in encoded) <= most
  assert not any(tokens.straddles for tokens in encoded)
  equal = collections.defaultdict(list)
  for item, tokens in zip(items, encoded, strict=True):
    equal[item.family].append(len(tokens.generalizing) == len(tokens.shortcut))
  shares = {family: np.mean(found) for family, found in equal.items()}
  assert min(shares.values()) >= least, shares


def test_a_config_chooses_the_suite_and_a_short_context_is_refused():
  tokenizer = tokenizers.byte_tokenizer()
  config = overrides.apply(ExperimentConfig(), [
      ('monitors.suite', 'small'), ('model.context_length', '4096'),
      ('monitors.small.contexts', '2'), ('monitors.small.levels', 'easy')])
  items = read_suite(config, tokenizer, None).items
  assert items == small_suite(SmallSuiteConfig(contexts=2, levels=('easy',)))
  with pytest.raises(UserError, match='no family fits; the shortest, successive, needs 174'):
    read_suite(overrides.apply(config, [('model.context_length', '100')]), tokenizer, None)
  needs = {shots: max(len(item.prompt + item.generalizing) for item in small_suite(
      SmallSuiteConfig(contexts=2, shots=shots))) for shots in (8, 16)}
  with pytest.raises(UserError, match=r'needs \d+ tokens.*--config.monitors.small.shots=8 fits'):
    check_fits(SmallSuiteConfig(contexts=2), tokenizer, needs[8] + 8, None)
  longest = {family: max(len(item.prompt + max(item.generalizing, item.shortcut, key=len)) - 1
                         for item in small_suite(SmallSuiteConfig(contexts=2, shots=8))
                         if item.family == family) for family in FAMILIES}
  middle = sorted(longest.values())[2]
  fitting = ','.join(family for family in FAMILIES if longest[family] <= middle)
  with pytest.raises(UserError, match=f'families={fitting} --config.monitors.small.shots=8 fits, '
                                      f'all need {max(longest.values())}$'):
    check_fits(SmallSuiteConfig(contexts=2), tokenizer, middle, None)
  with pytest.raises(UserError, match=f'no family fits; .* needs {min(longest.values())}$'):
    check_fits(SmallSuiteConfig(contexts=2), tokenizer, 20, None)


def test_the_most_demonstrations_can_be_drawn():
  for item in small_suite(SmallSuiteConfig(families=('successive', 'repetitive'), contexts=3,
                                           shots=32)):
    given, right, answer = solved(item)
    assert given == right and len(given) == 16 and answer == item.generalizing[1:]


@pytest.mark.parametrize('path, text, words', [
    ('families', 'flipt', 'families=flipt must be different ones of successive'),
    ('levels', 'easy,easy', 'must be different ones of easy'),
    ('items', '3', 'items=3 must be even'), ('contexts', '0', 'contexts=0'),
    ('wordings', '4', 'wordings=4'), ('shots', '12', 'shots=12')])
def test_bad_sizes_are_refused(path, text, words):
  with pytest.raises(ValueError, match=words):
    overrides.apply(ExperimentConfig(), [(f'monitors.small.{path}', text)])
