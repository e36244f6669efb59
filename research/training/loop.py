"""The run: one linear loop from a config and a run directory to a finished report."""

import errno
import json
import time
from typing import Any

import jax
import numpy as np

from models.counting import flops_per_token, parameter_counts
from parallelism.mesh import make_mesh
from parallelism.sharding import path_name
from research import build as build_lib
from research import config as config_lib
from research.config import ExperimentConfig
from research.data.batches import batches, heldout_batches, make_source
from research.errors import UserError
from research.evals.compression import COMPRESSORS
from research.evals.heldout_text import score_heldout_text
from research.monitors.encoding import encode_items
from research.monitors.watch import Watch, suite_items
from research.reports.report import build_report
from research.run_dir import CACHE, RunDir, write_whole
from research.training import manifest as manifest_lib
from research.training import snapshots as snapshots_lib
from research.training.checkpoints import Checkpoints
from research.training.logs import duration
from research.training.recorder import Recorder
from research.training.snapshots import SnapshotWriter


def train(config: ExperimentConfig, run_dir: RunDir) -> None:
  """Runs the experiment to its end, from wherever the run directory stands.

  Args:
    config: what to run.
    run_dir: where it is written; an unfinished run in it is resumed, a finished one is reported.

  Raises:
    UserError: bad input, a changed identity setting, a directory in use, a full disk.
  """
  try:
    mesh = make_mesh(config.mesh)
    numerics = build_lib.resolve_numerics(config, mesh)
    build_lib.build(config, mesh, numerics)  # Refuses what does not fit before anything is written.
  except ValueError as error:
    raise UserError(str(error)) from error
  source = make_source(config.data, config.n_steps, CACHE)
  _check_vocabulary(config, source.tokenizer)
  items = suite_items(config)
  encode_items(items, source.tokenizer, config.model.context_length, source.start_id)
  run_dir.lock()
  try:
    if run_dir.done.exists():
      manifest_lib.check_resumable(run_dir, config, source.hash, source.tokenizer.hash)
      print(f'finished already: {run_dir.report_html.resolve()}')
      return
    _train(config, run_dir, mesh, numerics, source, items)
  except Exception as error:
    if _disk_full(error):
      raise UserError(
          f'no space left on the disk of {run_dir.path}; everything up to its last whole checkpoint '
          'is safe: free some space and repeat the command') from error
    raise
  finally:
    run_dir.unlock()


def _train(config, run_dir, mesh, numerics, source, items) -> None:
  checkpoints = Checkpoints(run_dir.checkpoints, config.checkpoints)
  restored = checkpoints.steps[-1] if checkpoints.steps else None
  manifest = _open_manifest(config, run_dir, source, numerics, restored)
  built = build_lib.build(config, mesh, manifest['numerics'])
  if restored is None:
    state, position = _start(built, config), {'step': 0, 'tokens': 0}
  else:
    state, position = checkpoints.restore(restored, built.abstract_state)
    print(f'resuming {run_dir.path} at step {restored} of {config.n_steps}', flush=True)
  first = position['step']
  kept = -1 if restored is None else first  # What was written after this step is written again.
  _describe(run_dir, config, built, manifest)

  recorder = Recorder(config, run_dir, first=first, kept=kept, tokens=position['tokens'],
                      n_devices=mesh.size)
  snapshots = SnapshotWriter(run_dir.snapshots, built.params, config.checkpoints.snapshot_dtype,
                             kept)
  watch = Watch(config, items, source.tokenizer, source.start_id, built, run_dir, kept)
  heldout = [built.place_batch(batch) for batch in heldout_batches(
      source, config.data.batch_size, config.evals.n_batches, built.local_rows())]
  train_step, eval_step = built.train_step(), built.eval_step()

  def observe(step: int, state) -> None:
    """Takes what is due at this step: snapshot with monitors, held-out loss, checkpoint."""
    if _due(step, config.checkpoints.snapshot_every, config):
      with recorder.phase('save'):
        stored = snapshots_lib.cast(state.params, config.checkpoints.snapshot_dtype)
        snapshots.write(step, stored)
      with recorder.phase('monitor'):
        recorder.monitors(step, watch.score(step, stored))
    if heldout and _due(step, config.evals.every, config):
      with recorder.phase('eval'):
        recorder.heldout({'step': step, **_heldout_loss(eval_step, state.params, heldout)})
    if step and _due(step, config.checkpoints.every, config):
      with recorder.phase('save'):
        snapshots.wait()
        checkpoints.save(step, state, {'step': step, 'tokens': recorder.tokens},
                         manifest['hashes'])

  if restored is None:
    observe(0, state)
  stream = batches(source, config.data.batch_size, first, built.local_rows(), prefetch=4)
  dispatched = None
  for step in range(first + 1, config.n_steps + 1):
    with recorder.phase('data'):
      batch = built.place_batch(next(stream))
    state, metrics = train_step(state, batch)
    if dispatched:  # The row of a step is written while the next one is computed.
      recorder.step(*dispatched, watch.n_swings)
    dispatched = (step, metrics)
    if any(_due(step, every, config) for every in _cadences(config)):
      recorder.step(*dispatched, watch.n_swings)
      dispatched = None
      observe(step, state)

  snapshots.close()
  checkpoints.close()
  recorder.close()
  if config.data.kind == 'text' and config.data.text.heldout_fraction:
    _score_heldout_text(config, run_dir, source, built, eval_step, state.params)
  _finish(run_dir, config, manifest, time.perf_counter() - recorder.began)


def _cadences(config: ExperimentConfig) -> tuple[int, ...]:
  return config.checkpoints.snapshot_every, config.checkpoints.every, config.evals.every


def _due(step: int, every: int, config: ExperimentConfig) -> bool:
  """Returns whether what happens every so many steps (0: never), and at the end, happens now."""
  return bool(every) and (step % every == 0 or step == config.n_steps)


def _check_vocabulary(config: ExperimentConfig, tokenizer) -> None:
  if tokenizer.vocab_size > config.model.vocab_size:
    raise UserError(f'model.vocab_size={config.model.vocab_size} is smaller than the tokenizer\'s '
                    f'{tokenizer.vocab_size}; set --config.model.vocab_size={tokenizer.vocab_size}')


def _start(built: build_lib.Build, config: ExperimentConfig):
  """Returns the state at step 0, with parameters of another run where the config says so."""
  state = built.init_state()
  if not config.start.run_dir:
    return state
  parent = Checkpoints(RunDir(config.start.run_dir).checkpoints)
  step = parent.steps[-1] if config.start.step < 0 and parent.steps else config.start.step
  if step not in parent.steps:
    raise UserError(f'start.run_dir={config.start.run_dir} has no checkpoint of step '
                    f'{config.start.step}; it has {parent.steps}')
  saved, _ = parent.restore(step, built.abstract_state)
  parent.close()
  optimizer = saved.optimizer if config.start.optimizer else state.optimizer
  ema = jax.tree.map(jax.numpy.copy, saved.params) if state.ema else {}
  return state._replace(params=saved.params, optimizer=optimizer, ema=ema)


def _open_manifest(config, run_dir, source, numerics, restored) -> dict[str, Any]:
  """Returns the manifest with this start recorded; refuses a changed identity."""
  manifest, changes = manifest_lib.read(run_dir), {}
  if manifest is None:
    manifest = {'experiment': config.name, 'numerics': numerics, 'starts': [],
                'hashes': {'data': source.hash, 'tokenizer': source.tokenizer.hash},
                'parent': {'run_dir': config.start.run_dir, 'step': config.start.step},
                'start_id': source.start_id, 'data': source.facts()}
  else:
    changes = manifest_lib.check_resumable(run_dir, config, source.hash, source.tokenizer.hash)
    for change in manifest_lib.machine_changes(manifest):
      print(f'note: bits may differ from an uninterrupted run, {change}', flush=True)
    if any(path.split('.')[0] in ('mesh', 'compute', 'model') for path in changes):
      manifest['numerics'] = numerics
  manifest['starts'].append(manifest_lib.start_facts(restored or 0, changes))
  write_whole(run_dir.config_json, config_lib.as_json(config))
  write_whole(run_dir.config_txt, config_lib.as_text(config))
  source.tokenizer.save(run_dir.tokenizer_json)
  manifest_lib.write(run_dir, manifest)
  return manifest


def _describe(run_dir, config, built, manifest) -> None:
  """Writes params.txt and the model's size and mesh into the manifest, and says them."""
  counts = parameter_counts(config.model)
  lines = [f'{path_name(path)}  {leaf.shape}  {leaf.dtype}  {leaf.sharding.spec}\n'
           for path, leaf in jax.tree.leaves_with_path(built.params)]
  write_whole(run_dir.params_txt, ''.join(lines))
  manifest['mesh'] = dict(built.mesh.shape)
  manifest['model'] = {
      'parameters': counts.total, 'active_parameters': counts.active,
      'flops_per_token': flops_per_token(config.model, config.data.sequence_length)}
  manifest_lib.write(run_dir, manifest)
  print(f'{config.name}: {counts.total:,} parameters, {config.n_steps:,} steps of '
        f'{config.data.batch_size * config.data.sequence_length:,} tokens on mesh '
        f'{dict(built.mesh.shape)}; writing to {run_dir.path}', flush=True)


def _heldout_loss(eval_step, params, heldout) -> dict[str, float]:
  nats = sum(float(np.asarray(eval_step(params, batch)).sum(dtype=np.float64)) for batch in heldout)
  tokens = sum(float(batch['loss_mask'].sum()) for batch in heldout)
  return {'heldout_loss': nats / tokens, 'heldout_tokens': tokens}


def _score_heldout_text(config, run_dir, source, built, eval_step, params) -> None:
  """Scores every held-out byte once and says bits per byte beside compressors."""
  mine = built.local_rows()
  scored = score_heldout_text(config, source, lambda batch: eval_step(params, built.place_batch(
      {name: x_BL[mine] for name, x_BL in batch.items()})))
  write_whole(run_dir.heldout_text_json, json.dumps(scored, indent=2) + '\n')
  for name, row in scored.items():
    compressors = ', '.join(f'{key} {row[key]:.3f}' for key in COMPRESSORS)
    print(f'held-out text, {name}: {row["bits_per_byte"]:.3f} bits per byte ({compressors})')


def _finish(run_dir, config, manifest, seconds) -> None:
  manifest['seconds_last_start'] = seconds
  manifest_lib.write(run_dir, manifest)
  report = build_report(run_dir)
  write_whole(run_dir.done, json.dumps({'step': config.n_steps}) + '\n')
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
