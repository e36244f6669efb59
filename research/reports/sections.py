"""The HTML of a report's sections: panels for the charts to fill, and tables."""

import html
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from research.dynamics.analysis import Analysis, Family
from research.dynamics.swings import LEAST_SNAPSHOTS
from research.reports import words
from research.reports.facts import Facts, n_parameters, shown_manifest
from research.reports.records import Records

escape = html.escape


class Example(NamedTuple):
  """One monitor item of a family: what the model reads and its two possible answers."""

  prompt: str
  generalizing: str
  shortcut: str


def chips(analysis: Analysis, records: Records) -> str:
  """Returns the facts that stay in view: progress, hops, controls, tokens, size."""
  parts = [_progress_chip(records)]
  if len(analysis.steps) >= LEAST_SNAPSHOTS and analysis.families:
    hops = sum(words.counted_hops(f) for f in analysis.families if f.is_large_enough)
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
  if analysis.families:
    sections.append(('overview', 'Overview', _overview()))
    sections.append(('families', 'Families', _families(analysis, examples)))
  if analysis.controls is not None:
    sections.append(('controls', 'Controls', _controls(analysis)))
  if analysis.families:
    sections.append(('swings', 'Swings', _swings(analysis, records)))
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


def _overview():
  key = ('<div class="key"><span>shortcut<i class="ramp"></i>generalizing</span>'
         '<span>▲▼ a swing, hollow while the controls were restless</span>'
         '<span>drag to zoom every chart, double-click to see all</span></div>')
  return _head('Which mode, when', 'Accuracy of every family at every snapshot.') + _panel(
      '', 'overview', badge=key, identity='panel-overview')


def _families(analysis, examples):
  key = ('<span class="key"><span><i class="swatch"></i>mean</span>'
         '<span><i class="swatch band"></i>95% over demonstration contexts</span>'
         '<span><i class="swatch thin"></i>one context</span>'
         '<span><i class="swatch generalizing"></i>generalizing</span>'
         '<span><i class="swatch shortcut"></i>shortcut</span></span>')
  panels = ''.join(_family(i, f, examples.get(f.name)) for i, f in enumerate(analysis.families))
  return _head('Families', key) + f'<div class="grid">{panels}</div>'


def _family(index, family: Family, example):
  kind, text = words.verdict(family)
  size = ', '.join(words.count(n, noun) for n, noun in (
      (family.n_items, 'item'), (len(family.contexts), 'context'),
      (len(family.datasets), 'dataset')))
  after = f'<details><summary>{size}</summary>{_example(example)}</details>'
  return _panel(
      escape(words.title(family.name)), f'family:{index}', identity=f'family-{index}',
      badge=f'<span class="verdict {kind}">{text}</span>', after=after,
      note=f'<p class="panel-note">{words.note(family.name)}</p>')


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
  badge = f'<span class="verdict {"generalizing" if calm else "fell"}">{_calm_word(calm)}</span>'
  rows = ''.join(_control_row(name, state) for name, state in analysis.control_states.items())
  table = _table(('Control', '#Items', '#Level', '#Tolerance', '#Settled at step',
                  '#Largest deviation', 'After settling'), rows)
  text = escape(words.control_sentence(analysis))
  panel = _panel('All controls', 'controls', badge=badge)
  return _head('Controls', text) + f'<div class="beside">{panel}{table}</div>'


def _control_row(name, state):
  settled = '–' if state.settled_step is None else f'{state.settled_step:,}'
  deviation = '–' if state.settled_step is None else f'{100 * state.largest_deviation:.1f} points'
  return _row((escape(name), f'#{state.n_items:,}', f'#{100 * state.level:.1f}%',
               f'#± {100 * state.tolerance:.1f} points', f'#{settled}', f'#{deviation}',
               _calm_word(state.calm)))


def _swings(analysis, records):
  rows = [_swing_row(i, family, judged, records)
          for i, family in enumerate(analysis.families) for judged in family.swings]
  text = ('A swing runs between alternating extremes at least 0.4 apart in accuracy, each held for '
          'two consecutive snapshots. Choose a row to see it in every chart.')
  if not rows:
    return _head('Swings', text) + '<p class="empty">No family made a swing.</p>'
  return _head('Swings', text) + _table(
      ('Family', 'Towards', '#Leaves at step', '#Arrives at step', '#Tokens', 'Accuracy',
       '#Contexts that moved', 'Controls', 'Counts as'), ''.join(rows))


def _swing_row(index, family, judged, records):
  swing = judged.swing
  up = swing.direction == 'up'
  low, high = sorted((swing.from_level, swing.to_level))
  move = (f'{swing.from_level:.2f}<span class="move"><i class="{swing.direction}" '
          f'style="left:{100 * low:.1f}%;width:{100 * (high - low):.1f}%"></i></span>'
          f'{swing.to_level:.2f}')
  tokens = records.tokens_at([swing.arrive_step])
  role = 'hop' if judged.is_after_first_rise else 'first rise' if judged.is_first_rise else 'fall'
  if judged.is_after_first_rise and judged.claimed is False:
    role = 'not claimed'
  controls = {None: '<span class="quiet">none</span>', True: 'calm', False: 'restless'}
  cells = (
      escape(words.title(family.name)),
      f'<span class="mark-{swing.direction}">{"▲ generalizing" if up else "▼ shortcut"}</span>',
      f'#{swing.leave_step:,}', f'#{swing.arrive_step:,}',
      '#–' if tokens is None else f'#{words.short(tokens[0])}', move,
      f'#{judged.n_contexts_moved} of {len(family.contexts)}', controls[judged.claimed], role)
  return _row(cells, f' tabindex="0" data-panel="family-{index}" data-from="{swing.leave_step}" '
              f'data-to="{swing.arrive_step}"')


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
<p><b>Accuracy</b> is the share of a family's items whose generalizing answer has a higher
log-probability than the shortcut answer. <b>Margin</b> is the mean probability of the generalizing
answer minus that of the shortcut, from -1 to 1; it stays near 0 where the model gives little to
either.</p>
<p><b>Context</b>: the items of one dataset that share one set of demonstrations. Items within a
context are not independent, so the interval is a 95% Student t interval over contexts, stratified
by dataset, never over items.</p>
<p><b>Swing</b>: a move between alternating extremes at least 0.4 apart, where a high extreme is the
lower of two consecutive snapshots and a low one the higher of two. A swing leaves at the last
snapshot within a quarter of the way of the old extreme and arrives at the first within a quarter of
the new one. The first upward swing is the family's first rise; the swings after it are hops.
A family counts from 400 items in 4 contexts on.</p>
<p><b>Controls</b> are items of ordinary documents, which no shortcut contests. They are calm while
their accuracy stays within 3 points, or 4 binomial standard errors where that is more, of the
median over the last half of the run. A swing is claimed only while they are, one snapshot on
either side included.</p></div></details>"""
