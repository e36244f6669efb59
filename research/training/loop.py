"""The run: one linear loop from a config and a run directory to a finished report."""

import dataclasses
import errno
import json
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from models.attention import choose_attention, hardware
from models.dispatch import choose_product
from models.counting import flops_per_token, parameter_counts
from parallelism.mesh import make_mesh
from parallelism.sharding import path_name
from research import build as build_lib
from research import config as config_lib
from research.config import ExperimentConfig
from research.data.batches import Source, batches, make_source
from research.errors import Stopped, UserError
from research.evals.compression import COMPRESSORS
from research.evals.heldout_text import score_heldout_text
from research.monitors import table
from research.monitors.suite import Suite
from research.monitors.watch import Watch, read_suite
from research.reports.report import build_report
from research.run_dir import CACHE, RunDir, write_whole
from research.training import manifest as manifest_lib
from research.training.checkpoints import Checkpoints
from research.training.halt import Halt
from research.training.join import join
from research.training.logs import duration
from research.training.observation import Observation
from research.training.provenance import Chain, Window, config_hash
from research.training.recorder import Recorder
from research.training.snapshots import SnapshotReader, SnapshotWriter
from research.training.span import Span
from research.training.start import check_begun, parent_facts
from research.training.watchdog import Watchdog


class _Inputs(NamedTuple):
  """What a run needs and what may be wrong with it, all found out before anything is written."""

  source: Source
  trained_on: Source
  suite: Suite
  numerics: dict[str, Any]
  parent: dict[str, Any] | None


def _check_inputs(config: ExperimentConfig, run_dir: RunDir, mesh: jax.sharding.Mesh, span: Span
                  ) -> _Inputs:
  """Returns the checked inputs of a run; raises ValueError (or UserError) for what cannot work."""
  numerics = span.numerics(config, mesh)
  build_lib.build(config, mesh, numerics)
  source = make_source(config.data, config.n_steps, CACHE)
  _check_vocabulary(config, source.tokenizer)
  if _has_heldout_text(config):
    source.heldout_documents()
  suite = read_suite(config, source.tokenizer, source.start_id)
  # A run that exists already knows its parent, which may be gone by now.
  begun = RunDir(run_dir.whole).manifest_json.exists()
  if begun:
    check_begun(RunDir(run_dir.whole))
  return _Inputs(source, span.data(source), suite, numerics,
                 None if begun else span.parent(config, source.tokenizer))


def train(config: ExperimentConfig, run_dir: RunDir, span: Span | None = None) -> None:
  """Runs the experiment to its end, from wherever the run directory stands.

  Args:
    config: what to run.
    run_dir: where it is written; an unfinished run in it is resumed, a finished one is reported.
    span: which steps, where not all of the run.

  Raises:
    UserError: bad input, a changed identity setting, a directory in use, a full disk.
    Stopped: it was asked to stop, or too many steps in a row were skipped; it is saved.
  """
  span = span or Span(config)
  try:
    mesh = make_mesh(config.mesh)
    inputs = _check_inputs(config, run_dir, mesh, span)
    run_dir.lock()
    if run_dir.done.exists():
      hashes = inputs.source.hash, inputs.source.tokenizer.hash
      finished = RunDir(run_dir.whole)  # This process may not have been there.
      manifest_lib.check_resumable(finished, config, *hashes, span.replay)
      if _has_other_items(finished, inputs.suite):
        _monitor_again(config, finished, mesh, inputs)
      print(f'finished already: {finished.report_html.resolve()}')
    else:
      with Halt() as halt, Watchdog(config.watchdog, run_dir) as watchdog:
        _train(config, run_dir, mesh, inputs, span, halt, watchdog)
  except (UserError, Stopped):
    raise
  except Exception as error:
    if _disk_full(error):
      raise UserError(
          f'no space left on the disk of {run_dir.path}; everything up to its last whole checkpoint '
          'is safe: free some space and repeat the command') from error
    if isinstance(error, ValueError) and not run_dir.locked:
      raise UserError(str(error)) from error
    raise
  finally:
    run_dir.unlock()


def _train(config: ExperimentConfig, run_dir: RunDir, mesh: jax.sharding.Mesh, inputs: _Inputs,
           span: Span, halt: Halt, watchdog: Watchdog) -> None:
  source = inputs.source
  checkpoints = Checkpoints(run_dir.checkpoints, config.checkpoints)
  restored = checkpoints.newest(run_dir.set_aside)
  join(run_dir, restored)
  manifest = _open_manifest(config, run_dir, inputs, mesh, restored, span)
  built = build_lib.build(config, mesh, manifest['numerics'])
  if restored is None:
    state, position = span.begin(built, config, manifest['parent'])
  else:
    restored, state, position = checkpoints.restore_newest(built.abstract_state, run_dir.set_aside)
    checkpoints.take_inventory(restored)
    manifest['starts'][-1]['from_step'] = restored
    print(f'resuming {run_dir.path} at step {restored} of {span.last}', flush=True)
  first = position['step']
  kept = -1 if restored is None else first  # What was written after this step is written again.
  _describe(run_dir, config, built, manifest)

  recorder = Recorder(config, run_dir, span, inputs.trained_on, watchdog, first=first, kept=kept,
                      tokens=position['tokens'], n_devices=mesh.size)
  manifest['peak'] = recorder.peak
  chain = Chain(config, manifest['hashes'], parent_facts(checkpoints, restored, manifest['parent']),
                Window(first, built.local_rows(), built.owned_rows()))
  snapshots = SnapshotWriter(run_dir.snapshots, built.params, config.checkpoints.snapshot_dtype,
                             kept)
  watch = Watch(config, inputs.suite, source.tokenizer, source.start_id, built, run_dir, kept)
  if watch.items and config.checkpoints.snapshot_every:
    print(watch.cost(config.data.batch_size * config.data.sequence_length,
                     config.checkpoints.snapshot_every), flush=True)
  observation = Observation(config, run_dir, span, built, source, recorder, snapshots, watch,
                            checkpoints, chain, kept)
  watchdog.at('start', first)
  if restored is None:
    observation.state(first, state)
  stream = batches(inputs.trained_on, config.data.batch_size, first, built.local_rows(),
                   prefetch=4)
  train_step, halting = built.train_step(), False
  for step in range(first + 1, span.last + 1):
    with recorder.phase('data'):
      local = next(stream)
      batch = built.place_batch(local)
    state, metrics = train_step(state, batch)
    observation.step(step, metrics, local)
    halting = step < span.last and (halt.reached(step) or recorder.skipped.too_many)
    if halting or observation.due(step):
      observation.state(step, state, halting)
    if halting:
      break

  watchdog.at('save')
  observation.close()
  if recorder.skipped.too_many:
    raise recorder.skipped.stopped(step)
  if halting:
    raise halt.stopped(step, span.last, run_dir.path)
  watchdog.at('report')
  if _has_heldout_text(config) and span.last == config.n_steps:
    _score_heldout_text(config, run_dir, source, built, state.params)
  _finish(run_dir, config, manifest, time.perf_counter() - recorder.began, span)


def _has_other_items(finished: RunDir, suite: Suite) -> bool:
  """Returns whether a finished run was monitored on other items, or not to its end."""
  if not suite.items:
    return False
  known = finished.monitor_items.exists() and table.read_item_table(finished.monitor_items)
  scored = table.score_steps(finished.monitor_scores)
  left = set(SnapshotReader(finished.snapshots).steps) - set(scored)
  return known != suite.items or bool(left) or not finished.report_html.exists()


def _monitor_again(config: ExperimentConfig, finished: RunDir, mesh: jax.sharding.Mesh,
                   inputs: _Inputs) -> None:
  """Scores the stored snapshots of a finished run with the items of today, anew its report.

  What the manifest says of training stays: replays go by it.
  """
  if jax.process_count() > 1:
    print('note: the monitor items have changed; repeat the command in one process to score the '
          'stored snapshots with them', flush=True)
    return
  manifest = manifest_lib.read(finished)
  saved = config_lib.from_json(finished.config_json.read_text(encoding='utf-8'))
  same_mesh = manifest['mesh'] == dict(mesh.shape)
  built = build_lib.build(config, mesh, manifest['numerics'] if same_mesh else inputs.numerics)
  finished.report_html.unlink(missing_ok=True)  # Until it is of these items.
  manifest.setdefault('monitored_again', []).append(manifest_lib.start_facts(
      config.n_steps, {'monitors.suite': [saved.monitors.suite, config.monitors.suite]}))
  manifest_lib.write(finished, manifest)
  saved = dataclasses.replace(saved, monitors=config.monitors)
  write_whole(finished.config_json, config_lib.as_json(saved))
  write_whole(finished.config_txt, config_lib.as_text(saved))
  Watch(config, inputs.suite, inputs.source.tokenizer, inputs.source.start_id, built, finished,
        config.n_steps)
  build_report(finished)


def _has_heldout_text(config: ExperimentConfig) -> bool:
  return config.data.kind == 'text' and config.data.text.heldout_fraction > 0


def _check_vocabulary(config: ExperimentConfig, tokenizer) -> None:
  if tokenizer.vocab_size > config.model.vocab_size:
    raise UserError(f'model.vocab_size={config.model.vocab_size} is smaller than the tokenizer\'s '
                    f'{tokenizer.vocab_size}; set --config.model.vocab_size={tokenizer.vocab_size}')


def _open_manifest(config, run_dir, inputs, mesh, restored, span) -> dict[str, Any]:
  """Returns the manifest with this start recorded; refuses a changed identity.

  Numerics are those of the first start for as long as the mesh, the model's way of computing and
  compute.* stay as they are.
  """
  manifest, changes = manifest_lib.read(run_dir), {}
  source, shape = inputs.source, dict(mesh.shape)
  if manifest is None:
    if restored is not None:
      raise UserError(f'{run_dir.path} holds checkpoints but no manifest.json, so what made them is '
                      'unknown; put it back or choose another --run_dir')
    manifest = {'experiment': config.name, 'numerics': inputs.numerics, 'mesh': shape, 'starts': [],
                'hashes': {'config': config_hash(config), 'data': source.hash,
                           'tokenizer': source.tokenizer.hash},
                'parent': inputs.parent, 'start_id': source.start_id, 'data': source.facts()}
    manifest |= {'replay': span.replay, 'differs': span.differs} if span.replay else {}
  else:
    changes = manifest_lib.check_resumable(run_dir, config, source.hash, source.tokenizer.hash,
                                           span.replay)
    for change in manifest_lib.machine_changes(manifest):
      print(f'note: bits may differ from an uninterrupted run, {change}', flush=True)
    if manifest['mesh'] != shape:
      changes['mesh'] = [manifest['mesh'], shape]
      manifest['mesh'] = shape
    if any(path.split('.')[0] in ('mesh', 'compute', 'model') for path in changes):
      manifest['numerics'] = inputs.numerics
  manifest['starts'].append(manifest_lib.start_facts(restored or 0, changes))
  # The manifest goes first: a change that only config.json knew would never be recorded.
  manifest_lib.write(run_dir, manifest)
  write_whole(run_dir.config_json, config_lib.as_json(config))
  write_whole(run_dir.config_txt, config_lib.as_text(config))
  source.tokenizer.save(run_dir.tokenizer_json)
  return manifest


def _describe(run_dir, config, built, manifest) -> None:
  """Writes params.txt and the model's size and mesh into the manifest, and says them."""
  counts = parameter_counts(config.model)
  lines = [f'{path_name(path)}  {leaf.shape}  {leaf.dtype}  {leaf.sharding.spec}\n'
           for path, leaf in jax.tree.leaves_with_path(built.params)]
  write_whole(run_dir.params_txt, ''.join(lines))
  manifest['model'] = {
      'parameters': counts.total, 'active_parameters': counts.active,
      'flops_per_token': flops_per_token(config.model, config.data.sequence_length)}
  manifest_lib.write(run_dir, manifest)
  print(f'{config.name}: {counts.total:,} parameters, {config.n_steps:,} steps of '
        f'{config.data.batch_size * config.data.sequence_length:,} tokens on mesh '
        f'{dict(built.mesh.shape)}; writing to {run_dir.path}')
  chosen, reason = choose_attention(
      config.model, hardware(built.mesh.devices.flat[0]), config.data.sequence_length)
  used = built.config.model.attention
  print(f'attention: {used} ({reason if used == chosen else "as at the first start"})', flush=True)
  moe = config.model.moe
  if moe.n_experts and not moe.capacity_factor:
    chosen, reason = choose_product(moe, hardware(built.mesh.devices.flat[0]))
    used = built.config.model.moe.product
    print(f'experts: {used} ({reason if used == chosen else "as at the first start"})', flush=True)


def _score_heldout_text(config, run_dir, source, built, params) -> None:
  """Scores every held-out byte once and says bits per byte beside compressors."""
  mine, eval_step = built.local_rows(), built.eval_step()
  scored = score_heldout_text(config, source, lambda batch: eval_step(params, built.place_batch(
      {name: x_BL[mine] for name, x_BL in batch.items()})))
  write_whole(run_dir.heldout_text_json, json.dumps(scored, indent=2) + '\n')
  for name, row in scored.items():
    compressors = ', '.join(f'{key} {row[key]:.3f}' for key in COMPRESSORS)
    print(f'held-out text, {name}: {row["bits_per_byte"]:.3f} bits per byte ({compressors})')


def _finish(run_dir, config, manifest, seconds, span) -> None:
  manifest['seconds_last_start'] = seconds
  manifest_lib.write(run_dir, manifest)
  report = build_report(run_dir)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices('run finished')
  if jax.process_index() == 0:  # One file for all processes: the run is done, or it is not.
    write_whole(run_dir.done, json.dumps({'step': span.last}) + '\n')
  print(f'{config.name}: done in {duration(seconds)}')
  print(f'report: {report.resolve()}', flush=True)


def _disk_full(error: BaseException | None) -> bool:
  """Returns whether an error, or one that caused it, says that the disk is full."""
  while error is not None:
    if getattr(error, 'errno', None) in (errno.ENOSPC, errno.EDQUOT) or (
        'No space left on device' in str(error)):
      return True
    error = error.__cause__ or error.__context__
  return False
