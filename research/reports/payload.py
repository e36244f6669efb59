"""The numbers that the page draws, as one JSON object."""

import json
from typing import Any

import numpy as np

from research.dynamics.analysis import Analysis, Dataset
from research.reports import words
from research.reports.records import Records, Series

MOST_POINTS = 1500  # drawn per curve; more are not visible and make the page slow
_TRAINING = (  # (title, unit, vertical axis, [(label, table, key)])
    ('Loss', 'nats/token', 'free',
     (('training', 'metrics', 'loss'), ('held out', 'evals', 'heldout_loss'))),
    ('Bits per byte', 'held out', 'free', (('held out', 'evals', 'bits_per_byte'),)),
    ('Gradient norm', 'log scale', 'log', (('gradient norm', 'metrics', 'grad_norm'),)),
    ('Learning rate', '', 'zero', (('learning rate', 'metrics', 'learning_rate'),)),
    ('Expert load', 'fullest over mean', 'free',
     (('fullest expert over the mean', 'metrics', 'expert_max_load'),)),
    ('Tokens per second', '', 'zero', (('tokens per second', 'timings', 'tokens_per_second'),)),
    ('MFU', 'share of peak', 'zero', (('MFU', 'timings', 'mfu'),)),
)


def build_payload(analysis: Analysis, records: Records) -> dict[str, Any]:
  """Returns everything that report.js reads; numbers rounded, NaN as None."""
  stride = max(1, -(-len(analysis.steps) // MOST_POINTS))
  steps = analysis.steps[::stride]
  last = max([records.last_step, records.n_steps or 0, *analysis.steps[-1:].tolist()])
  tokens = records.tokens_at(np.array([0, *np.linspace(1, last, 200)]))
  return {
      'lastStep': last,
      'recordedStep': max([records.last_step, *analysis.steps[-1:].tolist()]),
      'isFinished': records.is_finished,
      'tokens': None if tokens is None else rounded(tokens, 0),
      'tokenSteps': rounded(np.array([0, *np.linspace(1, last, 200)]), 1),
      'snapshots': steps.tolist(),
      'stride': stride,
      'datasets': [_dataset(dataset, analysis, stride) for dataset in analysis.datasets],
      'controls': _controls(analysis, stride),
      'training': _panels(records),
      'others': _other_panels(records),
  }


def as_script(payload: dict[str, Any]) -> str:
  """Returns JSON that is safe between script tags."""
  text = json.dumps(payload, allow_nan=False, separators=(',', ':'))
  return text.replace('<', '\\u003c').replace('\u2028', '\\u2028').replace('\u2029', '\\u2029')


def rounded(values: np.ndarray, digits: int = 4) -> list[float | None]:
  """Returns a list with `digits` decimals; what is not finite becomes None."""
  return [round(float(v), digits) if np.isfinite(v) else None for v in values]


def significant(values: np.ndarray) -> list[float | None]:
  """Returns a list with five significant digits; what is not finite becomes None."""
  return [float(f'{v:.5g}') if np.isfinite(v) else None for v in values]


def thinned(series: Series, most: int = MOST_POINTS) -> dict[str, list]:
  """Returns steps and values; long series as means of equal bins with their extremes."""
  steps, values = series.steps, series.values
  if len(steps) <= most:
    return {'steps': steps.tolist(), 'values': significant(values)}
  edges = np.linspace(0, len(steps), most // 2 + 1).astype(int)[:-1]
  sizes = np.diff([*edges, len(steps)])
  return {
      'steps': rounded(np.add.reduceat(steps.astype(np.float64), edges) / sizes, 1),
      'values': significant(np.add.reduceat(values, edges) / sizes),
      'low': significant(np.minimum.reduceat(values, edges)),
      'high': significant(np.maximum.reduceat(values, edges))}


def _band(band, stride):
  return {'mean': rounded(band.mean[::stride]), 'low': rounded(band.low[::stride]),
          'high': rounded(band.high[::stride])}


def _dataset(dataset: Dataset, analysis: Analysis, stride: int):
  steps = analysis.steps
  return {
      'name': dataset.name, 'title': words.title(dataset.name),
      'verdict': words.verdict(dataset)[0],
      'accuracy': _band(dataset.accuracy, stride), 'margin': _band(dataset.margin, stride),
      'ribbon': _ribbon(dataset, analysis, stride),
      'contexts': [
          {'label': f'{context.dataset}, seed {context.seed} ({context.n_items} items)',
           'accuracy': rounded(dataset.accuracy_TC[::stride, i]),
           'margin': rounded(dataset.margin_TC[::stride, i])}
          for i, context in enumerate(dataset.contexts)],
      'hops': [
          {'before': int(steps[called.hop.before]), 'after': int(steps[called.hop.after]),
           'direction': 'up' if called.hop.direction > 0 else 'down',
           'change': round(called.hop.change, 4), 'isConfirmed': called.hop.is_confirmed,
           'agreeing': called.n_agreeing, 'variants': called.n_variants}
          for called in (dataset.judged.hops if dataset.judged else ())]}


def _ribbon(dataset: Dataset, analysis: Analysis, stride: int) -> list:
  """States from -1 to 1 by snapshot; accuracy on the same scale where no dataset has states."""
  if dataset.judged:
    return dataset.judged.states[::stride].tolist()
  if analysis.hops:
    return [None] * len(analysis.steps[::stride])
  return rounded(2 * dataset.accuracy.mean[::stride] - 1)


def _controls(analysis: Analysis, stride: int):
  controls = analysis.controls
  if controls is None:
    return None
  return {
      'mean': rounded(controls.accuracy[::stride]), 'level': controls.level,
      'tolerance': controls.tolerance, 'settled': controls.settled_step,
      'datasets': [{'title': words.title(dataset.name),
                    'ribbon': _ribbon(dataset, analysis, stride),
                    'label': f'{dataset.name} ({dataset.n_items} items)',
                    'accuracy': rounded(dataset.accuracy.mean[::stride])}
                   for dataset in analysis.control_datasets]}


def _panels(records):
  panels = []
  for heading, unit, axis, wanted in _TRAINING:
    series = [
        {'label': label, **thinned(getattr(records, table)[key])}
        for label, table, key in wanted if key in getattr(records, table)]
    if series:
      panels.append({'title': heading, 'unit': unit, 'axis': axis, 'series': series})
  return panels


def _other_panels(records):
  """Every further number that was recorded and that changed during the run."""
  shown = {(table, key) for _, _, _, wanted in _TRAINING for _, table, key in wanted}
  shown |= {('metrics', 'tokens')}
  panels = []
  for table in ('metrics', 'evals', 'timings'):
    for key, series in getattr(records, table).items():
      if (table, key) not in shown and np.ptp(series.values) > 0:
        panels.append({'title': words.title(key), 'unit': table, 'axis': 'free',
                       'series': [{'label': key, **thinned(series)}]})
  return panels
