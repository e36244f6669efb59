"""Who scores items: the monitors' scorer, one text at a time, lm-evaluation-harness."""

import dataclasses
import os
import pathlib
import random
import subprocess
from collections.abc import Callable
from typing import Any

import numpy as np

from experiments.benchmarks import shapes
from experiments.benchmarks.rounds import Lacks, Started, Step
from research.data.tokenizers import Tokenizer, word_tokenizer
from research.errors import UserError
from research.monitors.items import MonitorItem

PYTHON = 'MODEHOP_TRANSFORMERS_PYTHON'
N_WORDS, LENGTH, N_SHOTS = 1000, 512, 64
SHOT_TOKENS = (2, 4, 6, 7)  # of a demonstration, by seed
QUESTION_TOKENS = (8, 48)  # least and most
TOLERANCE = 1e-4  # of engines in float32, absolute or relative
_NEEDED = ('lm_eval', 'torch', 'transformers', 'accelerate')
_FIND = ('import importlib.util, sys\n'
         'print(*[name for name in sys.argv[1:] if not importlib.util.find_spec(name)])')


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


def texts_of(task: Task, is_shared: bool) -> list[tuple[list[int], list[int]]]:
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
    texts = texts_of(task, is_shared)

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


def _check_interpreter(python: str) -> None:
  """Raises UserError for a program that does not run, or lacks packages that the harness needs."""
  try:
    asked = subprocess.run([python, '-c', _FIND, *_NEEDED], capture_output=True, text=True,
                           check=False)
  except OSError as error:
    raise UserError(f'{PYTHON}={python} cannot be run: {error.strerror}') from error
  if asked.returncode:
    raise UserError(f'{PYTHON}={python} is no Python that works: it ended with code '
                    f'{asked.returncode}')
  if missing := asked.stdout.split():
    raise UserError(f"{PYTHON}={python} has no {', '.join(missing)}; pip install -e '.[interop]' "
                    'into its environment')


def _lm_eval(task: Task) -> dict[str, Scored] | Lacks:
  python = os.environ.get(PYTHON)
  if not python:
    return Lacks(f"{PYTHON} names no interpreter that has lm_eval and transformers; they are an "
                 "extra: pip install -e '.[interop]' into an environment of its own")
  _check_interpreter(python)
  from models.interop.checkpoint import exported
  from models.interop.files import write_folder
  built, weights = _model(task)
  folder = pathlib.Path(task.folder)
  write_folder(folder / 'model', *exported(
      built.config.model, lambda leaf, at: weights[leaf][at], np.dtype(np.float32)))
  task.tokenizer().save(folder / 'model' / 'tokenizer.json')
  from experiments.benchmarks import harness_scoring
  for name, is_shared in SUITES.items():
    harness_scoring.write_texts(folder / f'{name}.json', texts_of(task, is_shared))
  server = subprocess.Popen(
      [python, harness_scoring.__file__, str(folder), str(task.batch)], text=True,
      stdin=subprocess.PIPE, stdout=subprocess.PIPE)

  def scored(name: str) -> Scored:
    def run() -> np.ndarray:
      try:
        print(name, file=server.stdin, flush=True)
        answer = server.stdout.readline().strip()
      except BrokenPipeError:  # It ended before it was asked.
        answer = ''
      if answer != name:
        raise UserError(f'{python} {harness_scoring.__file__} ended; its message stands above')
      return np.load(folder / f'{name}.npy')
    return run
  return {name: scored(name) for name in SUITES}


CONTENDERS = {'modehop': _modehop, 'one': _one, 'lm_eval': _lm_eval}


def start(name: str, task: Task) -> Started | Lacks:
  """Returns a contender's suites; its facts are the log-probabilities of each."""
  runs = CONTENDERS[name](task)
  if isinstance(runs, Lacks):
    return runs
  return Started({suite: Step(run) for suite, run in runs.items()},
                 {suite: run() for suite, run in runs.items()})


def check(facts: dict[str, Any]) -> None:
  """Prints how far the contenders are apart; raises UserError where that is too far."""
  first, *others = facts
  for name in others:
    for suite, expected in facts[first].items():
      apart = (np.abs(facts[name][suite] - expected) / np.maximum(1, np.abs(expected))).max()
      print(f'{suite}: {name} and {first} are {apart:.1e} apart at most', flush=True)
      if not apart <= TOLERANCE:
        raise UserError(f'{suite}: {name} is {apart:.1e} from {first}, more than {TOLERANCE}')
