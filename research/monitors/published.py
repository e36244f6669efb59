"""The published suite of Wen et al. 2026 (Generalization Dynamics of LM Pre-training) as items.

Facts beyond the post's are from the public runner of the suite (GDsuite, run_eval.py and
config.yaml), as read: which dataset shows how many demonstrations, and the order of draws. With
`rng = random.Random(seed)`, seeds 0 to 3:

  balanced: shuffles the demonstrations of class 0, then those of class 1, joins the first half of
    each and shuffles them; one draw per seed.
  resampled: `rng.sample` anew for every test row, in the order of the file.
  ordered: the first of demonstration set `seed` (modulo their number), in the order of the file.
  none: no demonstrations, one seed.

A dataset without demonstrations has one seed. A demonstration is its prompt, a space and its
answer. Prompts equal the runner's where the files are the same; scores were never compared with
published ones here.
"""

import pathlib
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from research.errors import UserError
from research.monitors import published_files as files
from research.monitors.items import LeftOut, MonitorItem
from research.monitors.suite import Suite

N_SEEDS = 4
VARIANT = 'published'
PERSONA = 'multihop_persona_qa'

Demo = dict[str, Any]


def _balanced(demos: list[Demo], n_shots: int, rng: random.Random) -> list[Demo]:
  """Returns half of each class in random order."""
  classes = [[demo for demo in demos if demo['label'] == label] for label in (0, 1)]
  for members in classes:
    rng.shuffle(members)
  drawn = [demo for members in classes for demo in members[:n_shots // 2]]
  rng.shuffle(drawn)
  return drawn


STRATEGIES: dict[str, Callable[[list[Demo], int, random.Random], list[Demo]]] = {
    'balanced': _balanced,
    'resampled': lambda demos, n_shots, rng: rng.sample(demos, min(n_shots, len(demos))),
    'ordered': lambda demos, n_shots, rng: demos[:n_shots],
    'none': lambda demos, n_shots, rng: []}


class Family(NamedTuple):
  """How a family shows demonstrations.

  Attributes:
    folder: of its files.
    strategy: how demonstrations are drawn, a name of STRATEGIES.
    joiner: text between demonstrations, and before the test's prompt.
    shots: demonstrations by dataset.
  """

  folder: str
  strategy: str
  joiner: str
  shots: dict[str, int]


FAMILIES = {
    'flipped': Family('flipped_answer', 'balanced', '\n\n', {
        'sst2': 64, 'imdb': 24, 'rotten_tomatoes': 64, 'poem_sentiment': 64,
        'yahoo_health_computers': 64, 'yahoo_business_science': 64, 'emotion': 100,
        'emotion_anger_joy': 100}),
    # The prompts of algebra, in four wordings, have their demonstrations in them.
    'repetitive': Family('repetitive_answer', 'resampled', '\n', {
        'code_tracing': 8, 'letter_counting': 4, 'logic': 64, 'algebra/original': 0,
        'algebra/v2fmt': 0, 'algebra/numbered': 0, 'algebra/instruction': 0}),
    'successive': Family('successive_answer', 'ordered', '\n', {
        'number_words': 10, 'letters': 10, 'arithmetic': 32, 'even': 32}),
    'truthy': Family('truthy_answer', 'resampled', '\n', {
        'surprising_truth': 8, 'common_misconception': 100}),
    'intuitive': Family('intuitive_answer', 'none', '\n', {'crt': 0})}


def read(location: str) -> Suite:
  """Returns the published suite in a folder or a dataset of the hub.

  Item ids are family/dataset/seed/row, rows of tests counted from 0 in the order of the file; a
  test row that cannot be used is left out for every seed. A wording is the item's variant.

  Raises:
    UserError: there is no such suite, a file is damaged, or a demonstration lacks a field.
  """
  root = files.find(location, [family.folder for family in FAMILIES.values()])
  suite, absent = Suite([], [], []), []
  for name, family in FAMILIES.items():
    for dataset, n_shots in family.shots.items():
      path = root / family.folder / f'{dataset}.jsonl'
      if path.is_file():
        _add(suite, path, name, dataset, n_shots)
      else:
        absent.append(f'{family.folder}/{dataset}')
    known = {root / family.folder / f'{dataset}.jsonl' for dataset in family.shots}
    for path in sorted(set((root / family.folder).rglob('*.jsonl')) - known):
      suite.notes.append(f'{path.relative_to(root)} is no published dataset and is not scored')
  if absent:
    suite.notes.append(f'{len(absent)} published datasets are not there: {", ".join(absent)}')
  if not suite.items:
    raise UserError(f'{location} has no item that can be scored; '
                    + '; '.join(map(': '.join, suite.left_out[:3])))
  return suite


def _add(suite: Suite, path: pathlib.Path, name: str, dataset: str, n_shots: int) -> None:
  """Adds the items of a file."""
  family = FAMILIES[name]
  demos, tests = _split(path, family)
  wrong = [_wrong(row) for _, row in tests]
  n_seeds = N_SEEDS if demos and family.strategy != 'none' else 1
  for seed in range(n_seeds):
    prompts = list(_prompts(family, n_shots, demos, [row for _, row in tests], seed))
    for i, (_, row) in enumerate(tests):
      item_id = f'{name}/{dataset}/{seed}/{i}'
      if wrong[i]:
        suite.left_out.append(LeftOut(item_id, wrong[i]))
      else:
        suite.items.append(MonitorItem(
            item_id, name, dataset, seed, str(row.get('template', VARIANT)), prompts[i],
            ' ' + row['correct_answer'], ' ' + row['incorrect_answer']))
    n_shown = len(_drawn(family, n_shots, _demo_set(demos, seed), random.Random(seed)))
    if n_shown < n_shots:
      suite.notes.append(f'{name}/{dataset}/{seed} shows {n_shown} demonstrations, {n_shots} in '
                         'the published suite')


def _split(path: pathlib.Path, family: Family) -> tuple[list[Demo], list[tuple[str, dict]]]:
  """Returns the demonstrations and the (place, test row)s of a file."""
  rows = files.json_lines(path)
  for where, row in rows:
    if row.get('split') not in ('demo', 'test'):
      raise UserError(f'{where}: split={row.get("split")!r} must be demo or test')
    if row['split'] == 'demo':
      files.require(where, row, ('prompt', 'answer'))
      if family.strategy == 'balanced' and row.get('label') not in (0, 1):
        raise UserError(f'{where}: label={row.get("label")!r} of a demonstration must be 0 or 1')
      if not isinstance(row.get('demo_set', 0), int):
        raise UserError(f'{where}: demo_set={row["demo_set"]!r} must be a whole number')
  return ([row for _, row in rows if row['split'] == 'demo'],
          [(where, row) for where, row in rows if row['split'] == 'test'])


def _wrong(row: dict[str, Any]) -> str:
  """Returns why a test row cannot be scored, '' if it can."""
  wrong = files.problem(row, ('prompt', 'correct_answer', 'incorrect_answer'))
  if not wrong and row['correct_answer'] == row['incorrect_answer']:
    return f'both answers are {row["correct_answer"]!r}'
  return wrong


def _demo_set(demos: list[Demo], seed: int) -> list[Demo]:
  """Returns the demonstrations that a seed draws from."""
  if not demos or 'demo_set' not in demos[0]:
    return demos
  n_sets = 1 + max(demo.get('demo_set', 0) for demo in demos)
  return [demo for demo in demos if demo.get('demo_set', 0) == seed % n_sets]


def _drawn(family: Family, n_shots: int, demos: list[Demo], rng: random.Random) -> list[str]:
  """Returns demonstrations as text."""
  drawn = STRATEGIES[family.strategy](demos, n_shots, rng)
  return [f'{demo["prompt"]} {demo["answer"]}' for demo in drawn]


def _prompts(family: Family, n_shots: int, demos: list[Demo], tests: Sequence[dict[str, Any]],
             seed: int) -> Iterator[str]:
  """Yields the prompt of every test row, of those without a prompt too: each may take a draw."""
  rng, pool = random.Random(seed), _demo_set(demos, seed)
  shown = None
  for row in tests:
    if shown is None or family.strategy == 'resampled':
      shown = _drawn(family, n_shots, pool, rng)
    yield family.joiner.join([*shown, str(row.get('prompt', ''))])


def is_published(items: Sequence[MonitorItem]) -> bool:
  """Returns whether items are those of the published suite, whose own score is kept beside ours."""
  return bool(items) and all(
      item.family in FAMILIES and item.dataset in FAMILIES[item.family].shots
      and item.item_id == f'{item.family}/{item.dataset}/{item.seed}/{item.item_id.split("/")[-1]}'
      for item in items)
