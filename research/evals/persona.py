"""Multi-hop persona questions of the published suite: answers are sampled and matched."""

import itertools
import json
import pathlib
import random
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from models.sampling import Sampling
from research.errors import UserError
from research.evals.samples import chosen_step, fitting, sample_run
from research.monitors import published_files as files
from research.monitors.published import N_SEEDS, PERSONA
from research.monitors.items import LeftOut
from research.run_dir import RunDir, write_whole
from research.training.logs import duration, read_rows

# As in the public runner (GDsuite, run_eval.py and config.yaml), as read.
JOINER = '\n\n'
STOP = '\nQ:'  # begins the next question; the runner's other stop text has it within
N_SAMPLES = 100
MAX_TOKENS = 300
TEMPERATURE = 1.0
_FIELDS = ('question', 'expected_answer_regex')


class Question(NamedTuple):
  """One question after all facts of a persona, in the order of a seed.

  Attributes:
    persona, seed, question_id, category: which.
    prompt: facts and question.
    regex: found in a right answer, whatever the case of its letters.
  """

  persona: str
  seed: int
  question_id: str
  category: str
  prompt: str
  regex: str

  @property
  def item_id(self) -> str:
    return f'persona/{self.persona}/{self.seed}/{self.question_id}'


class Result(NamedTuple):
  """How often a question was answered rightly; a row of persona.jsonl."""

  step: int
  persona: str
  seed: int
  question_id: str
  category: str
  n_samples: int
  max_tokens: int
  temperature: float
  sampling_seed: int
  n_matches: int


def read(location: str) -> tuple[list[Question], list[LeftOut]]:
  """Returns the questions of a folder or a dataset of the hub, and those that cannot be asked.

  Facts are shuffled by Python's random.Random(seed) for each of four seeds, all of them shown.

  Raises:
    UserError: there are none, or a fact lacks a message: then every prompt would differ.
  """
  root = files.find(location, [PERSONA]) / PERSONA
  questions, left_out = [], []
  for folder in sorted(path for path in root.iterdir() if path.is_dir()):
    facts, asked = _facts(folder / 'facts.jsonl'), _questions(folder / 'test_questions.json')
    seen: set[str] = set()
    usable = []
    for i, row in enumerate(asked):
      name = str(row.get('id', i)) if isinstance(row, dict) else str(i)
      wrong = _wrong(row) or (f'id={name!r} occurs twice' if name in seen else '')
      if wrong:
        left_out.append(LeftOut(f'persona/{folder.name}/*/{name}', wrong))
      else:
        usable.append(row)
      seen.add(name)
    for seed in range(N_SEEDS):
      shown = list(facts)
      random.Random(seed).shuffle(shown)
      questions += [
          Question(folder.name, seed, str(row['id']), str(row.get('category', 'fact')),
                   JOINER.join([*shown, f'Q: {row["question"]}\nA:']), row['expected_answer_regex'])
          for row in usable]
  if not questions:
    raise UserError(f'{root} has no question that can be asked; '
                    + '; '.join(map(': '.join, left_out[:3])))
  return questions, left_out


def _facts(path: pathlib.Path) -> list[str]:
  """Returns the facts as question and answer."""
  if not path.is_file():
    raise UserError(f'{path} does not exist')
  facts = []
  for where, row in files.json_lines(path):
    said: dict[str, Any] = {}
    for message in row.get('messages', []):
      if not isinstance(message, dict):
        raise UserError(f'{where}: a message is {message!r}, not an object of role and content')
      said.setdefault(message.get('role'), message.get('content'))
    files.require(where, said, ('user', 'assistant'))
    facts.append(f'Q: {said["user"]}\nA: {said["assistant"]}')
  return facts


def _questions(path: pathlib.Path) -> list[Any]:
  """Returns the rows of a file of questions."""
  if not path.is_file():
    raise UserError(f'{path} does not exist')
  try:
    rows = json.loads(path.read_text(encoding='utf-8'))
  except json.JSONDecodeError as error:
    raise UserError(f'{path} is not valid JSON: {error}') from error
  if not isinstance(rows, list):
    raise UserError(f'{path} is not a list of questions')
  return rows


def _wrong(row: Any) -> str:
  """Returns why a question cannot be asked, '' if it can."""
  if not isinstance(row, dict):
    return 'is not a JSON object'
  if 'id' not in row:
    return 'has no field id'
  if wrong := files.problem(row, _FIELDS):
    return wrong
  try:
    re.compile(row['expected_answer_regex'])
  except re.error as error:
    return (f'expected_answer_regex={row["expected_answer_regex"]!r} is no regular expression: '
            f'{error}')
  return ''


def is_match(text: str, regex: str) -> bool:
  """Returns whether a sampled text, cut where the next question begins, answers rightly."""
  return bool(re.search(regex, text.partition(STOP)[0].strip(), re.IGNORECASE))


def ask(location: str, run_dir: RunDir, *, step: int = -1, n_samples: int = N_SAMPLES,
        max_tokens: int = MAX_TOKENS, temperature: float = TEMPERATURE, seed: int = 0,
        say: Callable[[str], None] = print) -> list[Result]:
  """Returns how often each question is answered rightly by a snapshot of a run.

  Results are added to persona.jsonl of the run one by one; repeating the call goes on after the
  last one. Sampled texts are cut where a next question begins, as generation is stopped there in
  the public runner; here it goes on to the limit, which does not change the text before.

  Args:
    location: of the suite, a folder or a dataset of the hub.
    run_dir: of the run.
    step: of the snapshot, -1 for the newest.
    n_samples: texts per question and seed.
    max_tokens: length of a text, at most.
    temperature: of sampling.
    seed: of sampling.
    say: takes a line of progress.

  Raises:
    UserError: no such suite, run or snapshot, or no question can be asked.
  """
  questions, left_out = read(location)
  if not run_dir.manifest_json.exists():
    raise UserError(f'--run_dir={run_dir.whole} is not the directory of a run: it has no '
                    'manifest.json')
  n_all = len(questions) + len(left_out)
  questions, too_long = fitting(questions, run_dir, max_tokens)
  for question_id, reason in (*left_out, *too_long):
    say(f'left out, {question_id}: {reason}')
  say(f'{len(questions)} of {n_all} questions are asked, {n_samples} times each')
  if not questions:
    raise UserError(f'no question of {location} fits into the context of {run_dir.whole}')
  step = chosen_step(run_dir, step)
  settings = (n_samples, max_tokens, temperature, seed)
  rows = [Result(**row) for row in read_rows(run_dir.persona_jsonl)]
  known = {row[:-1]: row for row in rows}  # all but the answer
  keys = [(step, q.persona, q.seed, q.question_id, q.category, *settings) for q in questions]
  pending = [(q, key) for q, key in zip(questions, keys, strict=True) if key not in known]
  samples = sample_run(run_dir, [q.prompt for q, _ in pending], step=step, n_samples=n_samples,
                       max_tokens=max_tokens, sampling=Sampling(temperature), seed=seed)
  began = time.perf_counter()
  for i, (question, key) in enumerate(pending, start=1):
    n_matches = sum(is_match(sample.text, question.regex)
                    for sample in itertools.islice(samples, n_samples))
    known[key] = Result(*key, n_matches)
    rows.append(known[key])
    write_whole(run_dir.persona_jsonl, ''.join(json.dumps(r._asdict()) + '\n' for r in rows))
    left = (time.perf_counter() - began) / i * (len(pending) - i)
    say(f'[{i}/{len(pending)}] {question.item_id}: {n_matches} of {n_samples}, '
        f'{duration(left)} left')
  return [known[key] for key in keys]


def rates(results: Sequence[Result]) -> dict[tuple[str, str], float]:
  """Returns the share of right answers by (persona, category), questions weighing the same."""
  shares: dict[tuple[str, str], list[float]] = {}
  for result in results:
    shares.setdefault((result.persona, result.category), []).append(
        result.n_matches / result.n_samples)
  return {key: sum(values) / len(values) for key, values in shares.items()}
