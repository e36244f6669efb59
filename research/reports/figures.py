"""The report's pictures as PNG files, for papers, slides and the README."""

import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from research.dynamics.analysis import Analysis, Dataset
from research.dynamics.states import State
from research.reports import words
from research.reports.palette import LIGHT
from research.reports.records import Records
from research.run_dir import RunDir

_STYLE = {'color': LIGHT['ink'], 'linewidth': 1.6}


def write_figures(run_dir: RunDir, analysis: Analysis, records: Records) -> list[pathlib.Path]:
  """Writes datasets.png, controls.png and loss.png where there is something in them."""
  run_dir.figures.mkdir(parents=True, exist_ok=True)
  made = {}
  if analysis.datasets:
    made['datasets'] = datasets_figure(analysis)
  if analysis.controls is not None:
    made['controls'] = controls_figure(analysis)
  if 'loss' in records.metrics:
    made['loss'] = loss_figure(records)
  paths = []
  for name, figure in made.items():
    paths.append(run_dir.figures / f'{name}.png')
    FigureCanvasAgg(figure).print_png(paths[-1], metadata={'Software': None})
  return paths


def datasets_figure(analysis: Analysis) -> Figure:
  """Returns small multiples: accuracy, contexts, states and hops of every dataset by step."""
  datasets = analysis.datasets
  n_columns = min(3, len(datasets))
  n_rows = -(-len(datasets) // n_columns)
  figure = blank_figure(4.1 * n_columns, 2.3 * n_rows + 0.5)
  axes = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
  for axis, dataset in zip(axes, datasets):
    _draw_dataset(axis, analysis.steps, dataset)
  for axis in axes[len(datasets):]:
    axis.set_visible(False)
  _step_labels(axes[:len(datasets)], n_columns)
  figure.suptitle(words.headline(analysis), fontsize=11, x=0.01, ha='left', color=LIGHT['ink'])
  return figure


def controls_figure(analysis: Analysis) -> Figure:
  """Returns the controls' accuracy with the tolerance around their level."""
  state = analysis.controls
  figure = blank_figure(6.4, 2.8)
  axis = figure.subplots()
  clean_axis(axis)
  for name, dataset in analysis.control_states.items():
    axis.plot(dataset.steps, dataset.accuracy, color=LIGHT['control'], alpha=0.4, linewidth=0.9,
              label=name)
  axis.axhspan(state.level - state.tolerance, state.level + state.tolerance,
               color=LIGHT['control'], alpha=0.15, linewidth=0)
  axis.plot(state.steps, state.accuracy, color=LIGHT['control'], linewidth=1.8)
  axis.set(ylim=(-0.03, 1.05), xlabel='step', ylabel='accuracy')
  axis.set_title(words.control_sentence(analysis), fontsize=9, loc='left')
  return figure


def loss_figure(records: Records) -> Figure:
  """Returns training and held-out loss in nats per token."""
  figure = blank_figure(6.4, 2.8)
  axis = figure.subplots()
  clean_axis(axis)
  loss = records.metrics['loss']
  axis.plot(loss.steps, loss.values, color=LIGHT['training'], linewidth=1.1, label='training')
  if 'heldout_loss' in records.evals:
    heldout = records.evals['heldout_loss']
    axis.plot(heldout.steps, heldout.values, 'o-', color=LIGHT['second'], markersize=3,
              linewidth=1.2, label='held out')
  finite = loss.values[np.isfinite(loss.values)]
  if len(finite):
    axis.set_ylim(top=1.05 * float(finite.max()))
  axis.set(xlabel='step', ylabel='nats per token')
  axis.legend(frameon=False, fontsize=8)
  return figure


def _draw_dataset(axis, steps, dataset: Dataset):
  """Bars below say the state of every checkpoint, triangles the hops, hollow unless confirmed."""
  clean_axis(axis)
  axis.plot(steps, dataset.accuracy_TC, color=LIGHT['faint'], linewidth=0.6, alpha=0.5)
  axis.fill_between(steps, dataset.accuracy.low, dataset.accuracy.high, color=LIGHT['ink'],
                    alpha=0.15, linewidth=0)
  axis.plot(steps, dataset.accuracy.mean, **_STYLE)
  if dataset.judged:
    for state, name in ((State.GENERALIZING, 'generalizing'), (State.PATTERN, 'shortcut')):
      axis.fill_between(steps, -0.12, -0.06, where=dataset.judged.states == state, step='mid',
                        color=LIGHT[name], linewidth=0)
    for hop in (called.hop for called in dataset.judged.hops):
      color = LIGHT['generalizing' if hop.direction > 0 else 'shortcut']
      axis.plot((steps[hop.before] + steps[hop.after]) / 2, 1.06,
                '^' if hop.direction > 0 else 'v', color=color, markersize=5, clip_on=False,
                markerfacecolor=color if hop.is_confirmed else 'none')
  axis.set(ylim=(-0.12, 1.12), yticks=[0, 0.5, 1])
  axis.set_title(f'{words.title(dataset.name)}: {words.verdict(dataset)[1]}', fontsize=9,
                 loc='left', color=LIGHT['ink'])


def blank_figure(width: float, height: float) -> Figure:
  """Returns an empty figure of so many inches."""
  return Figure(figsize=(width, height), dpi=150, layout='constrained')


def clean_axis(axis) -> None:
  """Draws an axis plainly: two spines, a grid behind the curves."""
  axis.spines[['top', 'right']].set_visible(False)
  axis.spines[['left', 'bottom']].set_color(LIGHT['faint'])
  axis.grid(color=LIGHT['grid'])
  axis.set_axisbelow(True)
  axis.tick_params(labelsize=8, colors=LIGHT['soft'])


def _step_labels(axes, n_columns):
  for axis in axes[-n_columns:]:
    axis.set_xlabel('step', fontsize=9)
    axis.tick_params(labelbottom=True)
  for axis in axes[::n_columns]:
    axis.set_ylabel('accuracy', fontsize=9)
