"""Builds report.html, the figures and the tables of a run directory, finished or in progress."""

import html
import pathlib
import string

import plotly.offline
import pyarrow.parquet as pq

from research.dynamics.analysis import Analysis, analysis_of
from research.errors import UserError
from research.reports import facts, palette, payload, sections, words
from research.reports.figures import write_figures
from research.reports.records import Records, read_records
from research.reports.tables import write_tables
from research.run_dir import RunDir, write_whole

_HERE = pathlib.Path(__file__).parent


def build_report(run_dir: RunDir) -> pathlib.Path:
  """Returns the path of the report; writes it, the PNG figures and the CSV tables.

  The page is one file that needs no network. What the run has not recorded is left out.

  Raises:
    UserError: the directory does not exist, or one of its files cannot be used.
  """
  if not run_dir.path.is_dir():
    raise UserError(f'{run_dir.path} is not a run directory: it does not exist')
  records = read_records(run_dir)
  if not records.config and not records.metrics and not run_dir.monitor_scores.is_dir():
    raise UserError(f'{run_dir.path} is not a run directory: it has no config.json, metrics.jsonl '
                    'or monitors/scores')
  analysis = analysis_of(run_dir)
  write_whole(run_dir.report_html, page(run_dir, analysis, records))
  write_figures(run_dir, analysis, records)
  if len(analysis.steps):
    write_tables(run_dir, analysis)
  return run_dir.report_html


def page(run_dir: RunDir, analysis: Analysis, records: Records) -> str:
  """Returns the whole HTML document."""
  numbers = payload.build_payload(analysis, records)
  blocks = sections.body(analysis, records, numbers, read_examples(run_dir.monitor_items),
                         facts.run_facts(records))
  name = html.escape(str(records.config.get('name') or run_dir.path.name))
  template = string.Template((_HERE / 'report.html').read_text(encoding='utf-8'))
  return template.substitute(
      title=f'{name}: report', name=name,
      light=palette.css_variables(palette.LIGHT), dark=palette.css_variables(palette.DARK),
      style=(_HERE / 'report.css').read_text(encoding='utf-8'),
      chips=sections.chips(analysis, records),
      nav=''.join(f'<a href="#{anchor}">{label}</a>' for anchor, label, _ in blocks),
      kicker=html.escape(_kicker(analysis, records)),
      headline=html.escape(words.headline(analysis)),
      remarks=''.join(f'<p>{html.escape(text)}</p>' for text in words.remarks(analysis, records)),
      body=''.join(text for _, _, text in blocks),
      footer=html.escape(_footer(run_dir, analysis)),
      plotly=plotly.offline.get_plotlyjs(), payload=payload.as_script(numbers),
      script=(_HERE / 'report.js').read_text(encoding='utf-8'))


def read_examples(items_path: pathlib.Path) -> dict[str, sections.Example]:
  """Returns the first item of every dataset that is no control."""
  columns = ['dataset', 'is_control', 'prompt', 'generalizing', 'shortcut']
  if not items_path.is_file() or not set(columns) <= set(pq.read_schema(items_path).names):
    return {}
  examples = {}
  for row in pq.read_table(items_path, columns=columns).to_pylist():
    if not row['is_control']:
      examples.setdefault(row['dataset'], sections.Example(
          row['prompt'], row['generalizing'], row['shortcut']))
  return examples


def _kicker(analysis, records):
  data = records.config.get('data', {}).get('kind')
  parts = [f'Trained on {data}' if data else 'Run']
  if not facts.is_own(records.manifest):
    parts = [f'Weights of {records.config["name"]}']
  if len(analysis.steps):
    datasets = [*analysis.datasets, *analysis.control_datasets]
    parts.append(f'{words.count(sum(d.n_items for d in datasets), "item")} scored at '
                 f'{words.count(len(analysis.steps), "snapshot")}')
  if 'seed' in records.config and facts.is_own(records.manifest):
    parts.append(f'seed {records.config["seed"]}')
  return ', '.join(parts)


def _footer(run_dir, analysis):
  stride = max(1, -(-len(analysis.steps) // payload.MOST_POINTS))
  drawn = ''
  if stride > 1:
    drawn = f' One of {stride} snapshots is drawn; hops were looked for in all.'
  return (f'Made from the directory {run_dir.path.name} alone; PNG figures and CSV tables lie in '
          f'{run_dir.figures.name}/.{drawn}')
