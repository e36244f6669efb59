"""The facts of a run that a reader wants beside its curves, taken from config and manifest."""

from typing import Any

import numpy as np

from research.reports import words
from research.reports.records import Records, flatten
from research.training.manifest import said

Facts = list[tuple[str, list[tuple[str, str]]]]


def run_facts(records: Records) -> Facts:
  """Returns groups of (label, value); what a run did not record is left out."""
  config = flatten(records.config)
  start = last_start(records.manifest)
  machine = start.get('machine', {})
  groups = [
      ('Progress', _progress(records)),
      ('Model', _model(config, records.manifest)),
      ('Training', _training(config, records)),
      ('Series', _series(records)),
      ('Experts', _experts(records)),
      ('Speed', _speed(records)),
      ('Machine', _machine(records.manifest, machine)),
      ('Origin', _origin(records.manifest, start)),
      ('Versions', _rows(_versions(machine))),
  ]
  return [(name, rows) for name, rows in groups if rows]


def last_start(manifest: dict[str, Any]) -> dict[str, Any]:
  """Returns what the manifest says of the process that started last; empty before any did."""
  starts = manifest.get('starts') or [{}]
  return starts[-1]


def is_own(manifest: dict[str, Any]) -> bool:
  """Returns whether the run was trained here, and is neither imported nor a public series."""
  return 'imported' not in manifest and 'series' not in manifest


def n_parameters(manifest: dict[str, Any]) -> int | None:
  """Returns the number of parameters that the manifest holds."""
  return manifest.get('model', {}).get('parameters')


def shown_manifest(manifest: dict[str, Any]) -> dict[str, Any]:
  """Returns the manifest with the text of each start's diff replaced by its length."""
  starts = [
      {**start, 'diff': f'{words.count(len(start["diff"].splitlines()), "line")}, in manifest.json'}
      if start.get('diff') else start for start in manifest.get('starts', [])]
  return {**manifest, 'starts': starts} if starts else manifest


def _rows(pairs):
  """Labels with readable values; pairs without a value are left out."""
  return [(label, _plain(value)) for label, value in pairs if value not in (None, '', [], {})]


def _plain(value):
  if isinstance(value, bool):
    return 'yes' if value else 'no'
  if isinstance(value, int):
    return f'{value:,}'
  if isinstance(value, (list, tuple)):
    return ' '.join(str(part) for part in value)
  if isinstance(value, dict):
    return ', '.join(f'{key} {part}' for key, part in value.items())
  return str(value)


def _progress(records):
  of = f' of {records.n_steps:,}' if records.n_steps else ''
  rows = [('Steps', f'{records.last_step:,}{of}')]
  if 'tokens' in records.metrics:
    rows.append(('Tokens seen', words.short(records.metrics['tokens'].values[-1])))
  if 'skipped' in records.metrics:
    rows.append(('Skipped updates', f'{int(np.nansum(records.metrics["skipped"].values)):,}'))
  for label, key, table in (('Last loss', 'loss', records.metrics),
                            ('Last held-out loss', 'heldout_loss', records.evals),
                            ('Last bits per byte', 'bits_per_byte', records.evals)):
    if key in table:
      rows.append((label, f'{table[key].values[-1]:.4f}'))
  return rows


def _model(config, manifest):
  total, active = n_parameters(manifest), manifest.get('model', {}).get('active_parameters')
  flops = manifest.get('model', {}).get('flops_per_token')
  return _rows((
      ('Parameters', total and words.short(total)),
      ('Active parameters', active and active != total and words.short(active) or None),
      ('FLOPs per token', flops and words.short(flops)),
      ('Layers', config.get('model.n_layers')), ('Width', config.get('model.d_model')),
      ('Heads', config.get('model.n_heads')), ('Key/value heads', config.get('model.n_kv_heads')),
      ('Context length', config.get('model.context_length')),
      ('Vocabulary', config.get('model.vocab_size')),
      ('Compute dtype', config.get('model.compute_dtype'))))


def _series(records):
  """What was monitored of a series that others trained."""
  series = records.manifest.get('series')
  if not series:
    return []
  monitored, left_out = series['monitored'], series['left_out']
  return _rows((
      ('Source', series['source']), ('Pattern', series['pattern']),
      ('Revisions', f'{len(monitored)} of {len(monitored) + len(left_out)}'),
      ('Findings of the audit', str(len(series['findings']))),
      ('Monitor suite', records.config.get('monitors', {}).get('suite')),
      *((f'Left out: {name}', why) for name, why in left_out.items())))


def _training(config, records):
  if not is_own(records.manifest):
    return []  # Others know how it was trained; the config has defaults there.
  tokens = records.config.get('data', {})
  per_step = tokens.get('batch_size', 0) * tokens.get('sequence_length', 0)
  return _rows((
      ('Data', config.get('data.kind')), ('Tokens per step', per_step or None),
      ('Sequence length', config.get('data.sequence_length')),
      ('Optimizer', config.get('optimizer.name')),
      ('Peak learning rate', config.get('optimizer.peak_lr')),
      ('Schedule', config.get('optimizer.schedule')), ('Seed', config.get('seed')),
      ('Snapshot every', config.get('checkpoints.snapshot_every')),
      ('Monitor suite', config.get('monitors.suite'))))


def _experts(records):
  """Loads as means over the last tenth of the recorded steps, as single batches scatter."""
  rows = []
  for label, key, shown in (('Fullest expert', 'expert_max_load', '{:.2f} times the mean load'),
                            ('Dropped choices', 'expert_dropped', '{:.2%}'),
                            ('Exchanges per layer', 'expert_rounds', '{:.2f}')):
    if key in records.metrics:
      values = records.metrics[key].values
      rows.append((label, shown.format(np.nanmean(values[-max(1, len(values) // 10):]))))
  return rows


def _speed(records):
  """Totals over all steps; of the phases only data and batch hash are part of a step's seconds."""
  timings, rows = records.timings, []
  if 'tokens_per_second' in timings:
    speed = np.median(timings['tokens_per_second'].values)
    rows.append(('Tokens per second', f'{words.short(speed)} (median)'))
  if 'mfu' in timings:
    rows.append(('MFU', f'{100 * np.median(timings["mfu"].values):.1f}% (median)'))
  training = timings['seconds'].values.sum() if 'seconds' in timings else 0.
  if training:
    rows.append(('Training steps', words.duration(training)))
  for key, series in timings.items():
    if key.endswith('_seconds'):
      spent = series.values.sum()
      share = f' ({100 * spent / training:.1f}% of training)' if training else ''
      rows.append((words.title(key.removesuffix('_seconds')), words.duration(spent) + share))
  return rows


def _machine(manifest, machine):
  return _rows((
      ('Mesh', manifest.get('mesh')), ('Platform', machine.get('platform')),
      ('Device', machine.get('device_kind')), ('Devices', machine.get('n_devices')),
      ('Processes', machine.get('n_processes')), ('CPU', machine.get('cpu')),
      ('Threads', machine.get('threads')), ('XLA flags', machine.get('xla_flags'))))


def _origin(manifest, start):
  hashes, parent = manifest.get('hashes', {}), manifest.get('parent') or {}
  return _rows((
      ('Commit', (start.get('commit') or '')[:12]),
      ('Uncommitted changes', bool(start['diff']) if 'diff' in start else None),
      ('Command', start.get('command')), ('Last start', start.get('time')),
      ('Starts', len(manifest.get('starts', [])) or None),
      ('Parent run', parent.get('run_dir')),
      ('Holds', said(manifest['replay']) if manifest.get('replay') else None),
      ('Data hash', hashes.get('data', '')[:12]),
      ('Tokenizer hash', hashes.get('tokenizer', '')[:12])))


def _versions(machine):
  return [('python', machine.get('python')), *machine.get('packages', {}).items()]
