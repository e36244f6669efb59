"""The report's pictures as PNG files, for papers, slides and the README."""

import pathlib

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from research.dynamics.analysis import Analysis, Family
from research.reports import words
from research.reports.palette import LIGHT
from research.reports.records import Records
from research.run_dir import RunDir

_STYLE = {'color': LIGHT['ink'], 'linewidth': 1.6}


def write_figures(run_dir: RunDir, analysis: Analysis, records: Records) -> list[pathlib.Path]:
  """Writes families.png, controls.png and loss.png where there is something in them."""
  run_dir.figures.mkdir(parents=True, exist_ok=True)
  made = {}
  if analysis.families:
    made['families'] = families_figure(analysis)
  if analysis.controls is not None:
    made['controls'] = controls_figure(analysis)
  if 'loss' in records.metrics:
    made['loss'] = loss_figure(records)
  paths = []
  for name, figure in made.items():
    paths.append(run_dir.figures / f'{name}.png')
    FigureCanvasAgg(figure).print_png(paths[-1], metadata={'Software': None})
  return paths


def families_figure(analysis: Analysis) -> Figure:
  """Returns small multiples: every family's accuracy, contexts and swings on one step axis."""
  families = analysis.families
  n_columns = min(3, len(families))
  n_rows = -(-len(families) // n_columns)
  figure = blank_figure(4.1 * n_columns, 2.3 * n_rows + 0.5)
  axes = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
  for axis, family in zip(axes, families):
    _draw_family(axis, analysis.steps, family)
  for axis in axes[len(families):]:
    axis.set_visible(False)
  _step_labels(axes[:len(families)], n_columns)
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


def _draw_family(axis, steps, family: Family):
  clean_axis(axis)
  axis.axhspan(0.7, 1, color=LIGHT['generalizing'], alpha=0.08, linewidth=0)
  axis.axhspan(0, 0.3, color=LIGHT['shortcut'], alpha=0.08, linewidth=0)
  axis.plot(steps, family.accuracy_TC, color=LIGHT['faint'], linewidth=0.6, alpha=0.5)
  axis.fill_between(steps, family.accuracy.low, family.accuracy.high, color=LIGHT['ink'],
                    alpha=0.15, linewidth=0)
  axis.plot(steps, family.accuracy.mean, **_STYLE)
  for judged in family.swings:
    swing = judged.swing
    up = swing.direction == 'up'
    color = LIGHT['generalizing' if up else 'shortcut']
    axis.plot((swing.leave_step + swing.arrive_step) / 2, 1.06 if up else -0.06,
              '^' if up else 'v', color=color, markersize=4, clip_on=False,
              markerfacecolor='none' if judged.claimed is False else color)
  axis.set(ylim=(-0.12, 1.12), yticks=[0, 0.5, 1])
  axis.set_title(f'{words.title(family.name)}: {words.verdict(family)[1]}', fontsize=9, loc='left',
                 color=LIGHT['ink'])


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
