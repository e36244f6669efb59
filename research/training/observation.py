"""What is written while a run goes on: rows, snapshots with scores, held-out loss, checkpoints."""

from typing import Any

import jax
import numpy as np

from research.build import Build
from research.config import ExperimentConfig
from research.data.batches import Source, heldout_batches
from research.monitors.watch import Watch
from research.run_dir import RunDir
from research.training import hashes
from research.training import snapshots as snapshots_lib
from research.training.checkpoints import Checkpoints, items
from research.training.provenance import Chain
from research.training.recorder import Recorder
from research.training.snapshots import SnapshotWriter
from research.training.span import Span
from research.training.step import State


class Observation:
  """Looks at states and steps, in the order in which they come.

  Attributes:
    recorder: rows and phases.
  """

  def __init__(self, config: ExperimentConfig, run_dir: RunDir, span: Span, built: Build,
               source: Source, recorder: Recorder, snapshots: SnapshotWriter, watch: Watch,
               checkpoints: Checkpoints, chain: Chain, kept: int):
    """Takes over what writes, places held-out batches; `kept` is the last step that stays."""
    self._config, self._span, self._chain = config, span, chain
    self.recorder, self._watch, self._checkpoints = recorder, watch, checkpoints
    self._observers = span.observers(run_dir, kept)
    self._snapshots = snapshots
    self._eval_step = built.eval_step()
    self._heldout = [built.place_batch(batch) for batch in heldout_batches(
        source, config.data.batch_size, config.evals.n_batches, built.local_rows())]
    self._dispatched: tuple[int, dict[str, jax.Array]] | None = None

  def step(self, step: int, metrics: dict[str, jax.Array], local: dict[str, np.ndarray]) -> None:
    """Takes in a step that was dispatched; its row is written while the next one is computed."""
    with self.recorder.phase('batch_hash'):
      self._chain.window.add(step, local)
    self._write_row()
    self._dispatched = step, metrics

  def due(self, step: int) -> bool:
    """Returns whether `state` has something to do at this step."""
    checkpoints, evals = self._config.checkpoints, self._config.evals
    return any(self._span.due(step, every)
               for every in (checkpoints.snapshot_every, checkpoints.every, evals.every))

  def state(self, step: int, state: State, halting: bool = False) -> None:
    """Takes what is due: snapshot with scores, held-out loss, checkpoint (always where it halts)."""
    self._write_row()
    every, span = self._config.checkpoints, self._span
    if span.due(step, every.snapshot_every, since=span.observed_from):
      self._snapshot(step, state)
    if self._heldout and span.due(step, self._config.evals.every):
      with self.recorder.phase('eval'):
        row = {'step': step, **self._heldout_loss(state.params)}
        self.recorder.heldout(row)
        self._observers.row('evals', row)
    if halting or span.due(step, every.every, since=span.first + 1):
      self._checkpoint(step, state)

  def close(self) -> None:
    """Waits until all is on the disk, and closes it."""
    self._snapshots.close()
    self._checkpoints.close()
    self.recorder.close()
    self._observers.close()

  def _write_row(self) -> None:
    """Writes the row of the step that was dispatched last, unless it stands already."""
    if self._dispatched:
      row = self.recorder.step(*self._dispatched, self._watch.n_suspected)
      self._observers.row('metrics', row)
      self._dispatched = None

  def _snapshot(self, step: int, state: State) -> None:
    stored = snapshots_lib.cast(state.params, self._config.checkpoints.snapshot_dtype)
    with self.recorder.phase('hash'):
      tensors = hashes.digests(stored)
    with self.recorder.phase('save'):
      self._snapshots.write(step, stored, tensors)
      self._observers.snapshot(step, stored)
    with self.recorder.phase('monitor'):
      self.recorder.monitors(step, self._watch.score(step, stored))
      self._observers.scores(step)

  def _heldout_loss(self, params: Any) -> dict[str, float]:
    """Returns nats per token of the held-out batches, and how many tokens they have."""
    nats = sum(float(np.asarray(self._eval_step(params, batch)).sum(dtype=np.float64))
               for batch in self._heldout)
    tokens = sum(float(batch['loss_mask'].sum()) for batch in self._heldout)
    return {'heldout_loss': nats / tokens, 'heldout_tokens': tokens}

  def _checkpoint(self, step: int, state: State) -> None:
    reached = {'step': step, 'tokens': self.recorder.tokens}
    with self.recorder.phase('hash'):
      proof = self._chain.record(step, hashes.digests(items(state)), reached)
    with self.recorder.phase('save'):
      self._snapshots.sync()
      self.recorder.sync()
      self._observers.checkpoint(step, state)
      self._checkpoints.save(step, state, reached, proof, self._watch.needed)
