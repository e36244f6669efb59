"""Contenders of one process each, timed in turns while the others are blocked."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any

_worker: dict[str, Callable] = {}


def _begin(start: Callable, arguments: tuple) -> Any:
  """Starts the contender of this process; returns its facts."""
  _worker['step'], facts = start(*arguments)
  return facts


def _measure(seconds: float) -> float:
  """Returns the seconds of one step of this process."""
  step, n_steps = _worker['step'], 0
  step()
  began = time.perf_counter()
  while n_steps == 0 or time.perf_counter() - began < seconds:
    step()
    n_steps += 1
  return (time.perf_counter() - began) / n_steps


def interleaved(
    start: Callable, contenders: dict[str, tuple], check: Callable[[dict[str, Any]], None],
    n_rounds: int, seconds: float) -> tuple[dict[str, Any], dict[str, list[float]]]:
  """Returns each contender's facts and the seconds of its step in every round.

  Args:
    start: of a module, arguments -> (step that waits for its result, facts).
    contenders: arguments of start, by name.
    check: raises where the facts of all contenders do not agree.
    n_rounds: rounds in which each contender is timed once.
    seconds: how long at a time.
  """
  context = multiprocessing.get_context('spawn')
  pools = {name: context.Pool(1) for name in contenders}
  try:
    facts = {name: pool.apply(_begin, (start, contenders[name])) for name, pool in pools.items()}
    check(facts)
    measured = {name: [] for name in contenders}
    for _ in range(n_rounds):
      for name, pool in pools.items():
        measured[name].append(pool.apply(_measure, (seconds,)))
  finally:
    for pool in pools.values():
      pool.terminate()
  return facts, measured
