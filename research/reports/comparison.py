"""The picture of a counterfactual: monitors and loss of both runs, changed windows shaded."""

from collections.abc import Sequence
import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from research.data.edits import Edit
from research.dynamics.counterfactual import Compared
from research.reports import words
from research.reports.figures import blank_figure, clean_axis
from research.reports.palette import LIGHT

_COLORS = {'original': LIGHT['ink'], 'changed': LIGHT['shortcut']}


def write_comparison(path: pathlib.Path, compared: Sequence[Compared], edits: Sequence[Edit]
                     ) -> None:
  """Writes `comparison_figure` as PNG."""
  FigureCanvasAgg(comparison_figure(compared, edits)).print_png(path, metadata={'Software': None})


def comparison_figure(compared: Sequence[Compared], edits: Sequence[Edit]) -> Figure:
  """Returns one panel per quantity with both courses, bands where there are contexts."""
  n_columns = min(3, len(compared))
  n_rows = -(-len(compared) // n_columns)
  figure = blank_figure(4.1 * n_columns, 2.3 * n_rows + 0.5)
  axes = figure.subplots(n_rows, n_columns, sharex=True, squeeze=False).ravel()
  for axis, quantity in zip(axes, compared):
    _draw(axis, quantity, edits)
  for axis in axes[len(compared):]:
    axis.set_visible(False)
  axes[0].legend(frameon=False, fontsize=8)
  figure.suptitle('; '.join(map(str, edits)), fontsize=10, x=0.01, ha='left', color=LIGHT['ink'])
  return figure


def _draw(axis, quantity: Compared, edits: Sequence[Edit]) -> None:
  clean_axis(axis)
  for edit in edits:
    for a, b in edit.changed:
      axis.axvspan(a, b, color=LIGHT['second'], alpha=0.18, linewidth=0)
  for name, color in _COLORS.items():
    band = getattr(quantity, name)
    axis.plot(quantity.steps, band.mean, color=color, linewidth=1.3, label=name)
    if not np.isnan(band.low).all():
      axis.fill_between(quantity.steps, band.low, band.high, color=color, alpha=0.15, linewidth=0)
  if not quantity.name.endswith('loss'):
    axis.set(ylim=(-0.05, 1.05))
  axis.set_title(f'{words.title(quantity.name)}: {quantity.gap:+.3f} after the change', fontsize=9,
                 loc='left', color=LIGHT['ink'])
  axis.set_xlabel('step', fontsize=9)
