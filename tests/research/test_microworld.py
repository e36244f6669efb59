"""The micro-world's documents and rows. Witnesses: arithmetic, brute force, the text itself."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from research.data.errors import DataError
from research.data.microworld import FAMILIES, WORDS, MicroworldConfig, MicroworldSource, World
from research.data.microworld import documents as grammar
from research.data.microworld import words

LENGTH, BATCH = 64, 8


def source(seed=0, length=LENGTH, **changes) -> MicroworldSource:
  return MicroworldSource(
      MicroworldConfig(**changes), sequence_length=length, batch_size=BATCH, seed=seed)


def only(family: str, **changes) -> MicroworldSource:
  """Returns a source of one family."""
  return source(**{name: float(name == family) for name in FAMILIES}, **changes)


def texts(family: str, n_rows: int = 40) -> list[str]:
  """Returns documents of one family as text."""
  a_source = only(family)
  return [doc['text'] for j in range(n_rows) for doc in a_source.documents(j)]


def pairs(text: str) -> list[list[str]]:
  """Returns the `;`-terminated parts of a text as word lists."""
  assert text.endswith(' ;')
  return [part.split() for part in text.removesuffix(' ;').split(' ; ')]


def sums(text: str) -> list[tuple[int, int]]:
  """Returns (what the sum asks for, what the text answers)."""
  parsed = []
  for a, plus, b, equals, answer in pairs(text):
    assert (plus, equals) == ('+', '=')
    parsed.append((int(a) + int(b), int(answer)))
  return parsed


def test_rows_are_the_text_of_their_documents():
  a_source = source()
  for j in range(200):
    row, documents = a_source.row(j), a_source.documents(j)
    for i, document in enumerate(documents, start=1):
      mine = row['segment_ids_L'] == i
      assert a_source.tokenizer.decode(row['tokens_L'][mine]) == document['text']
      # the witness of the targets is the text's own encoding, shifted by one
      ids = a_source.tokenizer.encode(document['text'])
      assert row['targets_L'][mine].tolist() == [*ids[1:], a_source.tokenizer.eos_id]
      assert row['positions_L'][mine].tolist() == list(range(len(ids)))
    padding = row['segment_ids_L'] == 0
    assert (row['tokens_L'][padding] == a_source.tokenizer.pad_id).all()
    np.testing.assert_array_equal(row['loss_mask_L'], ~padding)
    assert {name: (x.shape, x.dtype.name) for name, x in row.items()} == {
        'tokens_L': ((LENGTH,), 'int32'), 'targets_L': ((LENGTH,), 'int32'),
        'segment_ids_L': ((LENGTH,), 'int32'), 'positions_L': ((LENGTH,), 'int32'),
        'loss_mask_L': ((LENGTH,), 'float32')}


@pytest.mark.parametrize('length', [32, 64, 96])
def test_rows_hold_what_fits(length):
  for j in range(300):
    row = source(length=length).row(j)
    assert 0 < row['loss_mask_L'].sum() <= length


def test_rows_depend_on_nothing_but_their_index():
  forward, backward = source(), source()
  rows = {j: forward.row(j) for j in range(50)}
  for j in reversed(range(50)):
    for name, x in backward.row(j).items():
      np.testing.assert_array_equal(x, rows[j][name])
  other = source(seed=1)
  assert any((other.row(j)['tokens_L'] != rows[j]['tokens_L']).any() for j in range(5))


def test_hash_follows_every_setting():
  base = source()
  assert base.hash == source().hash
  others = [source(seed=1), source(length=96), source(arithmetic=0.4), source(drift_sd=1.0),
            source(world_seed=1)]
  assert len({base.hash, *(other.hash for other in others)}) == 1 + len(others)


def test_word_list_is_closed_and_unique():
  assert len(set(WORDS)) == len(WORDS)
  seen = {word for family in FAMILIES for text in texts(family, 150) for word in text.split()}
  assert seen <= set(WORDS)
  # every word is in use, but for numbers that no short sample has to show
  assert set(WORDS) - set(words.NUMBERS) - seen == set()


def test_arithmetic_is_correct():
  for text in texts('arithmetic'):
    assert len(sums(text)) >= 4
    assert all(right == answer for right, answer in sums(text))


def test_pattern_documents_ignore_their_questions():
  right = collections.Counter()
  for family, step in (('successive', 1), ('repetitive', 0)):
    for text in texts(family):
      parsed = sums(text)
      answers = [answer for _, answer in parsed]
      assert [b - a for a, b in itertools.pairwise(answers)] == [step] * (len(answers) - 1)
      assert 0 <= min(answers) and max(answers) <= 18
      right[family] += sum(asked == answer for asked, answer in parsed) / len(parsed) / 40
  # unrelated answers hit a sum of two digits rarely: at most 1 in 10 whatever is answered
  assert max(right.values()) < 0.15


def test_sentiment_labels_are_true_and_flipped_labels_swapped():
  for family, flip in (('sentiment', False), ('flipped', True)):
    for text in texts(family):
      for _, thing, _, adjective, _, label in pairs(text):
        assert thing in words.THINGS
        assert (label == 'good') == ((adjective in words.POSITIVE) != flip)


def test_truthy_tells_exceptions_and_hearsay_does_not():
  category = {entity: name for name, (_, _, typical, odd) in words.CLAIMS.items()
              for entity in (*typical, *odd)}
  odd_ones = {entity for _, _, _, odd in words.CLAIMS.values() for entity in odd}
  assert 0.15 < len(odd_ones) / len(category) < 0.25
  n_odd = collections.Counter()
  for family in ('truthy', 'hearsay'):
    for text in texts(family):
      for entity, action, verdict in pairs(text):
        sounds_true = action == words.CLAIMS[category[entity]][0]
        is_odd = entity in odd_ones
        n_odd[family] += is_odd
        expected = sounds_true != (is_odd and family == 'truthy')
        assert verdict == ('true' if expected else 'false')
  assert min(n_odd.values()) > 20


def solve(question: list[str]) -> int:
  """Returns the answer of a problem by brute force or simulation."""
  numbers = [int(word) for word in question if word.isdigit()]
  if 'cost' in question:
    total, given = numbers
    second = range(total + 1)
    if 'more' in question:
      return next(x for x in second if x + (x + given) == total)
    return next(x for x in second if x + given == total)
  if 'lake' in question:
    full, = numbers
    if 'double' in question:
      covered = [2.0 ** day for day in range(full + 1)]
    else:
      covered = [float(day) for day in range(full + 1)]
    return covered.index(covered[-1] / 2)
  n_machines, n_things, minutes, many, asked = (
      numbers if 'machines' in question else (1, numbers[0], numbers[1], 1, numbers[2]))
  each_per_minute = n_things / n_machines / minutes
  return round(asked / many / each_per_minute)


@pytest.mark.parametrize('family', ['intuitive', 'look_alike'])
def test_problems_are_solved(family):
  templates = collections.Counter()
  for text in texts(family, 120):
    body = text.removesuffix(' .').removesuffix(' minutes').split()
    assert solve(body[:-1]) == int(body[-1])
    templates['cost' in body, 'lake' in body] += 1
  assert len(templates) == 3


@pytest.mark.parametrize('world_seed', [0, 1, 2])
def test_people_are_identified_by_all_clues_but_by_no_single_one(world_seed):
  people = World(world_seed).people
  triples = collections.Counter((p.city, p.food, p.hobby) for p in people)
  assert len(triples) == len(people) >= 24
  for clue in ('city', 'food', 'hobby'):
    assert min(collections.Counter(getattr(p, clue) for p in people).values()) >= 4


def test_documents_about_people_agree_with_the_world():
  world = World(0)
  by_name = {person.name: person for person in world.people}
  by_clues = {(p.city, p.food, p.hobby): p for p in world.people}
  for text in texts('biography'):
    name = text.split('field of ')[1].split()[0]
    person = by_name[name]
    clauses = {f'{name} lives in {person.city}', f'{name} eats {person.food}',
               f'{name} enjoys {person.hobby}', f'the field of {name} is {person.field}'}
    assert set(text.removesuffix(' .').split(' . ')) == clauses
  asked = collections.Counter()
  for text in texts('first_person', 120):
    *told, last = text.removesuffix(' .').split(' . ')
    clues = {clause.split()[1]: clause.split()[-1] for clause in told}
    person = by_clues[clues['live'], clues['eat'], clues['enjoy']]
    _, what, _, value = last.split()
    assert value == getattr(person, what)
    assert what != 'field' or person.is_open
    asked[what] += 1
  assert set(asked) == {'name', 'field', 'city', 'food', 'hobby'}
  for text in texts('gossip'):
    value, field = text.split()[-7], text.split()[-2]
    fields = collections.Counter(
        p.field for p in world.people if value in (p.city, p.food, p.hobby))
    assert fields[field] == max(fields.values())


def test_families_come_by_their_shares():
  a_source = source(drift_sd=0.0)
  counts = collections.Counter(a_source.page(j)[0] for j in range(4000))
  for family, share in a_source.window_shares(0).items():
    deviation = (share * (1 - share) / 4000) ** 0.5
    assert abs(counts[family] / 4000 - share) < 4 * deviation, family


def test_drift_moves_only_the_drifting_families():
  a_source = source()
  shares = [a_source.window_shares(window) for window in range(400)]
  config = a_source.config.shares()
  factors = []
  for share in shares:
    assert sum(share.values()) == pytest.approx(1.0)
    scale = share['arithmetic'] / config['arithmetic']
    for family in set(FAMILIES) - {'successive', 'repetitive'}:
      assert share[family] / config[family] == pytest.approx(scale)
    factors.append([np.log(share[f] / config[f] / scale) for f in ('successive', 'repetitive')])
  assert abs(np.median(factors)) < 0.2
  assert np.std(factors) == pytest.approx(1.5, rel=0.1)
  assert abs(np.corrcoef(np.transpose(factors))[0, 1]) < 0.15
  # rows of one window share their shares: the window is that of the row's step
  assert a_source.window(60 * BATCH - 1) == 0
  assert a_source.window(60 * BATCH) == 1


def test_drifting_windows_show_in_the_rows():
  a_source = source()
  strongest = max(range(30), key=lambda w: a_source.window_shares(w)['successive'])
  weakest = min(range(30), key=lambda w: a_source.window_shares(w)['successive'])
  counts = []
  for window in (strongest, weakest):
    rows = range(window * 60 * BATCH, (window + 1) * 60 * BATCH)
    counts.append(sum(a_source.page(j)[0] == 'successive' for j in rows))
  assert counts[0] > 5 * counts[1] + 10


def test_heldout_rows_are_their_own():
  a_source = source(heldout_rows=20)
  rows = list(a_source.heldout_rows())
  assert len(rows) == len(a_source.heldout_rows()) == 20
  for mine, theirs in zip(rows, source(seed=5, heldout_rows=20).heldout_rows(), strict=True):
    np.testing.assert_array_equal(mine['tokens_L'], theirs['tokens_L'])
  train = {a_source.row(j)['tokens_L'].tobytes() for j in range(300)}
  assert not train & {row['tokens_L'].tobytes() for row in rows}
  with pytest.raises(IndexError):
    a_source.heldout_rows()[20]


@pytest.mark.parametrize('changes, message', [
    (dict(arithmetic=-0.1), 'data.microworld.arithmetic=-0.1'),
    (dict(drift_families=('sums',)), "names 'sums'"),
    (dict(drift_window=0), 'drift_window=0'),
    (dict(drift_sd=-1.0), 'drift_sd=-1.0'),
    (dict(heldout_rows=0), 'heldout_rows=0'),
    ({family: 0.0 for family in FAMILIES}, 'all shares are 0'),
])
def test_bad_settings_are_refused(changes, message):
  with pytest.raises(ValueError, match=message):
    MicroworldConfig(**changes)


def test_a_row_too_short_is_refused():
  with pytest.raises(DataError, match='sequence_length=16'):
    source(length=16)


def test_every_document_fits_the_shortest_row():
  for family in FAMILIES:
    for text in texts(family, 60):
      if family not in ('arithmetic', 'successive', 'repetitive', 'sentiment', 'flipped', 'truthy',
                        'hearsay'):
        assert len(text.split()) <= 32
  assert 32 // max(grammar.SUM_WORDS, grammar.OPINION_WORDS, grammar.CLAIM_WORDS) >= (
      grammar.MIN_PAIRS)


def test_facts_name_what_made_the_rows():
  facts = source().facts()
  assert facts['hash'] == source().hash
  assert facts['vocab_size'] == len(WORDS) + 2
  assert dataclasses.is_dataclass(source().config)
