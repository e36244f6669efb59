"""Contenders of one process each, timed in turns while the others are blocked."""

import multiprocessing
import time
from collections.abc import Callable
from typing import Any, NamedTuple

Seconds = dict[str, dict[str, list[float]]]  # by contender and step, one per round


class Step(NamedTuple):
  """What is timed: `run` may leave its result in a queue, `wait` then waits for it."""

  run: Callable[[], Any]
  wait: Callable[[Any], Any] = lambda result: result


class Started(NamedTuple):
  """A contender: its steps by name (the same for all contenders), and facts to compare."""

  steps: dict[str, Step]
  facts: Any


class Lacks(NamedTuple):
  """A contender that cannot do what is asked."""

  reason: str


_worker: dict[str, Step] = {}


def _begin(start: Callable[..., Started | Lacks], arguments: tuple) -> Any:
  """Starts the contender of this process; returns its facts, or what it lacks."""
  started = start(*arguments)
  if isinstance(started, Lacks):
    return started
  _worker.update(started.steps)
  return started.facts, list(started.steps)


def _measure(name: str, seconds: float, n_before: int) -> float:
  """Returns the seconds of one step of this process; steps are queued, then waited for."""
  step = _worker[name]

  def timed(n: int) -> float:
    began = time.perf_counter()
    for _ in range(n - 1):
      step.run()
    step.wait(step.run())
    return (time.perf_counter() - began) / n

  return timed(max(1, round(seconds / timed(n_before))))


def interleaved(
    start: Callable[..., Started | Lacks], contenders: dict[str, tuple],
    check: Callable[[dict[str, Any]], None], n_rounds: int, seconds: float, n_before: int = 1
) -> tuple[dict[str, Any], Seconds]:
  """Returns each contender's facts, and the seconds of each of its steps in every round.

  A contender that lacks something has a `Lacks` for facts and no seconds.

  Args:
    start: of a module, makes a contender of its arguments.
    contenders: arguments of start, by name.
    check: raises where the facts of those that lack nothing do not agree.
    n_rounds: rounds in which each step of a contender is timed once.
    seconds: how long at a time.
    n_before: steps in a row that say how many fit into those seconds.
  """
  context = multiprocessing.get_context('spawn')
  pools = {name: context.Pool(1) for name in contenders}
  try:
    begun = {name: pool.apply(_begin, (start, contenders[name])) for name, pool in pools.items()}
    able = {name: answer for name, answer in begun.items() if not isinstance(answer, Lacks)}
    check({name: facts for name, (facts, _) in able.items()})
    measured = {name: {step: [] for step in steps} for name, (_, steps) in able.items()}
    for _ in range(n_rounds):
      for name, by_step in measured.items():
        for step, values in by_step.items():
          values.append(pools[name].apply(_measure, (step, seconds, n_before)))
  finally:
    for pool in pools.values():  # They are idle; a signal would make libtpu write a stack trace.
      pool.close()
      pool.join()
  return {**begun, **{name: facts for name, (facts, _) in able.items()}}, measured
