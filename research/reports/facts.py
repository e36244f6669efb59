"""The facts of a run that a reader wants beside its curves, taken from config and manifest."""

from typing import Any

import numpy as np

from research.reports import words
from research.reports.records import Records, flatten

Facts = list[tuple[str, list[tuple[str, str]]]]


def run_facts(records: Records) -> Facts:
  """Returns groups of (label, value); what a run did not record is left out."""
  config, manifest = flatten(records.config), flatten(records.manifest)
  groups = [
      ('Progress', _progress(records)),
      ('Model', _model(config, manifest)),
      ('Training', _training(config, records)),
      ('Speed', _speed(records)),
      ('Machine', _rows(manifest, _MACHINE)),
      ('Origin', _rows(manifest, _ORIGIN)),
      ('Versions', _versions(records.manifest)),
  ]
  return [(name, rows) for name, rows in groups if rows]


def n_parameters(manifest: dict[str, Any]) -> int | None:
  """Returns the parameter count that a flattened manifest holds."""
  return _first(manifest, ('parameters.total', 'n_parameters', 'n_params', 'parameters'))


_MACHINE = (
    ('Device', ('device', 'devices', 'device_kind', 'platform', 'machine')),
    ('Devices', ('n_devices', 'device_count')),
    ('Mesh', ('mesh', 'mesh_shape')),
    ('Host', ('host', 'hostname')),
    ('Threads', ('threads', 'n_threads', 'cpu_count')),
)
_ORIGIN = (
    ('Commit', ('commit', 'git.commit', 'code.commit')),
    ('Uncommitted changes', ('dirty', 'git.dirty', 'code.dirty')),
    ('Command', ('command', 'argv')),
    ('Started', ('started', 'created', 'time', 'start_time')),
    ('Parent run', ('parent.run_dir', 'parent')),
    ('Data hash', ('data_hash', 'data.hash', 'source.hash')),
    ('Tokenizer hash', ('tokenizer_hash', 'tokenizer.hash', 'data.tokenizer_hash')),
)


def _first(tree, names):
  return next((tree[name] for name in names if tree.get(name) not in (None, '')), None)


def _rows(tree, wanted):
  found = [(label, _first(tree, names)) for label, names in wanted]
  return [(label, _plain(value)) for label, value in found if value is not None]


def _plain(value):
  if isinstance(value, (list, tuple)):
    return ' '.join(str(part) for part in value)
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  return f'{value:,}' if isinstance(value, int) else str(value)


def _progress(records):
  of = f' of {records.n_steps:,}' if records.n_steps else ''
  rows = [('Steps', f'{records.last_step:,}{of}')]
  if 'tokens' in records.metrics:
    rows.append(('Tokens seen', words.short(records.metrics['tokens'].values[-1])))
  if 'seconds' in records.timings:
    rows.append(('Time in steps', words.duration(records.timings['seconds'].values.sum())))
  skipped = records.metrics.get('skipped')
  if skipped is not None:
    rows.append(('Skipped updates', f'{int(skipped.values.sum()):,}'))
  return rows


def _model(config, manifest):
  rows = []
  total = n_parameters(manifest)
  if total is not None:
    rows.append(('Parameters', words.short(total)))
  active = manifest.get('parameters.active')
  if active is not None and active != total:
    rows.append(('Active parameters', words.short(active)))
  if 'model.n_layers' in config:
    rows.append(('Shape', f'{config["model.n_layers"]} layers, width {config["model.d_model"]}'))
  return rows + _rows(config, (
      ('Heads', ('model.n_heads',)), ('Key/value heads', ('model.n_kv_heads',)),
      ('Context length', ('model.context_length',)), ('Vocabulary', ('model.vocab_size',)),
      ('Compute dtype', ('model.compute_dtype',))))


def _training(config, records):
  rows = _rows(config, (
      ('Data', ('data.kind',)), ('Sequences per step', ('data.batch_size',)),
      ('Sequence length', ('data.sequence_length',)), ('Optimizer', ('optimizer.name',)),
      ('Peak learning rate', ('optimizer.peak_lr',)), ('Schedule', ('optimizer.schedule',)),
      ('Seed', ('seed',))))
  for label, key, table in (('Last loss', 'loss', records.metrics),
                            ('Last held-out loss', 'heldout_loss', records.evals),
                            ('Last bits per byte', 'bits_per_byte', records.evals)):
    if key in table:
      rows.append((label, f'{table[key].values[-1]:.4f}'))
  return rows


def _speed(records):
  rows = []
  if 'tokens_per_second' in records.timings:
    speed = np.median(records.timings['tokens_per_second'].values)
    rows.append(('Tokens per second', f'{words.short(speed)} (median)'))
  if 'mfu' in records.timings:
    rows.append(('MFU', f'{100 * np.median(records.timings["mfu"].values):.1f}% (median)'))
  for key, series in records.timings.items():
    if key.endswith('_seconds') or key.startswith(('phases.', 'phase.')):
      name = key.removesuffix('_seconds').split('.')[-1]
      rows.append((words.title(name), words.duration(series.values.sum())))
  return rows


def _versions(manifest):
  for name in ('packages', 'versions'):
    if isinstance(manifest.get(name), dict):
      return [(key, _plain(value)) for key, value in manifest[name].items()]
  return []
