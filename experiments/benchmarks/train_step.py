"""Times modehop's training step beside PyTorch and an ordinary Flax step of the same decoder.

  python -m experiments.benchmarks.train_step
  python -m experiments.benchmarks.train_step --sizes=3M --contenders=modehop,torch_compile
  python -m experiments.benchmarks.train_step --contenders=modehop --profile

Every contender computes the same decoder (pre-RMSNorm, RoPE, SwiGLU, tied embedding, 256 tokens
per row) from the same weights on the same batches, with AdamW and clipping at 1; before any timing
its loss is compared with modehop's, before the first update and after two. Each has a process of
its own that is blocked on a pipe while another is timed; rounds are interleaved, in an order that
rotates. PyTorch is an extra: pip install -e '.[bench]'. Contenders: modehop, modehop_bf16, flax,
torch, torch_compile, torch_compile_bf16.
"""

import contextlib
import json
import math
import pathlib
import tempfile
from typing import Any

from absl import flags

from experiments.benchmarks import command_line
from experiments.benchmarks.contenders import CONTENDERS, reason_to_skip
from experiments.benchmarks.estimates import Estimate, estimate, machine, table
from experiments.benchmarks.shapes import SHAPES
from experiments.benchmarks.workers import Worker
from research.errors import UserError
from research.run_dir import write_whole

SIZES = flags.DEFINE_list('sizes', ['1M', '3M', '10M'], f'of {", ".join(SHAPES)}')
ROUNDS = flags.DEFINE_integer('rounds', 5, 'interleaved rounds', lower_bound=1)
TOKENS = flags.DEFINE_integer('tokens', 8192, 'tokens per step', lower_bound=1)
SECONDS = flags.DEFINE_float(
    'seconds', 4.0, 'how long a contender is timed per round, at least two steps', lower_bound=0)
NAMES = flags.DEFINE_list('contenders', list(CONTENDERS), 'who is measured, by name')
PROFILE = flags.DEFINE_bool('profile', False, "show where modehop's time goes, by ablation")
JSON = flags.DEFINE_string('json', '', 'also write everything measured to this file')

BASE = 'modehop'


def _n_rows(size: str) -> int:
  length = SHAPES[size].length
  if TOKENS.value % length:
    raise UserError(f'--tokens={TOKENS.value} is not a multiple of the {length} tokens of a row')
  return TOKENS.value // length


def _compare(name: str, losses: list[float], base: list[float]) -> dict[str, Any]:
  """Returns whether a contender computes modehop's loss; raises UserError where it does not."""
  first, last = abs(losses[0] - base[0]), abs(losses[-1] - base[-1])
  near, far = CONTENDERS[name].tolerances
  same = first <= near * max(1, abs(base[0])) and last <= far * max(1, abs(base[-1]))
  print(f'  {name}: same loss: {"yes" if same else "NO"}, |difference| = {first:.1e} before the '
        f'first update, {last:.1e} after {len(losses) - 1} (loss {losses[0]:.6f})', flush=True)
  if not same:
    raise UserError(f'{name} does not compute the loss of {BASE}: {losses} against {base}')
  return {'before_updates': first, 'after_updates': last}


def _rotated(names: list[str], by: int) -> list[str]:
  by %= len(names)
  return names[by:] + names[:by]


def _measure_size(size: str, names: list[str], stack: contextlib.ExitStack) -> dict[str, Any]:
  """Returns everything measured at one size, seconds by contender and round."""
  n_rows = _n_rows(size)
  folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='modehop-bench-')))

  def worker(role: str) -> Worker:
    started = Worker(role, size, n_rows, folder)
    stack.callback(started.close)
    return started

  print(f'{size}: starting and compiling', flush=True)
  reference = worker('reference')
  workers = {name: worker(name) for name in names}
  base = (workers[BASE] if BASE in workers else worker(BASE)).ready['losses']
  result = {**reference.ready, 'size': size, 'contenders': {}, 'peaks': [], 'ablation': []}
  for name in names:
    ready = workers[name].ready
    result['contenders'][name] = {
        'compile_seconds': ready['compile_seconds'], 'rounds': [],
        'difference': _compare(name, ready['losses'], base)}
  ablation = worker('ablation') if PROFILE.value else None
  result['ablation_parts'] = ablation.ready if ablation else {}

  for i in range(ROUNDS.value):
    print(f'{size}: round {i + 1} of {ROUNDS.value}', flush=True)
    result['peaks'].append(reference.ask(steps=10)['flops'])
    for name in _rotated(names, i):
      steps = max(2, math.ceil(SECONDS.value / workers[name].ready['step_seconds']))
      result['contenders'][name]['rounds'].append(workers[name].ask(steps=steps))
    if ablation:
      result['ablation'].append(ablation.ask(steps=3)['seconds'])
  return result


def _span(value: Estimate, form) -> str:
  return f'{form(value.median)} ({form(value.low)} to {form(value.high)})'


def _rate(result: dict[str, Any], name: str) -> list[float]:
  return [TOKENS.value / row['seconds'] for row in result['contenders'][name]['rounds']]


def _summary_table(result: dict[str, Any]) -> str:
  """Returns one row per contender; ratios are modehop's rate over the contender's, by round."""
  peak = max(result['peaks'])
  base = _rate(result, BASE) if BASE in result['contenders'] else None
  rows = []
  for name, measured in result['contenders'].items():
    rates = _rate(result, name)
    ratio = '' if base is None or name == BASE else _span(
        estimate([mine / theirs for mine, theirs in zip(base, rates, strict=True)]),
        lambda x: f'{x:.2f}')
    rates = estimate(rates)
    rows.append([
        name, _span(rates, lambda x: f'{x:,.0f}'),
        f'{rates.median * result["flops_per_token"] / peak:.0%}', ratio,
        f'{measured["rounds"][-1]["resident_gb"]:.2f}', f'{measured["rounds"][-1]["peak_gb"]:.2f}',
        f'{measured["compile_seconds"]:.1f}'])
  return table(['contender', 'tokens/s', 'MFU', f'{BASE} / contender', 'resident GB',
                'peak resident GB', 'compile s'], rows)


def _ablation_table(result: dict[str, Any]) -> str:
  """Returns where modehop's time goes: nested parts that add up, then variants of the step."""
  rounds, parts = result['ablation'], result['ablation_parts']
  whole, nested = parts['whole'], parts['nested']

  def share(of) -> str:
    return _span(estimate([of(row) / row[whole] for row in rounds]), lambda x: f'{x:.0%}')

  step = estimate([row[whole] for row in rounds]).median
  roof = TOKENS.value * result['flops_per_token'] / max(result['peaks'])
  rows = [[f'whole step, {step * 1e3:.0f} ms', '100%']]
  for before, name in zip([None, *nested], nested):
    rows.append([f'of it {nested[name]}', share(
        lambda row: row[name] - (row[before] if before else 0))])
  rows.append(['its matrix products at the measured roof would take', f'{roof / step:.0%}'])
  rows += [[f'the step {name} ({doc})', share(lambda row: row[name])]
           for name, doc in parts['variants'].items()]
  return table(['modehop', 'share of the step'], rows)


def _print_result(result: dict[str, Any], skipped: dict[str, str]) -> None:
  shape = SHAPES[result['size']]
  print(f'\n### {result["size"]}: {result["parameters"]:,} parameters, '
        f'{result["flops_per_token"] / 1e6:.2f} MFLOP per token\n'
        f'{TOKENS.value:,} tokens per step in rows of {shape.length}; f32 matmul roof '
        f'{max(result["peaks"]) / 1e9:.0f} GFLOP/s; modehop accumulates {result["n_micro"]} '
        'micro-batches.\n')
  print(_summary_table(result))
  for name, reason in skipped.items():
    print(f'\n{name}: skipped. {reason}')
  if result['ablation']:
    print(f'\n{_ablation_table(result)}')


def main() -> None:
  sizes = command_line.chosen(SIZES, SHAPES)
  named = command_line.chosen(NAMES, CONTENDERS)
  for size in sizes:
    _n_rows(size)
  skipped = {name: reason for name in named if (reason := reason_to_skip(name))}
  names = [name for name in named if name not in skipped]
  facts, results = machine(), []
  print(facts, flush=True)
  for size in sizes:
    with contextlib.ExitStack() as stack:
      results.append(_measure_size(size, names, stack))
  coverage = estimate([0.0] * ROUNDS.value).coverage
  print(f'\nMedians of {ROUNDS.value} interleaved rounds; in brackets the order-statistic interval '
        f'that covers the median with probability {coverage:.1%}. MFU is against the best f32 '
        'matmul of the same run, for bf16 too.')
  for result in results:
    _print_result(result, skipped)
  if JSON.value:
    write_whole(pathlib.Path(JSON.value), json.dumps(
        {'machine': facts, 'tokens': TOKENS.value, 'rounds': ROUNDS.value, 'skipped': skipped,
         'sizes': results}, indent=2) + '\n')


if __name__ == '__main__':
  command_line.run(main)
