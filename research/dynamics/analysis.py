"""Puts a run's curves together: every dataset's bands, its states and hops, and the controls."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from research.dynamics.controls import ControlState, controls_of
from research.dynamics.curves import Context, Curves, pooled, read_variants, variants_of
from research.dynamics.detector import LEAST_CONTEXTS
from research.dynamics.hops import DatasetHops, RunHops, hops_of_run, least_checkpoints
from research.dynamics.intervals import Band, over_contexts
from research.dynamics.parity import read_parity
from research.run_dir import RunDir

LEAST_CONTROL_ITEMS = 1000


@dataclasses.dataclass(frozen=True)
class Dataset:
  """The curves of one dataset along the run; `judged` is None where the detector cannot say."""

  name: str
  family: str
  is_control: bool
  contexts: tuple[Context, ...]
  variants: tuple[str, ...]
  accuracy: Band
  margin: Band
  accuracy_TC: np.ndarray
  margin_TC: np.ndarray
  judged: DatasetHops | None

  @property
  def n_items(self) -> int:
    """Items scored at every snapshot."""
    return sum(context.n_items for context in self.contexts)

  @property
  def n_hops(self) -> int:
    """Confirmed hops."""
    return len(self.judged.confirmed) if self.judged else 0


@dataclasses.dataclass(frozen=True)
class Analysis:
  """Everything that the monitors of one run say."""

  steps: np.ndarray
  datasets: tuple[Dataset, ...]  # without the controls; most hops first, then by family
  controls: ControlState | None  # all control items together
  control_datasets: tuple[Dataset, ...]
  control_states: dict[str, ControlState]  # by dataset
  hops: RunHops | None  # None where there are too few checkpoints, or contexts everywhere

  @property
  def is_long_enough(self) -> bool:
    """Enough checkpoints to tell a hop."""
    return len(self.steps) >= least_checkpoints()


def analysis_of(run_dir: RunDir) -> Analysis:
  """Returns what the margins of a run's monitors say, with the parity that was measured."""
  parity = read_parity(run_dir)
  return analyze(read_variants(run_dir.monitor_items, run_dir.monitor_scores),
                 parity.tolerance('margin') if parity else None)


def analyze(curves: Curves, parity: Mapping[str, float] | None = None,
            metric: str = 'margin') -> Analysis:
  """Returns the datasets of a run with their states and hops, and the state of its controls.

  Args:
    curves: of contexts by prompt variant.
    parity: by dataset, what two ways of scoring may differ by (`research.dynamics.parity`).
    metric: 'margin' or 'accuracy': what the detector looks at.
  """
  whole, variants = pooled(curves), variants_of(curves)
  n_contexts = {name: sum(context.dataset == name for context in whole.contexts)
                for name in variants}
  found = None
  if len(curves.steps) >= least_checkpoints() and max(n_contexts.values()) >= LEAST_CONTEXTS:
    found = hops_of_run(curves, metric, parity)
  judged = {row.name: row for row in found.datasets} if found else {}
  datasets = [_dataset(whole, name, tuple(variants[name]), judged.get(name))
              for name in sorted(variants)]
  controls = tuple(dataset for dataset in datasets if dataset.is_control)
  return Analysis(
      steps=curves.steps,
      datasets=tuple(sorted((dataset for dataset in datasets if not dataset.is_control),
                            key=lambda dataset: (-dataset.n_hops, dataset.judged is None,
                                                 dataset.family, dataset.name))),
      controls=controls_of(whole), control_datasets=controls,
      control_states={dataset.name: controls_of(whole, dataset.name) for dataset in controls},
      hops=found)


def _dataset(curves: Curves, name: str, variants: tuple[str, ...], judged: DatasetHops | None
             ) -> Dataset:
  own = curves.at([i for i, context in enumerate(curves.contexts) if context.dataset == name])
  n_items = [context.n_items for context in own.contexts]
  band = lambda values_TC, bounds: over_contexts(values_TC, n_items, [name] * len(n_items),
                                                 bounds=bounds)
  first = own.contexts[0]
  return Dataset(name, first.family, first.is_control, own.contexts, variants,
                 band(own.accuracy_TC, (0., 1.)), band(own.margin_TC, (-1., 1.)), own.accuracy_TC,
                 own.margin_TC, judged)
