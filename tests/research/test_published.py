"""The published suite: prompts, bad input, the hub.

Witness of the prompts: hashes of those that the assembling of the public runner (GDsuite,
run_eval.py) made of the same files.
"""

import hashlib
import os
import pathlib
import subprocess
import sys

import pytest
import tokenizers as hf

from research.data import tokenizers
from research.errors import UserError
from research.evals import persona
from research.monitors import published
from research.monitors.published_score import encode_published
from research.monitors.suite import described, scorable
from tests.research import published_folder as made
from tests.research.hub_server import Hub

ROOT = pathlib.Path(__file__).resolve().parents[2]
BYTES = tokenizers.byte_tokenizer()
PROMPTS = {
    'flipped/imdb': (8, '360ca8ddf017a74c'),
    'repetitive/letter_counting': (12, '5f69e5c3bccc324c'),
    'repetitive/algebra/v2fmt': (1, '8ce22d92041aad3d'),
    'successive/number_words': (8, 'b338082f85250a0f'),
    'truthy/surprising_truth': (4, '027dd49e37e6e613'),
    'intuitive/crt': (2, '1e463ce11873464c')}
PERSONA_PROMPTS = (8, '0fdb9464457764c9')


def told(prompts: list[str]) -> tuple[int, str]:
  """Returns how many prompts there are and the beginning of their hash."""
  return len(prompts), hashlib.sha256('\0'.join(prompts).encode()).hexdigest()[:16]


def of(suite: published.Suite, name: str) -> list:
  return [item for item in suite.items if f'{item.family}/{item.dataset}' == name]


def test_prompts_are_those_of_the_public_runner(tmp_path):
  suite = published.read(str(made.write(tmp_path / 'suite')))
  assert {name: told([item.prompt for item in of(suite, name)]) for name in PROMPTS} == PROMPTS
  assert len(suite.items) == sum(n for n, _ in PROMPTS.values())
  questions, left_out = persona.read(str(tmp_path / 'suite'))
  assert told([question.prompt for question in questions]) == PERSONA_PROMPTS and not left_out
  assert published.is_published(suite.items) and not suite.left_out


def test_strategies(tmp_path):
  suite = published.read(str(made.write(tmp_path / 'suite')))
  for item in of(suite, 'flipped/imdb'):
    *shown, asked = item.prompt.split('\n\n')
    assert len(shown) == len(set(shown)) == 24 and asked in ('dance superb ;', 'dance awful ;')
    assert sum(line.endswith(' good') for line in shown) == 12
    assert all(line.endswith(' bad') == (line.split()[1] in made.GOOD) for line in shown)
  resampled = of(suite, 'repetitive/letter_counting')
  assert len({tuple(item.prompt.split('\n')[:4]) for item in resampled}) == 12
  assert all(item.prompt.count(' = 12\n') == 4 for item in resampled)
  for item in of(suite, 'successive/number_words'):
    answers = [int(line.split()[-1]) for line in item.prompt.split('\n')[:-1]]
    assert answers == list(range(item.seed % 3, item.seed % 3 + 10))
  first, second = of(suite, 'intuitive/crt')
  assert (first.variant, second.variant, first.prompt) == ('one', '2', '30 + 4 =')
  assert (first.generalizing, first.shortcut, first.seed) == (' 34', ' 33', 0)
  assert {item.seed for item in resampled} == {0, 1, 2, 3}


def test_bad_test_rows_are_listed_and_change_no_other_prompt(tmp_path):
  rows = made.files()
  good = rows['repetitive_answer/letter_counting']
  bad = [{'split': 'test', 'prompt': 'x ='}, made.ask('a =', '1', '1'), made.ask('b =', ' ', '1'),
         made.ask('c =', 3, '1')]
  rows['repetitive_answer/letter_counting'] = good + bad
  suite = published.read(str(made.write(tmp_path / 'suite', rows)))
  assert [out for out in suite.left_out if '/1/' in out.item_id] == [
      ('repetitive/letter_counting/1/3',
       'has no field correct_answer and no field incorrect_answer'),
      ('repetitive/letter_counting/1/4', "both answers are '1'"),
      ('repetitive/letter_counting/1/5', 'correct_answer is empty'),
      ('repetitive/letter_counting/1/6', 'correct_answer=3 is not text')]
  assert len(suite.left_out) == 16
  # Seed 0 draws first for its own rows, so the good rows before the bad ones keep their prompts.
  assert told([i.prompt for i in of(suite, 'repetitive/letter_counting')]) == PROMPTS[
      'repetitive/letter_counting']
  lines = list(described(suite))
  assert lines[0].startswith('monitors: 35 of 51 items are scored: flipped/imdb 8, ')
  assert any(line.endswith("both answers are '1': " + ', '.join(
      f'repetitive/letter_counting/{seed}/4' for seed in range(4))) for line in lines)
  assert any('16 published datasets are not there: flipped_answer/sst2, ' in x for x in lines)


def test_fewer_demonstrations_and_unknown_files_are_said(tmp_path):
  rows = made.files()
  rows['truthy_answer/surprising_truth'] = rows['truthy_answer/surprising_truth'][-6:]
  rows['truthy_answer/another'] = rows['intuitive_answer/crt']
  suite = published.read(str(made.write(tmp_path / 'suite', rows)))
  assert 'truthy/surprising_truth/3 shows 5 demonstrations, 8 in the published suite' in suite.notes
  assert 'truthy_answer/another.jsonl is no published dataset and is not scored' in suite.notes


def test_what_a_model_cannot_score_is_listed(tmp_path):
  suite = published.read(str(made.write(tmp_path / 'suite')))
  long = {item.item_id for item in suite.items
          if len((item.prompt + item.generalizing).encode()) - 1 > 96
          or len((item.prompt + item.shortcut).encode()) - 1 > 96}
  kept = scorable(suite, BYTES, 96, None, encode_published)
  assert {out.item_id for out in kept.left_out} == long and 0 < len(long) < len(suite.items)
  assert {item.item_id for item in kept.items} == {i.item_id for i in suite.items} - long
  assert {out.reason for out in kept.left_out} == {
      'prompt and answer are longer than model.context_length=96'}
  words = tokenizers.word_tokenizer(['+', '=', *map(str, range(60))])
  words.backend.normalizer = hf.normalizers.Replace('~', '')  # nothing is left of such an answer
  rows = {'intuitive_answer/crt': [made.ask('3 + 4 =', '7', '8'), made.ask('soup', '7', '8'),
                                   made.ask('3 + 4 =', '7', '~')]}
  odd = scorable(published.read(str(made.write(tmp_path / 'odd', rows))), words, 96, None,
                 encode_published)
  assert [item.item_id for item in odd.items] == ['intuitive/crt/0/0']
  (unknown, unknown_why), nothing = odd.left_out
  assert unknown == 'intuitive/crt/0/1' and 'cannot be tokenized' in unknown_why
  assert nothing == ('intuitive/crt/0/2', 'an answer adds no token to its prompt')


@pytest.mark.parametrize('change, words', [
    ({'split': 'dev'}, "split='dev' must be demo or test"),
    ({'answer': ''}, 'this demonstration answer is empty'),
    ({'label': 'bad'}, "label='bad' of a demonstration must be 0 or 1")])
def test_bad_demonstrations_are_refused_with_their_line(tmp_path, change, words):
  rows = made.files()
  rows['flipped_answer/imdb'][3] = rows['flipped_answer/imdb'][3] | change
  with pytest.raises(UserError, match=f'imdb.jsonl:4: .*{words}'):
    published.read(str(made.write(tmp_path / 'suite', rows)))


def test_bad_files_and_folders(tmp_path):
  folder = made.write(tmp_path / 'suite')
  (folder / 'intuitive_answer/crt.jsonl').write_text('{"split": "te')
  with pytest.raises(UserError, match='crt.jsonl:1 is not valid JSON'):
    published.read(str(folder))
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match='empty has none of the folders flipped_answer, '):
    published.read(str(tmp_path / 'empty'))
  for name in ('microwrld', './nowhere', 'a/b/c'):
    with pytest.raises(UserError, match=f"'{name}' is neither a folder that exists nor a dataset"):
      published.read(name)
  rows = {'intuitive_answer/crt': [made.ask('3 =', '7', '7')]}
  with pytest.raises(UserError, match="no item that can be scored; intuitive/crt/0/0: both"):
    published.read(str(made.write(tmp_path / 'none', rows)))


READ = '''
import sys
from research.errors import UserError
from research.monitors import published
for location in sys.argv[1:]:
  try:
    print(len(published.read(location).items))
  except UserError as error:
    print(f'error: {error}')
'''


def read_hub(hub: Hub, cache: pathlib.Path, *locations: str) -> list[str]:
  """Returns what a program of its own prints; huggingface_hub reads its settings once."""
  result = subprocess.run(
      [sys.executable, '-c', READ, *locations], cwd=ROOT, text=True, capture_output=True,
      check=False, env={**os.environ, 'HF_ENDPOINT': hub.url, 'HF_HOME': str(cache),
                        'HF_HUB_DISABLE_PROGRESS_BARS': '1', 'HF_TOKEN': ''})
  assert result.returncode == 0, result.stderr[-3000:]
  return result.stdout.splitlines()


def test_a_dataset_of_the_hub_is_fetched_once_and_known_without_a_network(tmp_path):
  made.write(tmp_path / 'hub/main')
  hub = Hub(tmp_path / 'hub', 'dataset')
  assert read_hub(hub, tmp_path / 'cache', 'owner/dataset', 'owner/hidden') == [
      '35', 'error: owner/hidden is no public dataset of huggingface.co, nor one that this account '
      'may read; check the name, or log in with `hf auth login`']
  fetched = [line for line in hub.asked if line.startswith('GET') and 'resolve' in line]
  assert len(fetched) == len(made.files())
  hub.stop()
  assert read_hub(hub, tmp_path / 'cache', 'owner/dataset', 'owner/other') == [
      '35', 'error: dataset owner/other is not in the cache and huggingface.co cannot be reached; '
      'go online once']
