"""The numbers of a report as CSV files: one row per family, one row per swing."""

import csv
import io

import numpy as np

from research.dynamics.analysis import Analysis, Family
from research.reports import words
from research.run_dir import RunDir, write_whole


def write_tables(run_dir: RunDir, analysis: Analysis) -> None:
  """Writes families.csv and swings.csv beside the figures."""
  write_whole(run_dir.figures / 'families.csv', families_csv(analysis))
  write_whole(run_dir.figures / 'swings.csv', swings_csv(analysis))


def families_csv(analysis: Analysis) -> str:
  """Returns one row per family, controls last; accuracies and margins of the last snapshot."""
  rows = [_family_row(family) for family in (*analysis.families, *analysis.control_families)]
  return _csv(_FAMILY_COLUMNS, rows)


def swings_csv(analysis: Analysis) -> str:
  """Returns one row per swing of every family that is not a control."""
  rows = []
  for family in analysis.families:
    for judged in family.swings:
      swing = judged.swing
      rows.append((
          family.name, swing.direction, swing.from_step, swing.leave_step, swing.arrive_step,
          swing.to_step, f'{swing.from_level:.4f}', f'{swing.to_level:.4f}',
          judged.n_contexts_moved, len(family.contexts),
          '' if judged.claimed is None else int(judged.claimed),
          int(judged.is_first_rise), int(judged.is_after_first_rise)))
  return _csv(_SWING_COLUMNS, rows)


_FAMILY_COLUMNS = (
    'family', 'is_control', 'n_items', 'n_contexts', 'n_datasets', 'n_snapshots', 'accuracy',
    'accuracy_low', 'accuracy_high', 'accuracy_min', 'accuracy_max', 'margin', 'first_rise_step',
    'n_swings', 'n_hops', 'n_hops_claimed', 'verdict')
_SWING_COLUMNS = (
    'family', 'direction', 'from_step', 'leave_step', 'arrive_step', 'to_step', 'from_level',
    'to_level', 'n_contexts_moved', 'n_contexts', 'claimed', 'is_first_rise', 'is_hop')


def _family_row(family: Family):
  accuracy = family.accuracy
  return (
      family.name, int(family.is_control), family.n_items, len(family.contexts),
      len(family.datasets), len(accuracy.mean), f'{accuracy.mean[-1]:.4f}',
      _number(accuracy.low[-1]), _number(accuracy.high[-1]), f'{accuracy.mean.min():.4f}',
      f'{accuracy.mean.max():.4f}', f'{family.margin.mean[-1]:.4f}',
      family.first_rise.swing.arrive_step if family.first_rise else '', len(family.swings),
      len(family.hops), sum(judged.claimed is True for judged in family.hops),
      words.verdict(family)[1])


def _number(value):
  return f'{value:.4f}' if np.isfinite(value) else ''


def _csv(columns, rows):
  text = io.StringIO()
  writer = csv.writer(text, lineterminator='\n')
  writer.writerow(columns)
  writer.writerows(rows)
  return text.getvalue()
