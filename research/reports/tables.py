"""The numbers of a report as CSV files: one row per dataset, one row per hop."""

import csv
import io

import numpy as np

from research.dynamics.analysis import Analysis, Dataset
from research.dynamics.states import State
from research.reports import words
from research.run_dir import RunDir, write_whole


def write_tables(run_dir: RunDir, analysis: Analysis) -> None:
  """Writes datasets.csv and hops.csv beside the figures."""
  write_whole(run_dir.figures / 'datasets.csv', datasets_csv(analysis))
  write_whole(run_dir.figures / 'hops.csv', hops_csv(analysis))


def datasets_csv(analysis: Analysis) -> str:
  """Returns one row per dataset, controls last; accuracies and margins of the last snapshot."""
  rows = [_dataset_row(dataset) for dataset in (*analysis.datasets, *analysis.control_datasets)]
  return _csv(_DATASET_COLUMNS, rows)


def hops_csv(analysis: Analysis) -> str:
  """Returns one row per hop that was called, confirmed or not."""
  rows = []
  for dataset in (*analysis.datasets, *analysis.control_datasets):
    for called in dataset.judged.hops if dataset.judged else ():
      hop = called.hop
      rows.append((
          dataset.name, int(dataset.is_control), 'up' if hop.direction > 0 else 'down',
          int(analysis.steps[hop.before]), int(analysis.steps[hop.after]), f'{hop.change:.4f}',
          *(f'{bound:.4f}' for bound in called.interval), f'{hop.adjusted_p:.3g}',
          '' if hop.is_calm is None else int(hop.is_calm), int(hop.is_confirmed),
          called.n_agreeing, called.n_variants))
  return _csv(_HOP_COLUMNS, rows)


_DATASET_COLUMNS = (
    'dataset', 'family', 'is_control', 'n_items', 'n_contexts', 'n_variants', 'n_snapshots',
    'accuracy', 'accuracy_low', 'accuracy_high', 'accuracy_min', 'accuracy_max', 'margin',
    'generalizing', 'pattern', 'n_hops', 'n_hops_confirmed', 'least_detectable', 'verdict')
_HOP_COLUMNS = (
    'dataset', 'is_control', 'direction', 'before_step', 'after_step', 'change', 'change_low',
    'change_high', 'adjusted_p', 'controls_calm', 'is_confirmed', 'n_variants_found', 'n_variants')


def _dataset_row(dataset: Dataset):
  accuracy, judged = dataset.accuracy, dataset.judged
  told = ('', '', '', '', '') if judged is None else (
      f'{judged.occupancy[State.GENERALIZING]:.4f}', f'{judged.occupancy[State.PATTERN]:.4f}',
      len(judged.hops), len(judged.confirmed), f'{judged.least_detectable:.4f}')
  return (
      dataset.name, dataset.family, int(dataset.is_control), dataset.n_items,
      len(dataset.contexts), len(dataset.variants), len(accuracy.mean), f'{accuracy.mean[-1]:.4f}',
      _number(accuracy.low[-1]), _number(accuracy.high[-1]), f'{accuracy.mean.min():.4f}',
      f'{accuracy.mean.max():.4f}', f'{dataset.margin.mean[-1]:.4f}', *told,
      words.verdict(dataset)[1])


def _number(value):
  return f'{value:.4f}' if np.isfinite(value) else ''


def _csv(columns, rows):
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(columns)
  writer.writerows(rows)
  return text.getvalue()
