"""Medians of few rounds, intervals free of assumptions on how timings scatter, and their tables."""

import importlib.metadata
import math
import os
import platform
from typing import Any, NamedTuple


class Estimate(NamedTuple):
  """A median, its interval, and the probability with which the interval covers the true median."""

  median: float
  low: float
  high: float
  coverage: float


def estimate(values: list[float], confidence: float = 0.95) -> Estimate:
  """Returns the median of independent values with an interval of order statistics.

  The interval from the k-th lowest to the k-th highest of n values covers the median of their
  distribution with probability 1 - 2 P(Binomial(n, 1/2) < k). It takes the largest k that reaches
  the confidence, and lowest to highest where none does (n < 6).
  """
  ordered, n = sorted(values), len(values)

  def coverage(k: int) -> float:
    return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n

  k = max((k for k in range(1, n // 2 + 1) if coverage(k) >= confidence), default=1)
  middle = (ordered[(n - 1) // 2] + ordered[n // 2]) / 2
  return Estimate(middle, ordered[k - 1], ordered[n - k], coverage(k))


def table(header: list[str], rows: list[list[str]]) -> str:
  """Returns a Markdown table; the first column is text, the others are numbers."""
  rules = ['---'] + ['---:'] * (len(header) - 1)
  return '\n'.join('| ' + ' | '.join(cells) + ' |' for cells in [header, rules, *rows])


def machine() -> dict[str, Any]:
  """Returns what the timings depend on: cores, load before the start, versions."""
  versions = {}
  for package in ('jax', 'jaxlib', 'flax', 'torch'):
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = 'absent'
  return {'machine': platform.machine(), 'cores': len(os.sched_getaffinity(0)),
          'load_before': os.getloadavg()[0], **versions}
