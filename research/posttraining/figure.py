"""The picture of fine-tunes: what every dataset's items and free answers say before and after."""

import pathlib
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from research.posttraining.outcomes import Outcome
from research.reports import words
from research.reports.figures import blank_figure, clean_axis
from research.reports.palette import LIGHT

# measure -> form of its line; those of free answers that are not drawn are in the tables.
_LINES = {'accuracy': '-', 'free generalizing': ':'}
_COLORS = {'before': LIGHT['soft'], 'after': LIGHT['shortcut']}


def write_finetunes(path: pathlib.Path, family: str, outcomes: Sequence[Outcome]) -> None:
  """Writes `finetunes_figure` as PNG, where there is something to draw."""
  if figure := finetunes_figure(family, outcomes):
    FigureCanvasAgg(figure).print_png(path, metadata={'Software': None})


def finetunes_figure(family: str, outcomes: Sequence[Outcome]) -> Figure | None:
  """Returns a panel per dataset: accuracy and share of free answers by step, with intervals."""
  drawn = [one for one in outcomes if one.measure in _LINES]
  datasets = list(dict.fromkeys((one.dataset, one.is_control) for one in drawn))
  if not datasets:
    return None
  n_columns = min(3, len(datasets))
  n_rows = -(-len(datasets) // n_columns)
  figure = blank_figure(4.1 * n_columns, 2.3 * n_rows + 0.5)
  axes = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
  for axis, (dataset, is_control) in zip(axes, datasets):
    clean_axis(axis)
    axis.axhline(0.5, color=LIGHT['faint'], linewidth=0.6)
    for measure in _LINES:
      _draw(axis, measure, [one for one in drawn if (one.dataset, one.measure) == (
          dataset, measure)])
    axis.set(ylim=(-0.05, 1.05), xlabel='step of the checkpoint')
    axis.set_title(words.title(dataset) + (', control' if is_control else ''), fontsize=9,
                   loc='left', color=LIGHT['ink'])
  for axis in axes[len(datasets):]:
    axis.set_visible(False)
  figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4,
                frameon=False, fontsize=8)
  figure.suptitle(f'Fine-tunes on {family}: accuracy of items, share of free answers', fontsize=10,
                  x=0.01, ha='left', color=LIGHT['ink'])
  return figure


def _draw(axis, measure: str, rows: Sequence[Outcome]) -> None:
  if not rows:
    return
  steps = [one.step for one in rows]
  for when, color in _COLORS.items():
    mean, low, high = (np.array([getattr(one, when + end) for one in rows])
                       for end in ('', '_low', '_high'))
    axis.plot(steps, mean, _LINES[measure], marker='o', markersize=3, color=color, linewidth=1.3,
              label=f'{measure}, {when}')
    axis.vlines(steps, low, high, color=color, alpha=0.45, linewidth=2.5)
