"""How far one element of a parameter can move between two steps, whatever the gradients were."""

import math

import numpy as np

from research.config import ExperimentConfig
from research.training.optimizers import schedule


def _adam_ratio(b1: float, b2: float, n: int) -> float:
  """Returns the largest |m| / sqrt(v) after n updates, both moments with bias correction.

  m is a sum of (1 - b1) b1^k g_k, v of (1 - b2) b2^k g_k^2; by the inequality of Cauchy and
  Schwarz |m| <= (1 - b1) / sqrt(1 - b2) sqrt(sum_k (b1^2 / b2)^k) sqrt(v).
  """
  q = b1 * b1 / b2
  total = n if q == 1 else (1 - q**n) / (1 - q)
  correction = math.sqrt(1 - b2**n) / (1 - b1**n)
  return correction * (1 - b1) / math.sqrt(1 - b2) * math.sqrt(total)


def update_bound(config: ExperimentConfig, first: int, last: int, peak: float) -> float:
  """Returns the farthest that any stored element can move in the updates of steps (first, last].

  Args:
    config: of the run.
    first: steps done before.
    last: steps done after.
    peak: the largest magnitude of a weight in between, which decoupled decay is a share of.
  """
  rounding = (last - first) * 2.0**-22 + (2.0**-7 if _rounds(config) else 0.0)
  return update_reach(config, np.arange(first, last), peak) + rounding * max(peak, 1e-30)


def update_reach(config: ExperimentConfig, steps: np.ndarray, peak: float) -> float:
  """Returns the farthest that any element can move in some updates, before it is rounded.

  Without a sharp bound it is infinite, unless the learning rate is 0: Muon, Adafactor and SGD, and
  Adam with b2 = 0 or moments taken over from another run.

  Args:
    config: of the run.
    steps: int [S], numbers of steps done before each of the updates.
    peak: the largest magnitude of a weight in between, which decoupled decay is a share of.
  """
  optimizer = config.optimizer
  rates = np.asarray(schedule(optimizer, config.n_steps)(steps), np.float64)
  if not rates.any():
    return 0.0
  if optimizer.name not in ('adamw', 'lion') or config.start.optimizer or not optimizer.b2:
    return math.inf
  ratios = [_adam_ratio(optimizer.b1, optimizer.b2, int(step) + 1) if optimizer.name == 'adamw'
            else 1.0 for step in steps]
  return float(rates @ (np.array(ratios) + optimizer.weight_decay * peak)) * 1.001


def _rounds(config: ExperimentConfig) -> bool:
  return config.checkpoints.snapshot_dtype == 'bfloat16' or (
      config.optimizer.moment_dtype == 'bfloat16')
