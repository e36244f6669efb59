"""Difficulty and discrimination of items, and a suite chosen off the floor and ceiling of a model.

Two-parameter logistic model (Birnbaum, 1968): a checkpoint of ability t prefers the generalizing
answer of an item with probability 1 / (1 + exp(-a (t - b))), discrimination a, difficulty b. In a
group (a family, or its controls) abilities are standard normal, and items are fitted by marginal
likelihood (Bock and Aitkin, 1981: EM, abilities integrated out on fixed nodes). Few checkpoints say
little about an item, so slopes a and intercepts -a b have normal priors.
"""

import collections
import csv
import io
import pathlib
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import expit, log_expit

from research.errors import UserError
from research.monitors import table
from research.monitors.chance import FALSE_DISCOVERIES, Level, chance_of_tasks, levels
from research.monitors.items import MonitorItem
from research.run_dir import RunDir, write_whole

NODES = np.linspace(-5, 5, 41)  # abilities that are summed over
# (mean, standard deviation) of slope and intercept
PRIOR = ((1.0, 1.0), (0.0, 3.0))
LEAST_CHECKPOINTS = 4
LEAST_DISCRIMINATION = 0.3
RECENT = 4  # checkpoints up to the model's that tell whether it is at chance
OFF_FLOOR = 0.1  # probability of the generalizing answer, and of the shortcut, at least
_SWEEPS, _NEWTON_STEPS, _TOLERANCE = 500, 8, 1e-5


class Logistic(NamedTuple):
  """A fitted group.

  Attributes:
    discrimination, difficulty: by item (I,), in units of the spread of abilities.
    ability: by checkpoint (T,), posterior means.
  """

  discrimination: np.ndarray
  difficulty: np.ndarray
  ability: np.ndarray


class Statistics(NamedTuple):
  """What scores say of every item, arrays (I,).

  Attributes:
    share: of checkpoints that prefer the generalizing answer.
    difficulty, discrimination: of the two-parameter logistic model.
    correlation: point-biserial, of the item with the share of the other items of its group; NaN
      where either never changes.
    probability: of the generalizing answer at the ability of the model that is chosen for.
    chance: false-discovery rate at which that model does the item's task otherwise than by chance.
  """

  share: np.ndarray
  difficulty: np.ndarray
  discrimination: np.ndarray
  correlation: np.ndarray
  probability: np.ndarray
  chance: np.ndarray


def responses(run_dirs: Sequence[RunDir]) -> tuple[list[MonitorItem], np.ndarray]:
  """Returns the items of runs and which checkpoints prefer the generalizing answer, bool (T, I).

  Checkpoints come in the order of the runs and of their steps; ties are wrong.

  Raises UserError when a run has no scores, or runs have different items.
  """
  items, rows = None, []
  for run_dir in run_dirs:
    steps = table.score_steps(run_dir.monitor_scores)
    if not run_dir.monitor_items.exists() or not steps:
      raise UserError(f'{run_dir.whole} is not the directory of a monitored run')
    found = table.read_item_table(run_dir.monitor_items)
    if items not in (None, found):
      raise UserError(f'{run_dir.whole} was scored on other items than {run_dirs[0].whole}; '
                      'statistics need the same items')
    items = found
    for step in steps:
      _, scores = table.read_scores(run_dir.monitor_scores / table.scores_name(step))
      rows.append(scores.logp_generalizing > scores.logp_shortcut)
  return items, np.stack(rows)


def item_statistics(items: Sequence[MonitorItem], right_TI: np.ndarray, model: int = -1
                    ) -> Statistics:
  """Returns the statistics of items, each group fitted by itself.

  Args:
    items: what was scored.
    right_TI: which checkpoints prefer the generalizing answer.
    model: the checkpoint (index) that items will be chosen for.

  Raises UserError when there are too few checkpoints.
  """
  n_checkpoints = len(right_TI)
  if n_checkpoints < LEAST_CHECKPOINTS:
    raise UserError(f'{n_checkpoints} scored checkpoints are too few to tell items apart; at least '
                    f'{LEAST_CHECKPOINTS}')
  groups = collections.defaultdict(list)
  for i, item in enumerate(items):
    groups[item.family, item.is_control].append(i)
  model = range(n_checkpoints)[model]
  recent_TI = right_TI[max(0, model + 1 - RECENT):model + 1]
  found = Statistics(right_TI.mean(0), *(np.empty(len(items)) for _ in range(4)),
                     chance_of_tasks(items, recent_TI))
  for members in groups.values():
    fitted = fit(right_TI[:, members])
    found.difficulty[members] = fitted.difficulty
    found.discrimination[members] = fitted.discrimination
    found.correlation[members] = rest_correlation(right_TI[:, members])
    found.probability[members] = expit(
        fitted.discrimination * (fitted.ability[model] - fitted.difficulty))
  return found


def fit(right_TI: np.ndarray, prior: Sequence[tuple[float, float]] = PRIOR) -> Logistic:
  """Returns the two-parameter logistic model of one group by marginal likelihood.

  Args:
    right_TI: bool, by checkpoint and item.
    prior: (mean, standard deviation) of slope and intercept; infinite deviations for none.
  """
  right_TI = np.asarray(right_TI, np.float64)
  log_weights = -NODES**2 / 2
  lines_IP = np.tile([1.0, 0.0], (right_TI.shape[1], 1))
  for _ in range(_SWEEPS):
    at_nodes_IQ = lines_IP @ np.stack([NODES, np.ones_like(NODES)])
    log_TQ = right_TI @ log_expit(at_nodes_IQ) + (1 - right_TI) @ log_expit(-at_nodes_IQ)
    log_TQ += log_weights
    posterior_TQ = np.exp(log_TQ - log_TQ.max(1, keepdims=True))
    posterior_TQ /= posterior_TQ.sum(1, keepdims=True)
    before = lines_IP
    lines_IP = logistic_lines(NODES, posterior_TQ.sum(0), right_TI.T @ posterior_TQ, prior,
                              before)
    if np.abs(lines_IP - before).max() < _TOLERANCE:
      break
  slope, intercept = lines_IP.T
  return Logistic(slope, -intercept / slope, posterior_TQ @ NODES)


def logistic_lines(abilities: np.ndarray, counts: np.ndarray, right_IQ: np.ndarray,
                   prior: Sequence[tuple[float, float]], start_IP: np.ndarray) -> np.ndarray:
  """Returns slope and intercept of every item's logistic regression on ability, (I, 2).

  Newton's method; a step moves no parameter by more than 1.

  Args:
    abilities, counts: (Q,) nodes and how many checkpoints (not whole) are at each.
    right_IQ: how many of them prefer the generalizing answer.
    prior: (mean, standard deviation) of slope and intercept.
    start_IP: where the search begins.
  """
  design_PQ = np.stack([abilities, np.ones_like(abilities)])
  mean = np.array([center for center, _ in prior])
  precision = np.array([deviation**-2.0 for _, deviation in prior])
  lines_IP = start_IP
  for _ in range(_NEWTON_STEPS):
    p_IQ = expit(lines_IP @ design_PQ)
    gradient_IP = (right_IQ - counts * p_IQ) @ design_PQ.T - precision * (lines_IP - mean)
    hessian_IPP = np.einsum('iq,pq,rq->ipr', counts * p_IQ * (1 - p_IQ), design_PQ, design_PQ)
    hessian_IPP += np.diag(precision)
    step_IP = np.linalg.solve(hessian_IPP, gradient_IP[..., None])[..., 0]
    lines_IP = lines_IP + step_IP / np.maximum(1, np.abs(step_IP).max(1, keepdims=True))
  return lines_IP


def rest_correlation(right_TI: np.ndarray) -> np.ndarray:
  """Returns the point-biserial correlation of each item with the share of all others, (I,)."""
  right_TI = np.asarray(right_TI, np.float64)
  rest_TI = right_TI.sum(1, keepdims=True) - right_TI
  x_TI, y_TI = right_TI - right_TI.mean(0), rest_TI - rest_TI.mean(0)
  with np.errstate(invalid='ignore', divide='ignore'):
    return (x_TI * y_TI).sum(0) / np.sqrt((x_TI**2).sum(0) * (y_TI**2).sum(0))


def eligible(items: Sequence[MonitorItem], statistics: Statistics) -> np.ndarray:
  """Returns which items tell something about the model that they are chosen for, bool (I,).

  Their task is not done by chance. Off the floor and the ceiling, with a discrimination above
  LEAST_DISCRIMINATION that is not the prior's alone: the correlation with the rest of the group is
  positive too, so what never changed is left out. Controls may be at the ceiling, where whatever
  they fall from is seen, and need not discriminate, but some checkpoint got them right.
  """
  is_control = np.array([item.is_control for item in items])
  off_floor = ((statistics.probability >= OFF_FLOOR) & (statistics.share > 0)
               & (statistics.chance <= FALSE_DISCOVERIES))
  between = off_floor & (statistics.probability <= 1 - OFF_FLOOR)
  telling = (between & (statistics.discrimination > LEAST_DISCRIMINATION)
             & (statistics.correlation > 0))
  return np.where(is_control, off_floor, telling)


def choose(items: Sequence[MonitorItem], statistics: Statistics, n: int) -> list[MonitorItem]:
  """Returns n eligible items in their old order, the most informative for the model.

  Controls and others, families, datasets, generalizing answers (where a dataset has two), wordings
  and contexts take turns, so that all have as equal shares as there are eligible items. Of equals
  the most informative comes first: Fisher's information a^2 p (1 - p), of controls the greatest p.

  Raises UserError when fewer than n are eligible.
  """
  good = np.flatnonzero(eligible(items, statistics))
  if not 0 < n <= len(good):
    advice = f'choose 1 to {len(good)}' if len(good) else 'take easier or harder ones'
    at_chance = len({item.dataset for item, rate in zip(items, statistics.chance, strict=True)
                     if rate > FALSE_DISCOVERIES})
    raise UserError(f'{n} items cannot be chosen: {len(good)} of {len(items)} are off the floor '
                    f'and ceiling of this model, which does {at_chance} of '
                    f'{len({item.dataset for item in items})} datasets by chance; {advice}')
  answers = collections.defaultdict(set)
  for item in items:
    answers[item.dataset].add(item.generalizing)
  worth = statistics.discrimination**2 * statistics.probability * (1 - statistics.probability)
  key = lambda i: (-statistics.probability[i] if items[i].is_control else -worth[i], i)
  takes_turns = (
      lambda i: items[i].is_control, lambda i: items[i].family, lambda i: items[i].dataset,
      lambda i: items[i].generalizing if len(answers[items[i].dataset]) == 2 else '',
      lambda i: items[i].variant, lambda i: items[i].seed)
  return [items[i] for i in sorted(_in_turns(sorted(good, key=key), takes_turns)[:n])]


def described(items: Sequence[MonitorItem], right_TI: np.ndarray, statistics: Statistics
              ) -> list[str]:
  """Returns a table of datasets as lines: accuracies with intervals, ranges of the statistics."""
  good, members = eligible(items, statistics), collections.defaultdict(list)
  for i, item in enumerate(items):
    members[item.family, item.dataset].append(i)
  first, last = levels(items, right_TI[:1]), levels(items, right_TI[-1:])
  width = max(len(f'{family}/{dataset}') for family, dataset in members)
  lines = [f'{"dataset":{width}}  accuracy at first    and last checkpoint   share difficulty     '
           'discrimination eligible']
  for (family, dataset), these in members.items():
    ranges = ['{:+.1f} to {:+.1f}'.format(*np.quantile(values[these], (0.1, 0.9)))
              for values in (statistics.difficulty, statistics.discrimination)]
    at_chance = ' at chance' if statistics.chance[these[0]] > FALSE_DISCOVERIES else ''
    lines.append(
        f'{f"{family}/{dataset}":{width}}  {_told(first[dataset])}  {_told(last[dataset])}  '
        f'{np.mean(statistics.share[these]):.3f} {ranges[0]:14} {ranges[1]:14} '
        f'{good[these].sum():>4} of {len(these)}{at_chance}')
  return lines


def _told(one: Level) -> str:
  """Returns a level with its interval in 20 characters."""
  interval = '' if np.isnan(one.low) else f'[{max(one.low, 0):.2f}, {min(one.high, 1):.2f}]'
  return f'{one.mean:.3f} {interval:14}'


def write_statistics(items: Sequence[MonitorItem], statistics: Statistics,
                     path: str | pathlib.Path) -> None:
  """Writes one row of comma-separated values per item, and whether it is eligible."""
  text = io.StringIO()
  rows = csv.writer(text, lineterminator='\n')
  rows.writerow(['item_id', 'family', 'dataset', 'seed', 'variant', 'is_control',
                 *Statistics._fields, 'is_eligible'])
  good = eligible(items, statistics)
  for i, item in enumerate(items):
    rows.writerow([item.item_id, item.family, item.dataset, item.seed, item.variant,
                   int(item.is_control), *(f'{values[i]:.6g}' for values in statistics),
                   int(good[i])])
  write_whole(pathlib.Path(path), text.getvalue())


def _in_turns(indices: Sequence[int], groupings: Sequence[Callable[[int], Hashable]]) -> list[int]:
  """Returns indices so that the groups of the first grouping take turns, within them those of the
  next, and so on; a group's own order is kept."""
  if not groupings:
    return list(indices)
  groups: dict[Hashable, list[int]] = {}
  for i in indices:
    groups.setdefault(groupings[0](i), []).append(i)
  queues = [collections.deque(_in_turns(group, groupings[1:])) for group in groups.values()]
  ordered = []
  while queues:
    ordered += [queue.popleft() for queue in queues]
    queues = [queue for queue in queues if queue]
  return ordered
