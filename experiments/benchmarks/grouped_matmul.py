"""Times the product of rows and their experts' matrices, forward and backward, on the CPU.

  python -m experiments.benchmarks.grouped_matmul
  python -m experiments.benchmarks.grouped_matmul --rows=4096 --experts=64 --width=256 --hidden=512

Rows sorted by expert, float32, loads drawn evenly at random. Contenders: modehop's product in
blocks, XLA's `ragged_dot`, a dense product of all rows with all experts of which one counts, and a
PyTorch loop over experts (an extra: pip install -e '.[bench]'). All must give the same result and
gradients. Each contender has a process of its own, blocked while another is timed; rounds are
interleaved.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import flags

from experiments.benchmarks import command_line
from experiments.benchmarks.contenders import measurable
from experiments.benchmarks.estimates import estimate, machine, table
from experiments.benchmarks.rounds import Started, Step, interleaved
from research.errors import UserError

ROWS = flags.DEFINE_integer('rows', 2048, 'rows of all experts', lower_bound=1)
EXPERTS = flags.DEFINE_integer('experts', 16, 'experts', lower_bound=1)
WIDTH = flags.DEFINE_integer('width', 256, 'width of a row', lower_bound=1)
HIDDEN = flags.DEFINE_integer('hidden', 256, 'width of a result', lower_bound=1)
ROUNDS = flags.DEFINE_integer('rounds', 5, 'interleaved rounds', lower_bound=1)
SECONDS = flags.DEFINE_float(
    'seconds', 0.5, 'how long a contender is timed per round', lower_bound=0)
NAMES = flags.DEFINE_list(
    'contenders', ['blocks', 'ragged_dot', 'dense', 'torch'], 'who is measured, by name')


@dataclasses.dataclass(frozen=True)
class Task:
  """The shapes."""

  n_rows: int
  n_experts: int
  width: int
  hidden: int

  def operands(self) -> tuple[np.ndarray, ...]:
    """Returns rows [N, K], matrices [X, K, F], a cotangent [N, F] and the loads [X]."""
    rng = np.random.default_rng(1)
    x_NK, weight_XKF, g_NF = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((self.n_rows, self.width), (self.n_experts, self.width, self.hidden),
                      (self.n_rows, self.hidden)))
    sizes_X = rng.multinomial(self.n_rows, np.full(self.n_experts, 1 / self.n_experts))
    return x_NK, weight_XKF, g_NF, sizes_X.astype(np.int32)


def _in_jax(product: Callable) -> Callable[[Task], dict[str, Step]]:
  def start(task: Task) -> dict[str, Step]:
    import jax
    x_NK, weight_XKF, g_NF, sizes_X = map(jax.numpy.asarray, task.operands())

    @jax.jit
    def both(x_NK, weight_XKF, g_NF, sizes_X):
      out_NF, vjp = jax.vjp(lambda x, weight: product(x, weight, sizes_X), x_NK, weight_XKF)
      return out_NF, *vjp(g_NF)

    forward = jax.jit(product)
    return {'forward': Step(lambda: forward(x_NK, weight_XKF, sizes_X), jax.block_until_ready),
            'with gradients': Step(lambda: both(x_NK, weight_XKF, g_NF, sizes_X),
                                   jax.block_until_ready)}
  return start


def _blocks(x_NK, weight_XKF, sizes_X):
  from models.kernels.grouped import by_blocks
  return by_blocks(x_NK, weight_XKF, sizes_X)


def _ragged_dot(x_NK, weight_XKF, sizes_X):
  import jax
  return jax.lax.ragged_dot(x_NK, weight_XKF, sizes_X)


def _dense(x_NK, weight_XKF, sizes_X):
  import jax.numpy as jnp
  n_rows, n_experts = x_NK.shape[0], weight_XKF.shape[0]
  expert_N = jnp.repeat(jnp.arange(n_experts), sizes_X, total_repeat_length=n_rows)
  own_NX = expert_N[:, None] == jnp.arange(n_experts)
  return jnp.einsum('nk,xkf,nx->nf', x_NK, weight_XKF, own_NX.astype(x_NK.dtype))


def _torch(task: Task) -> dict[str, Step]:
  import torch
  x_NK, weight_XKF, g_NF, sizes_X = task.operands()
  x, weight, g = map(torch.from_numpy, (x_NK, weight_XKF, g_NF))
  x.requires_grad_(), weight.requires_grad_()

  def product():
    parts = torch.split(x, sizes_X.tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, weight.unbind(), strict=True)])

  def forward():
    with torch.no_grad():
      return product()

  def both():
    out = product()
    return out.detach(), *torch.autograd.grad(out, (x, weight), g)
  return {'forward': Step(forward), 'with gradients': Step(both)}


CONTENDERS = {'blocks': _in_jax(_blocks), 'ragged_dot': _in_jax(_ragged_dot),
              'dense': _in_jax(_dense), 'torch': _torch}


def _start(name: str, task: Task) -> Started:
  """Returns a contender's steps; its facts are the result and both gradients."""
  steps = CONTENDERS[name](task)
  return Started(steps, [np.asarray(x) for x in steps['with gradients'].run()])


def _compare(task: Task, names: list[str]) -> str:
  """Returns the table of all contenders."""
  def check(facts: dict[str, Any]) -> None:
    for name in names:
      for a, b in zip(facts[name], facts[names[0]], strict=True):
        if np.abs(a - b).max() > 1e-4 * np.abs(b).max():  # float32 sums in another order
          raise UserError(f'{name} and {names[0]} do not give the same result')

  _, measured = interleaved(
      _start, {name: (name, task) for name in names}, check, ROUNDS.value, SECONDS.value)
  rows = []
  for name in names:
    cells = []
    for step, seconds in measured[name].items():
      time = estimate([1000 * s for s in seconds])
      ratio = estimate([s / first for s, first in
                        zip(seconds, measured[names[0]][step], strict=True)])
      cells += [f'{time.median:.2f} ({time.low:.2f} to {time.high:.2f})', f'{ratio.median:.2f}']
    rows.append([name, *cells])
  header = f'{task.n_rows} rows, {task.n_experts} experts of {task.width} x {task.hidden}'
  ratio = f'/ {names[0]}'
  return table([header, 'forward, ms', ratio, 'with gradients, ms', ratio], rows)


def main() -> None:
  names = measurable(command_line.chosen(NAMES, CONTENDERS), of_torch='torch')
  print(machine(), flush=True)
  task = Task(ROWS.value, EXPERTS.value, WIDTH.value, HIDDEN.value)
  print(f'\n{_compare(task, names)}', flush=True)


if __name__ == '__main__':
  command_line.run(main)
