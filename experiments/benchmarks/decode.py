"""Times generation beside recomputation without a cache and PyTorch with one, on the CPU.

  python -m experiments.benchmarks.decode
  python -m experiments.benchmarks.decode --size=10M --rows=8 --prompt=256 --tokens=128

Greedy generation in float32 after random prompts of equal length: modehop's `generate` (one
compiled loop), `recompute` (modehop's compiled forward pass over the whole row for every token) and
`torch` (an eager PyTorch loop over a key-value cache allocated once, an extra: pip install -e
'.[bench]'). All have the same weights and must write the same tokens. Each contender has a process
of its own, blocked while another is timed; rounds are interleaved.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks import command_line, shapes
from experiments.benchmarks.contenders import measurable
from experiments.benchmarks.estimates import estimate, machine, table
from experiments.benchmarks.rounds import Started, Step, interleaved
from research.errors import UserError

SIZE = flags.DEFINE_enum('size', '1M', list(shapes.SHAPES), 'parameters of the decoder')
ROWS = flags.DEFINE_integer('rows', 8, 'rows generated together', lower_bound=1)
PROMPT = flags.DEFINE_integer('prompt', 128, 'tokens of a prompt', lower_bound=1)
TOKENS = flags.DEFINE_integer('tokens', 128, 'tokens generated after it', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'interleaved rounds', lower_bound=1)
SECONDS = flags.DEFINE_float(
    'seconds', 1.0, 'how long a contender is timed per round', lower_bound=0)
NAMES = flags.DEFINE_list(
    'contenders', ['modehop', 'recompute', 'torch'], 'who is measured, by name')


@dataclasses.dataclass(frozen=True)
class Task:
  """What is generated: a decoder of `shape`, whose length is prompt and new tokens."""

  shape: shapes.Shape
  n_rows: int
  n_prompt: int

  @property
  def n_tokens(self) -> int:
    """Tokens generated in each row."""
    return self.shape.length - self.n_prompt

  def prompts_BL(self) -> np.ndarray:
    """Returns the prompts, int32 [B, L]."""
    size = (self.n_rows, self.n_prompt)
    return np.random.default_rng(1).integers(self.shape.vocab_size, size=size, dtype=np.int32)


def _model(task: Task):
  """Returns the built model and fresh weights by dotted name."""
  from experiments.benchmarks import modehop_step
  built = modehop_step.build(task.shape, task.n_rows, 'float32')
  return built, modehop_step.fresh_weights(built)


def _modehop(task: Task) -> Callable[[], np.ndarray]:
  from experiments.benchmarks import modehop_step
  from models.decode import generate, make_prompts
  from models.sampling import Sampling
  built, weights = _model(task)
  params, prompts = modehop_step.unflatten(built, weights), make_prompts(task.prompts_BL())
  greedy = Sampling(temperature=0.0)
  return lambda: np.asarray(generate(
      built.graphdef, params, prompts, max_tokens=task.n_tokens, sampling=greedy).tokens_BT)


def _recompute(task: Task) -> Callable[[], np.ndarray]:
  import jax

  from experiments.benchmarks import modehop_step
  from models import transformer
  built, weights = _model(task)
  params = modehop_step.unflatten(built, weights)

  @jax.jit
  def next_B(params, tokens_BL, n):
    model = transformer.apply(built.graphdef, params)
    hidden_BLD, _ = model(tokens_BL)
    return model.logits(hidden_BLD[:, n - 1]).argmax(-1)

  def run() -> np.ndarray:
    tokens_BL = np.zeros((task.n_rows, task.shape.length), np.int32)
    tokens_BL[:, :task.n_prompt] = task.prompts_BL()
    for n in range(task.n_prompt, task.shape.length):
      tokens_BL[:, n] = next_B(params, tokens_BL, n)
    return tokens_BL[:, task.n_prompt:]
  return run


def _torch(task: Task) -> Callable[[], np.ndarray]:
  from experiments.benchmarks import torch_decode
  return torch_decode.generator(task.shape, _model(task)[1], task.prompts_BL())


CONTENDERS = {'modehop': _modehop, 'recompute': _recompute, 'torch': _torch}


def _start(name: str, task: Task) -> Started:
  """Returns a contender's generation; its facts are the tokens that it writes."""
  run = CONTENDERS[name](task)
  return Started({'generation': Step(run)}, run())


def _compare(task: Task, names: list[str]) -> str:
  """Returns the table of all contenders."""
  def check(facts: dict[str, Any]) -> None:
    for name in names:
      if not np.array_equal(facts[name], facts[names[0]]):
        raise UserError(f'{name} does not write the tokens that {names[0]} writes')

  _, measured = interleaved(
      _start, {name: (name, task) for name in names}, check, ROUNDS.value, SECONDS.value)
  seconds, rows = {name: measured[name]['generation'] for name in names}, []
  for name in names:
    rate = estimate([task.n_rows * task.n_tokens / s for s in seconds[name]])
    ratio = estimate([s / first for s, first in zip(seconds[name], seconds[names[0]], strict=True)])
    rows.append([name, f'{rate.median:,.0f} ({rate.low:,.0f} to {rate.high:,.0f})',
                 f'{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})'])
  header = f'{SIZE.value}, {task.n_rows} rows, {task.n_prompt} + {task.n_tokens} tokens'
  return table([header, 'new tokens/s', f'time / {names[0]}'], rows)


def main() -> None:
  names = measurable(command_line.chosen(NAMES, CONTENDERS), of_torch='torch')
  print(machine(), flush=True)
  shape = dataclasses.replace(shapes.SHAPES[SIZE.value], length=PROMPT.value + TOKENS.value)
  print(f'\n{_compare(Task(shape, ROWS.value, PROMPT.value), names)}', flush=True)


if __name__ == '__main__':
  command_line.run(main)
