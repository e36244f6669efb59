"""Confidence intervals over demonstration contexts, so one context never counts as many items."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats


@dataclasses.dataclass(frozen=True)
class Band:
  """A mean and its confidence interval at every snapshot; NaN bounds where there is none."""

  mean: np.ndarray
  low: np.ndarray
  high: np.ndarray


def over_contexts(
    values_TC: np.ndarray,
    n_items: Sequence[int],
    datasets: Sequence[str],
    *,
    bounds: tuple[float, float],
    confidence: float = 0.95,
) -> Band:
  """Returns the item-weighted mean over contexts with a Student t interval, per snapshot.

  The demonstration contexts are the sample; datasets are fixed strata (a suite of eight
  datasets is always those eight), unless one of them has a single context, when all contexts
  form one stratum. Degrees of freedom: contexts minus strata. Stratified variance of a mean:
  Cochran, Sampling Techniques, 3rd edition, equation 5.7, without finite-population terms.

  Args:
    values_TC: the value of each context at each snapshot.
    n_items: items in each context.
    datasets: the dataset of each context.
    bounds: least and greatest possible value; the interval is clipped to them.
    confidence: coverage of the interval.
  """
  values_TC = np.asarray(values_TC, np.float64)
  weights = np.asarray(n_items, np.float64) / np.sum(n_items)
  mean = values_TC @ weights
  names, strata = np.unique(np.asarray(datasets), return_inverse=True)
  if np.min(np.bincount(strata)) < 2:
    names, strata = names[:1], np.zeros_like(strata)
  degrees = values_TC.shape[1] - len(names)
  if degrees < 1:
    nothing = np.full_like(mean, np.nan)
    return Band(mean, nothing, nothing)
  variance = np.zeros_like(mean)
  for stratum in range(len(names)):
    inside = strata == stratum
    w, v_TC = weights[inside], values_TC[:, inside]
    center = v_TC @ w / w.sum()
    correction = len(w) / (len(w) - 1)
    variance += correction * ((v_TC - center[:, None])**2 @ w**2)
  half = stats.t.ppf(0.5 + confidence / 2, degrees) * np.sqrt(variance)
  return Band(mean, np.maximum(mean - half, bounds[0]), np.minimum(mean + half, bounds[1]))
