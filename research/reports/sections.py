"""The HTML of a report's sections: panels for the charts to fill, and tables."""

import html
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from research.dynamics.analysis import Analysis, Dataset
from research.dynamics.states import State
from research.reports import words
from research.reports.facts import Facts, n_parameters, shown_manifest
from research.reports.records import Records

escape = html.escape


class Example(NamedTuple):
  """One monitor item of a dataset: what the model reads and its two possible answers."""

  prompt: str
  generalizing: str
  shortcut: str


def chips(analysis: Analysis, records: Records) -> str:
  """Returns the facts that stay in view: progress, hops, controls, tokens, size."""
  parts = [_progress_chip(records)]
  if analysis.hops and analysis.datasets:
    hops = sum(dataset.n_hops for dataset in analysis.datasets)
    parts.append(_chip('news' if hops else '', f'<b>{words.count(hops, "hop")}</b>'))
  if analysis.controls is not None:
    calm = analysis.controls.calm
    parts.append(_chip('good' if calm else 'alert', f'controls <b>{_calm_word(calm)}</b>'))
  if 'tokens' in records.metrics:
    tokens = words.short(records.metrics['tokens'].values[-1])
    parts.append(_chip('', f'<b>{tokens}</b> tokens'))
  size = n_parameters(records.manifest)
  if size is not None:
    parts.append(_chip('', f'<b>{words.short(size)}</b> parameters'))
  return ''.join(parts)


def body(analysis: Analysis, records: Records, payload: dict[str, Any],
         examples: dict[str, Example], facts: Facts) -> list[tuple[str, str, str]]:
  """Returns (anchor, name in the navigation, HTML) of every section that has something to show."""
  sections = []
  if analysis.datasets:
    sections.append(('overview', 'Overview', _overview(analysis)))
    sections.append(('datasets', 'Datasets', _datasets(analysis, examples)))
  if analysis.controls is not None:
    sections.append(('controls', 'Controls', _controls(analysis)))
  if analysis.hops:
    sections.append(('hops', 'Hops', _hops(analysis, records)))
  if payload['training'] or payload['others']:
    sections.append(('training', 'Training', _training(payload)))
  sections.append(('run', 'Run', _run(records, facts)))
  return [(anchor, name, f'<section class="block" id="{anchor}">{text}</section>')
          for anchor, name, text in sections]


def _chip(kind, text):
  return f'<span class="chip {kind}">{text}</span>'


def _calm_word(calm):
  return 'calm' if calm else 'restless'


def _progress_chip(records):
  if records.n_steps is None or records.is_finished:
    return _chip('', f'step <b>{records.last_step:,}</b>')
  share = f'{100 * records.last_step / records.n_steps:.0f}%'
  return _chip('', f'in progress, step <b>{records.last_step:,}</b> of '
               f'{records.n_steps:,} ({share})')


def _head(heading, text=''):
  return f'<div class="block-head"><h2>{heading}</h2><p>{text}</p></div>'


def _panel(heading, chart, *, badge='', note='', after='', identity=''):
  heading = f'<h3>{heading}</h3>' if heading else ''
  identity = f' id="{identity}"' if identity else ''
  return (f'<div class="panel"{identity}><div class="panel-head">{heading}{badge}'
          f'<span class="reading"></span></div>{note}'
          f'<div class="chart" data-chart="{chart}"></div>{after}</div>')


def _overview(analysis):
  key = ('<div class="key"><span>pattern<i class="ramp"></i>generalizing</span>'
         '<span>▲▼ a hop, hollow while the controls were restless</span>'
         '<span>drag to zoom every chart, double-click to see all</span></div>')
  text = ('The state of every dataset at every snapshot; in between: uncertain.' if analysis.hops
          else 'Accuracy of every dataset at every snapshot; too little for states.')
  return _head('Which mode, when', text) + _panel(
      '', 'overview', badge=key, identity='panel-overview')


def _datasets(analysis, examples):
  key = ('<span class="key"><span><i class="swatch"></i>mean</span>'
         '<span><i class="swatch band"></i>95% over demonstration contexts</span>'
         '<span><i class="swatch thin"></i>one context</span>'
         '<span><i class="swatch generalizing"></i>generalizing</span>'
         '<span><i class="swatch shortcut"></i>pattern</span></span>')
  panels = ''.join(_dataset(i, d, examples.get(d.name)) for i, d in enumerate(analysis.datasets))
  return _head('Datasets', key) + f'<div class="grid">{panels}</div>'


def _dataset(index, dataset: Dataset, example):
  kind, text = words.verdict(dataset)
  size = ', '.join(words.count(n, noun) for n, noun in (
      (dataset.n_items, 'item'), (len(dataset.contexts), 'context'),
      (len(dataset.variants), 'prompt variant')))
  after = f'<details><summary>{size}</summary>{_example(example)}</details>'
  return _panel(
      escape(words.title(dataset.name)), f'dataset:{index}', identity=f'dataset-{index}',
      badge=f'<span class="verdict {kind}">{text}</span>', after=after,
      note=f'<p class="panel-note">{words.note(dataset.family)}</p>')


def _example(example):
  if example is None:
    return ''
  rows = (('prompt', '', example.prompt),
          ('general rule', 'answer-generalizing', example.generalizing),
          ('shortcut', 'answer-shortcut', example.shortcut))
  lines = ''.join(
      f'<dt>{name}</dt><dd class="{kind}">{escape(text)}</dd>' for name, kind, text in rows)
  return f'<dl class="example">{lines}</dl>'


def _controls(analysis):
  calm = analysis.controls.calm
  kind = 'generalizing' if calm else 'restless'
  badge = f'<span class="verdict {kind}">{_calm_word(calm)}</span>'
  rows = ''.join(_control_row(name, state) for name, state in analysis.control_states.items())
  table = _table(('Control', '#Items', '#Level', '#Tolerance', '#Settled at step',
                  '#Largest deviation', 'After settling'), rows)
  text = escape(words.control_sentence(analysis))
  panel = _panel('All controls', 'controls', badge=badge, identity='panel-controls')
  return _head('Controls', text) + f'<div class="beside">{panel}{table}</div>'


def _control_row(name, state):
  settled = '–' if state.settled_step is None else f'{state.settled_step:,}'
  deviation = '–' if state.settled_step is None else f'{100 * state.largest_deviation:.1f} points'
  return _row((escape(name), f'#{state.n_items:,}', f'#{100 * state.level:.1f}%',
               f'#± {100 * state.tolerance:.1f} points', f'#{settled}', f'#{deviation}',
               _calm_word(state.calm)))


def _hops(analysis, records):
  datasets = [*analysis.datasets, *analysis.control_datasets]
  rows = [_hop_row(i, dataset, called, analysis.steps, records)
          for i, dataset in enumerate(datasets) if dataset.judged for called in dataset.judged.hops]
  text = ('Sudden changes between two confident states, each held on its side. Choose a row to see '
          'it in every chart.')
  hops = _table(('Dataset', 'Towards', '#Between steps', '#Tokens', '#Change of margin, 95%',
                 '#Adjusted p', '#Prompt variants', 'Controls', 'Counts as'), ''.join(rows)
                ) if rows else '<p class="empty">No dataset hopped.</p>'
  states = _table(('Dataset', '#Generalizing', '#Uncertain', '#Pattern', '#Least detectable hop',
                   '#Parity tolerance'), ''.join(_state_row(d) for d in datasets if d.judged))
  return _head('Hops', text) + hops + states


def _hop_row(index, dataset, called, steps, records):
  hop = called.hop
  before, after = int(steps[hop.before]), int(steps[hop.after])
  tokens = records.tokens_at([after])
  controls = {None: '<span class="quiet">none</span>', True: 'calm', False: 'restless'}
  role = 'a control that moved' if dataset.is_control else (
      'hop' if hop.is_confirmed else 'not confirmed')
  mark = ('up', '▲ generalizing') if hop.direction > 0 else ('down', '▼ pattern')
  cells = (
      escape(words.title(dataset.name)), f'<span class="mark-{mark[0]}">{mark[1]}</span>',
      f'#{before:,} to {after:,}', '#–' if tokens is None else f'#{words.short(tokens[0])}',
      f'#{hop.change:+.2f} [{called.interval[0]:+.2f}, {called.interval[1]:+.2f}]',
      f'#{hop.adjusted_p:.2g}',
      f'#{called.n_agreeing} of {called.n_variants}',
      controls[hop.is_calm], role)
  panel = 'panel-controls' if dataset.is_control else f'dataset-{index}'
  return _row(cells, f' tabindex="0" data-panel="{panel}" data-from="{before}" data-to="{after}"')


def _state_row(dataset):
  share = dataset.judged.occupancy
  return _row((
      escape(words.title(dataset.name)),
      *(f'#{100 * share[state]:.0f}%' for state in (State.GENERALIZING, State.UNCERTAIN,
                                                    State.PATTERN)),
      f'#{dataset.judged.least_detectable:.2f}', f'#{dataset.judged.tolerance:.4f}'))


def _table(heads: Sequence[str], rows: str) -> str:
  """A table; heads and cells that start with # are numbers."""
  cells = ''.join(_cell('th', head) for head in heads)
  return (f'<div class="table-wrap"><table><thead><tr>{cells}</tr></thead>'
          f'<tbody>{rows}</tbody></table></div>')


def _row(cells, attributes=''):
  return f'<tr{attributes}>' + ''.join(_cell('td', cell) for cell in cells) + '</tr>'


def _cell(tag, text):
  kind = ' class="number"' if text.startswith('#') else ''
  return f'<{tag}{kind}>{text.removeprefix("#")}</{tag}>'


def _training(payload):
  def grid(name):
    panels = ''.join(
        _panel(escape(panel['title']), f'{name}:{i}',
               badge=f'<span class="unit">{escape(panel["unit"])}</span>')
        for i, panel in enumerate(payload[name]))
    return f'<div class="grid small">{panels}</div>'
  text = _head('Training') + grid('training')
  if payload['others']:
    heading = f'Everything else that was recorded ({len(payload["others"])})'
    text += (f'<div class="folds"><details class="charts"><summary>{heading}</summary>'
             f'{grid("others")}</details></div>')
  return text


def _run(records, facts):
  lists = [
      (name, ''.join(f'<dt>{escape(label)}</dt><dd>{escape(value)}</dd>' for label, value in rows))
      for name, rows in facts]
  groups = ''.join(f'<div><h3>{escape(name)}</h3><dl>{rows}</dl></div>' for name, rows in lists)
  trees = (('Config', records.config), ('Manifest', shown_manifest(records.manifest)))
  folds = ''.join(
      f'<details><summary>{name}</summary><pre>{escape(json.dumps(tree, indent=2))}</pre></details>'
      for name, tree in trees if tree)
  return (_head('The run') + f'<div class="facts">{groups}</div>'
          f'<div class="folds">{_METHOD}{folds}</div>')


_METHOD = """<details><summary>How to read this page</summary><div class="method">
<p><b>Accuracy</b> is the share of a dataset's items whose generalizing answer has a higher
log-probability than the shortcut answer. <b>Margin</b> is the mean probability of the generalizing
answer minus that of the shortcut, from -1 to 1; it stays near 0 where the model gives little to
either.</p>
<p><b>Context</b>: the items of one dataset that share one set of demonstrations, with all their
prompt variants. Items within a context are not independent, so the interval is a 95% Student t
interval over contexts, never over items.</p>
<p><b>State</b>: generalizing or pattern where the mean margin lies beyond 0 with false discoveries
held at 5% over all datasets and snapshots; else uncertain.</p>
<p><b>Hop</b>: a step between two flanks of six snapshots beside a common slope, false discoveries
held at 5%, both flanks confident and opposite, every snapshot on its side. A change that takes many
snapshots is a rise, no hop. Prompt variants: how often the same hop is found in the items of one
variant alone.</p>
<p><b>Parity tolerance</b>: how far float32 and bfloat16 scores differ, kept off the center; zero
until launchers.hops has measured it.</p>
<p><b>Controls</b> are items of ordinary documents, which no shortcut contests. They are calm while
their accuracy stays within 3 points, or 4 binomial standard errors where that is more, of the
median over the last half of the run. A hop is confirmed only where they are, through both of its
flanks.</p></div></details>"""
