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
import tempfile

from absl import flags

from experiments.benchmarks import command_line, shapes
from experiments.benchmarks.estimates import estimate, machine, table
from experiments.benchmarks.rounds import Lacks, interleaved
from experiments.benchmarks.scoring_contenders import CONTENDERS, LENGTH, SUITES, Task, check, start

SIZE = flags.DEFINE_enum('size', '3M', list(shapes.SHAPES), 'parameters of the decoder')
ITEMS = flags.DEFINE_integer('items', 1000, 'items, each with two answers', lower_bound=8)
ANSWER = flags.DEFINE_integer('answer', 1, 'tokens of an answer', lower_bound=1)
BATCH_ROWS = flags.DEFINE_integer('batch_rows', 64, 'monitors.batch_rows', lower_bound=1)
BATCH = flags.DEFINE_integer('batch', 16, "the harness's batch_size", lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 3, 'interleaved rounds', lower_bound=1)
SECONDS = flags.DEFINE_float(
    'seconds', 0.0, 'how long a contender is timed per round, at least once', lower_bound=0)
NAMES = flags.DEFINE_list('contenders', ['modehop', 'one', 'lm_eval'], 'who is measured, by name')


def _compare(task: Task, names: list[str]) -> str:
  """Returns the table of all contenders."""
  facts, measured = interleaved(
      start, {name: (name, task) for name in names}, check, ROUNDS.value, SECONDS.value)
  for name, fact in facts.items():
    if isinstance(fact, Lacks):
      print(f'{name}: skipped. {fact.reason}', flush=True)
  rows, last = [], list(measured)[-1]
  for name, by_suite in measured.items():
    cells = [name]
    for suite, seconds in by_suite.items():
      rate = estimate([task.n_items / s for s in seconds])
      ratio = estimate([b / a for a, b in zip(seconds, measured[last][suite], strict=True)])
      cells += [f'{rate.median:,.1f} ({rate.low:,.1f} to {rate.high:,.1f})', f'{ratio.median:.1f}']
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
