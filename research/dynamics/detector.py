"""Hops of a trajectory: sudden changes between confident states, with stated error rates.

A hop of a dataset at a checkpoint is called where all of this holds:

- sudden: the step between the flanks beside a common slope (research.dynamics.contrasts) is more
  than `ALLOWANCE`, with Benjamini and Hochberg's false-discovery rate over all datasets and
  checkpoints of the trajectory at most `FALSE_DISCOVERIES`;
- confident: the mean of each flank of `DWELL` checkpoints is a confident state, the two opposite;
- held: every checkpoint of a flank lies on its side of the center;
- of its own: controls are at their level through the whole window (research.dynamics.controls);
- beyond parity: none of the above would fall if items whose answer depends on how the scores were
  computed were left out (`tolerance`).

A change that takes many checkpoints is not a hop, however large: it is a rise.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

from research.dynamics import contrasts
from research.dynamics.controls import ControlState
from research.dynamics.states import Levels, over_contexts
from research.monitors.suspects import DWELL  # checkpoints of either flank

ALLOWANCE = 0.03  # contrast that the curvature of a smooth rise may have
FALSE_DISCOVERIES = 0.05
CONFIDENCE = 0.95  # of the flanks' states
LEAST_CONTEXTS = 3
MARGINS = (-1.0, 1.0)  # bounds of differences of two probabilities
ACCURACIES = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Series:
  """Every dataset's levels at every checkpoint, of one or many trajectories.

  Attributes:
    mean: (..., K, T) by dataset and checkpoint.
    flanks: levels (..., K, T - DWELL + 1) of the means over DWELL checkpoints in a row.
    noise: standard errors (..., K, T - 2 * DWELL) of the contrast at every window.
  """

  mean: np.ndarray
  flanks: Levels
  noise: np.ndarray


@dataclasses.dataclass(frozen=True)
class Windows:
  """What is known of every window, arrays (..., K, T - 2 * DWELL); window w is centered on
  checkpoint w + DWELL."""

  contrast: np.ndarray
  noise: np.ndarray
  adjusted_p: np.ndarray  # false-discovery rate at which the contrast counts
  change: np.ndarray  # mean of the later flank minus that of the earlier one
  is_held: np.ndarray  # confident opposite states on both flanks, held at every checkpoint
  is_hop: np.ndarray  # one window of each hop


@dataclasses.dataclass(frozen=True)
class Hop:
  """One confirmed hop.

  Attributes:
    dataset: its index.
    center: checkpoint (index) between its flanks.
    before, after: neighboring checkpoints between which most of it happened.
    direction: +1 towards the generalizing answer, -1 towards the pattern.
    change: between the means of both flanks.
    adjusted_p: false-discovery rate at which it counts.
    is_calm: whether controls were at their level; None without controls.
  """

  dataset: int
  center: int
  before: int
  after: int
  direction: int
  change: float
  adjusted_p: float
  is_calm: bool | None

  @property
  def is_confirmed(self) -> bool:
    """Whether the controls do not speak against it."""
    return self.is_calm is not False


def series_of_contexts(values: np.ndarray, weights: np.ndarray,
                       bounds: tuple[float, float] = MARGINS) -> Series:
  """Returns series of per-context means.

  Args:
    values: (..., K, T, C) mean margin or accuracy of the items of a context, over all prompt
      variants of it.
    weights: (C,) shares of the items.
    bounds: least and greatest possible value.

  Raises:
    ValueError: fewer than `LEAST_CONTEXTS` contexts, or too few checkpoints for one window.
  """
  values, weights = np.asarray(values, np.float64), np.asarray(weights, np.float64)
  if values.shape[-1] < LEAST_CONTEXTS:
    raise ValueError(f'{values.shape[-1]} demonstration contexts are too few to tell how much they '
                     f'differ; at least {LEAST_CONTEXTS}')
  mean = values @ weights
  _check_length(mean)
  flanks = np.lib.stride_tricks.sliding_window_view(values, DWELL, axis=-2).mean(-1)
  noise = np.maximum(contrasts.context_noise(values, weights, DWELL),
                     contrasts.common_noise(mean, DWELL, bounds))
  return Series(mean, over_contexts(flanks, weights), noise)


def series_of_errors(mean: np.ndarray, error: np.ndarray) -> Series:
  """Returns series of published means with standard errors over items.

  Args:
    mean: (..., K, T) accuracies.
    error: standard errors of the same shape; zero where none are known. The items of neighboring
      checkpoints are the same, so their errors do not shrink in a flank.
  """
  mean, error = np.asarray(mean, np.float64), np.asarray(error, np.float64)
  _check_length(mean)
  view = np.lib.stride_tricks.sliding_window_view
  flanks = Levels(view(mean, DWELL, axis=-1).mean(-1), view(error, DWELL, axis=-1).max(-1), np.inf)
  weights = contrasts.step_weights(DWELL)
  of_items = np.sqrt(view(error, 2 * DWELL + 1, axis=-1)**2 @ weights**2)
  return Series(mean, flanks,
                np.maximum(of_items, contrasts.common_noise(mean, DWELL, ACCURACIES)))


def windows(series: Series, center: np.ndarray | float = 0.0,
            tolerance: np.ndarray | float = 0.0) -> Windows:
  """Returns what every window says; false discoveries are controlled within each trajectory.

  Args:
    series: of one trajectory (K, T), or of many with leading axes.
    center: between the two states: 0 of margins, 0.5 of accuracies; or of each dataset, (K, 1).
    tolerance: distance from the center that parity of two scorings leaves open; of all datasets, or
      of each, (K, 1).
  """
  contrast = contrasts.step_contrasts(series.mean, DWELL)
  excess = np.maximum(np.abs(contrast) - ALLOWANCE - 2 * tolerance, 0)
  with np.errstate(divide='ignore', invalid='ignore'):
    ratio = np.where(excess > 0, excess / series.noise, 0.0)
  p_values = 2 * stats.t.sf(ratio, contrasts.noise_degrees(series.mean.shape[-1], DWELL))
  flat = p_values.reshape(*p_values.shape[:-2], -1)
  adjusted = stats.false_discovery_control(flat, axis=-1).reshape(p_values.shape)
  sides = _sides(series, center, tolerance)
  before, after = sides[..., :-DWELL - 1], sides[..., DWELL + 1:]
  is_held = (before != 0) & (after == -before) & (np.sign(contrast) == after)
  strength = np.where(is_held & (adjusted <= FALSE_DISCOVERIES), ratio, 0.0)
  low, high = contrasts.flank_means(series.mean, DWELL)
  return Windows(contrast, series.noise, adjusted, high - low, is_held, _strongest(strength))


def find_hops(found: Windows, mean: np.ndarray, steps: Sequence[int],
              controls: ControlState | None = None) -> list[Hop]:
  """Returns the hops of one trajectory in order of time, those that controls forbid included.

  Args:
    found: windows of one trajectory, (K, T - 2 * DWELL).
    mean: its levels (K, T).
    steps: of its checkpoints.
    controls: of the same checkpoints.
  """
  hops = []
  for window, dataset in np.argwhere(found.is_hop.T):
    first, last = window, window + 2 * DWELL
    calm = None
    if controls is not None:
      seen = (controls.steps >= steps[first]) & (controls.steps <= steps[last])
      calm = bool(np.all(controls.inside[seen]))
    earlier, between, later = mean[dataset, window + DWELL - 1:window + DWELL + 2]
    is_late = abs(between - earlier) < abs(later - between)
    hops.append(Hop(
        int(dataset), int(window + DWELL), int(window + DWELL - 1 + is_late),
        int(window + DWELL + is_late),
        int(np.sign(found.change[dataset, window])), float(found.change[dataset, window]),
        float(found.adjusted_p[dataset, window]), calm))
  return hops


def hop_rate(hops: Sequence[Hop], n_datasets: int, n_tokens: int) -> tuple[float, float, float]:
  """Returns confirmed hops per dataset and billion tokens, with Garwood's (1936) 95% interval."""
  count = sum(hop.is_confirmed for hop in hops)
  exposure = n_datasets * n_tokens / 1e9
  low = stats.chi2.ppf(0.025, 2 * count) / 2 if count else 0.0
  high = stats.chi2.ppf(0.975, 2 * count + 2) / 2
  return count / exposure, float(low) / exposure, float(high) / exposure


def least_detectable(series: Series, power: float = 0.95) -> np.ndarray:
  """Returns the change of a sharp hop that a trajectory shows with this power, per dataset (K,).

  A symmetric hop around the center, alone in the trajectory. The greater of what suddenness and
  confident flanks take: noise and error are medians over checkpoints, alpha that of the first
  rejection among all windows.
  """
  noise, error = np.median(series.noise, -1), np.median(series.flanks.error, -1)
  n_windows = series.noise.shape[-1] * series.noise.shape[-2]
  degrees_of_noise = contrasts.noise_degrees(series.mean.shape[-1], DWELL)
  first_rejection = stats.t.isf(FALSE_DISCOVERIES / n_windows / 2, degrees_of_noise)
  critical = first_rejection + stats.norm.ppf(power)
  # The spread of a t ratio around its noncentrality, for both flanks at once.
  degrees = np.minimum(np.ravel(series.flanks.degrees), 1e6)
  tail = stats.chi2.isf((1 - power) / 2, degrees) / degrees
  flank = stats.t.ppf(0.5 + CONFIDENCE / 2, degrees) * np.sqrt(tail)
  return np.maximum(ALLOWANCE + critical * noise, 2 * flank * error)


def parity_share(margin_a: np.ndarray, margin_b: np.ndarray) -> float:
  """Returns the share of items whose margin changes sign between two ways of scoring them.

  As `tolerance` of accuracies it bounds what may be called a hop. Ties count as wrong answers.

  Raises:
    ValueError: the shapes differ or there are no items.
  """
  margin_a, margin_b = np.asarray(margin_a), np.asarray(margin_b)
  if margin_a.shape != margin_b.shape or not margin_a.size:
    raise ValueError(f'the same items must be scored twice, got shapes {margin_a.shape} and '
                     f'{margin_b.shape}')
  return float(np.mean((margin_a > 0) != (margin_b > 0)))


def _check_length(mean):
  least = contrasts.least_checkpoints(DWELL)
  if mean.shape[-1] < least:
    raise ValueError(f'{mean.shape[-1]} checkpoints are too few to tell noise from a hop with a '
                     f'state held for {DWELL} on either side; at least {least}')


def _sides(series, center, tolerance):
  """The confident and held state of every DWELL checkpoints in a row: -1, 0 or 1."""
  low, high = series.flanks.interval(CONFIDENCE)
  held = np.lib.stride_tricks.sliding_window_view(series.mean, DWELL, axis=-1)
  above = (low > center + tolerance) & (held.min(-1) > center)
  below = (high < center - tolerance) & (held.max(-1) < center)
  return above.astype(np.int8) - below.astype(np.int8)


def _strongest(strength):
  """Bool: the strongest of every run of neighboring windows with a strength above 0."""
  padded = np.pad(strength, [(0, 0)] * (strength.ndim - 1) + [(DWELL, DWELL)])
  around = np.lib.stride_tricks.sliding_window_view(padded, 2 * DWELL + 1, axis=-1)
  first = around.argmax(-1) == DWELL  # The earliest of equals.
  return (strength > 0) & first
