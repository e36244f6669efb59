"""Times the scoring of items beside one text at a time and lm-evaluation-harness, on the CPU.

  python -m experiments.benchmarks.scoring
  python -m experiments.benchmarks.scoring --items=100 --rounds=3 --batch_rows=64

Items with two answers behind prompts of 64 demonstrations, 128 to 512 tokens in all: once the items
of a seed have the same demonstrations ('shared'), once every item has its own ('own'). `modehop` is
the scorer of the monitors; `one` a compiled forward pass of plain JAX over one text at a time,
padded to a multiple of 64 tokens; `lm_eval` the backend for transformers of the harness, called
with tokens, in an interpreter of its own that MODEHOP_TRANSFORMERS_PYTHON names (an extra: pip
install -e '.[interop]'). All have the same float32 weights and must agree on the log-probabilities.
Each contender has a process of its own, blocked while another is timed; rounds are interleaved.
What is prepared once for a whole series of checkpoints (tokens, shapes, compilation) is not timed.
"""

import dataclasses
import os
import pathlib
import random
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks import command_line, shapes
from experiments.benchmarks.estimates import estimate, machine, table
from experiments.benchmarks.rounds import Lacks, Started, Step, interleaved
from research.data.tokenizers import Tokenizer, word_tokenizer
from research.errors import UserError
from research.monitors.items import MonitorItem

SIZE = flags.DEFINE_enum('size', '3M', list(shapes.SHAPES), 'parameters of the decoder')
ITEMS = flags.DEFINE_integer('items', 1000, 'items, each with two answers', lower_bound=8)
ANSWER = flags.DEFINE_integer('answer', 1, 'tokens of an answer', lower_bound=1)
BATCH_ROWS = flags.DEFINE_integer('batch_rows', 64, 'monitors.batch_rows', lower_bound=1)
BATCH = flags.DEFINE_integer('batch', 16, "the harness's batch_size", lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 3, 'interleaved rounds', lower_bound=1)
SECONDS = flags.DEFINE_float(
    'seconds', 0.0, 'how long a contender is timed per round, at least once', lower_bound=0)
NAMES = flags.DEFINE_list('contenders', ['modehop', 'one', 'lm_eval'], 'who is measured, by name')

PYTHON = 'MODEHOP_TRANSFORMERS_PYTHON'
N_WORDS, LENGTH, N_SHOTS = 1000, 512, 64
SHOT_TOKENS = (2, 4, 6, 7)  # of a demonstration, by seed
QUESTION_TOKENS = (8, 48)  # least and most
TOLERANCE = 1e-4  # of engines in float32, absolute or relative


@dataclasses.dataclass(frozen=True)
class Task:
  """What is scored by whom: `n_items` items with answers of `n_answer` tokens.

  `folder` is for files that contenders exchange with programs of theirs.
  """

  shape: shapes.Shape
  n_items: int
  n_answer: int
  batch_rows: int
  batch: int
  folder: str

  def items(self, is_shared: bool) -> list[MonitorItem]:
    """Returns the items, the same in every process."""
    rng = random.Random(0)
    words = lambda n: ' '.join(f'w{rng.randrange(N_WORDS)}' for _ in range(n))
    shown = [words(N_SHOTS * n) for n in SHOT_TOKENS]
    items = []
    for i in range(self.n_items):
      seed = i % len(SHOT_TOKENS)
      context = shown[seed] if is_shared else words(N_SHOTS * SHOT_TOKENS[seed])
      good, short = rng.sample(range(N_WORDS), 2)  # answers differ from the first token on
      items.append(MonitorItem(
          str(i), 'f', 'd', seed, 'v', f'{context} {words(rng.randint(*QUESTION_TOKENS))}',
          *(' ' + f'w{first} {words(self.n_answer - 1)}'.strip() for first in (good, short))))
    return items

  def tokenizer(self) -> Tokenizer:
    return word_tokenizer([f'w{i}' for i in range(N_WORDS)])


SUITES = {'shared': True, 'own': False}
Scored = Callable[[], np.ndarray]  # log-probabilities [items, 2]


def _model(task: Task):
  """Returns the built model and fresh weights by dotted name."""
  from experiments.benchmarks import modehop_step
  built = modehop_step.build(task.shape, 1, 'float32')
  return built, modehop_step.fresh_weights(built)


def _texts(task: Task, is_shared: bool) -> list[tuple[list[int], list[int]]]:
  """Returns (prompt, answer) in tokens, two of each item in order."""
  from research.monitors.encoding import encode_items
  return [(list(text[:encoded.n_prompt]), list(text[encoded.n_prompt:]))
          for encoded in encode_items(task.items(is_shared), task.tokenizer(), LENGTH)
          for text in (encoded.generalizing, encoded.shortcut)]


def _modehop(task: Task) -> dict[str, Scored]:
  from experiments.benchmarks import modehop_step
  from research.monitors.scoring import Scorer
  built, weights = _model(task)
  params = modehop_step.unflatten(built, weights)

  def scored(is_shared: bool) -> Scored:
    scorer = Scorer(task.items(is_shared), task.tokenizer(), built.graphdef, context_length=LENGTH,
                    batch_rows=task.batch_rows, constrain=built.constrain)
    return lambda: np.stack(built.in_mesh(scorer.score)(params), axis=1)
  return {name: scored(is_shared) for name, is_shared in SUITES.items()}


def _one(task: Task) -> dict[str, Scored]:
  import jax

  from experiments.benchmarks import modehop_step
  from models import transformer
  built, weights = _model(task)
  params = modehop_step.unflatten(built, weights)

  @jax.jit
  def logp_LV(params, row_1L):
    model = transformer.apply(built.graphdef, params)
    return jax.nn.log_softmax(model.logits(model(row_1L)[0])[0])

  def scored(is_shared: bool) -> Scored:
    texts = _texts(task, is_shared)

    def run() -> np.ndarray:
      sums = []
      for prompt, answer in texts:
        ids = [*prompt, *answer]
        row_1L = np.zeros((1, -(-len(ids) // 64) * 64), np.int32)
        row_1L[0, :len(ids)] = ids
        logps = np.asarray(logp_LV(params, row_1L))
        sums.append(logps[range(len(prompt) - 1, len(ids) - 1), answer].sum())
      return np.reshape(sums, (-1, 2))
    return run
  return {name: scored(is_shared) for name, is_shared in SUITES.items()}


def _lm_eval(task: Task) -> dict[str, Scored] | Lacks:
  python = os.environ.get(PYTHON)
  if not python:
    return Lacks(f"{PYTHON} names no interpreter that has lm_eval and transformers; they are an "
                 "extra: pip install -e '.[interop]' into an environment of its own")
  from models.interop.checkpoint import exported
  from models.interop.files import write_folder
  built, weights = _model(task)
  folder = pathlib.Path(task.folder)
  write_folder(folder / 'model', *exported(
      built.config.model, lambda leaf, at: weights[leaf][at], np.dtype(np.float32)))
  task.tokenizer().save(folder / 'model' / 'tokenizer.json')
  from experiments.benchmarks import harness_scoring
  for name, is_shared in SUITES.items():
    harness_scoring.write_texts(folder / f'{name}.json', _texts(task, is_shared))
  server = subprocess.Popen(
      [python, harness_scoring.__file__, str(folder), str(task.batch)], text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE)

  def scored(name: str) -> Scored:
    def run() -> np.ndarray:
      print(name, file=server.stdin, flush=True)
      if server.stdout.readline().strip() != name:
        raise UserError(f'{python} {harness_scoring.__file__} ended; its message stands above')
      return np.load(folder / f'{name}.npy')
    return run
  return {name: scored(name) for name in SUITES}


CONTENDERS = {'modehop': _modehop, 'one': _one, 'lm_eval': _lm_eval}


def _start(name: str, task: Task) -> Started | Lacks:
  """Returns a contender's suites; its facts are the log-probabilities of each."""
  runs = CONTENDERS[name](task)
  if isinstance(runs, Lacks):
    return runs
  return Started({suite: Step(run) for suite, run in runs.items()},
                 {suite: run() for suite, run in runs.items()})


def _check(facts: dict[str, Any]) -> None:
  """Prints how far the contenders are apart; raises UserError where that is too far."""
  first, *others = facts
  for name in others:
    for suite, expected in facts[first].items():
      apart = (np.abs(facts[name][suite] - expected) / np.maximum(1, np.abs(expected))).max()
      print(f'{suite}: {name} and {first} are {apart:.1e} apart at most', flush=True)
      if not apart <= TOLERANCE:
        raise UserError(f'{suite}: {name} is {apart:.1e} from {first}, more than {TOLERANCE}')


def _compare(task: Task, names: list[str]) -> str:
  """Returns the table of all contenders."""
  facts, measured = interleaved(
      _start, {name: (name, task) for name in names}, _check, ROUNDS.value, SECONDS.value)
  for name, fact in facts.items():
    if isinstance(fact, Lacks):
      print(f'{name}: skipped. {fact.reason}', flush=True)
  rows, last = [], list(measured)[-1]
  for name, by_suite in measured.items():
    cells = [name]
    for suite, seconds in by_suite.items():
      rate = estimate([task.n_items / s for s in seconds])
      ratio = estimate([b / a for a, b in zip(seconds, measured[last][suite], strict=True)])
      cells += [f'{rate.median:,.0f} ({rate.low:,.0f} to {rate.high:,.0f})', f'{ratio.median:.1f}']
    rows.append(cells)
  header = [f'{SIZE.value}, {task.n_items} items']
  return table(header + [cell for suite in SUITES for cell in (
      f'{suite}: items/s', f'x {last}')], rows)


def main() -> None:
  names = command_line.chosen(NAMES, CONTENDERS)
  print(machine(), flush=True)
  shape = dataclasses.replace(shapes.SHAPES[SIZE.value], length=LENGTH, vocab_size=1024)
  with tempfile.TemporaryDirectory() as folder:
    task = Task(shape, ITEMS.value, ANSWER.value, BATCH_ROWS.value, BATCH.value, folder)
    print(f'\n{_compare(task, names)}', flush=True)


if __name__ == '__main__':
  command_line.run(main)
