"""The record of a run while it goes on: rows, TensorBoard, timings per phase, progress line."""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax

from models.counting import flops_per_token
from parallelism import hardware
from research.config import ExperimentConfig
from research.data.batches import Source
from research.errors import UserError
from research.run_dir import RunDir
from research.training.guards import JUDGED_BY
from research.training.logs import JsonLines, Progress, TensorBoard, read_rows
from research.training.skipped import Skipped
from research.training.span import Span
from research.training.watchdog import Watchdog

# Phases that every step has: waiting for its batch, and hashing it while devices compute.
IN_STEP = ('data_seconds', 'batch_hash_seconds')


class Recorder:
  """Writes one metrics row and one timings row per step, and a row per held-out evaluation.

  Attributes:
    tokens: loss-bearing tokens consumed so far.
    skipped: the record of steps that changed nothing.
    began: clock at the start of this process's work.
    peak: the matmul rate that MFU is a share of, and where the figure is from.
  """

  def __init__(self, config: ExperimentConfig, run_dir: RunDir, span: Span, source: Source,
               watchdog: Watchdog, *, first: int, kept: int, tokens: int, n_devices: int):
    """Opens the logs and drops their rows after step `kept`.

    Args:
      config: the experiment.
      run_dir: where its logs are.
      span: the steps that the directory holds.
      source: of the data, to say which were skipped.
      watchdog: learns which phase the run is in.
      first: the step from which this process goes on.
      kept: the last step whose rows stay; -1 for none.
      tokens: loss-bearing tokens consumed up to `first`.
      n_devices: devices of the mesh, for the share of their peak (MFU).
    """
    self.tokens, self._is_sft = tokens, config.data.kind == 'sft'
    self._step_tokens = config.data.batch_size * config.data.sequence_length
    peak, origin = hardware.peak_flops(n_devices)
    self.peak = {'flops_per_second': peak, 'origin': origin}
    self._flops_share = flops_per_token(config.model, config.data.sequence_length) / peak
    self._metrics = JsonLines(run_dir.metrics_jsonl, kept)
    steps = [row['step'] for row in read_rows(run_dir.metrics_jsonl)]
    if steps != list(range(span.first + 1, first + 1)):
      raise UserError(f'{run_dir.metrics_jsonl} must hold one row for each of the steps '
                      f'{span.first + 1} to {first} that the run resumes from; it holds '
                      f'{len(steps)} rows')
    self.skipped = Skipped(config, run_dir, source, kept)
    self._watchdog = watchdog
    self._evals = JsonLines(run_dir.evals_jsonl, kept)
    self._timings = JsonLines(run_dir.timings_jsonl, kept)
    self._board = TensorBoard(run_dir.tensorboard, kept) if config.logging.tensorboard else None
    self._progress = Progress(span.last, first, config.logging.progress_seconds)
    self.began = self._lap = time.perf_counter()
    self._phases: dict[str, float] = {}

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    """Adds the time spent inside to `<name>_seconds` of the next row.

    What is done after a step thus stands in the row of the step that follows it.
    """
    start = time.perf_counter()
    self._watchdog.at(name)
    yield
    self._watchdog.at('step')
    key = f'{name}_seconds'
    self._phases[key] = self._phases.get(key, 0.0) + time.perf_counter() - start

  def step(self, step: int, metrics: dict[str, jax.Array], n_suspected: int) -> dict[str, Any]:
    """Writes the rows of a step that has been dispatched; waits for it, returns its metrics."""
    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
    judged_by = {name: values.pop(name) for name in JUDGED_BY}
    self._watchdog.at('step', step)
    with_loss = int(values.pop('batch_tokens'))
    self.tokens += with_loss
    row = {'step': step, 'tokens': self.tokens, **values}
    if self._is_sft:  # Elsewhere nearly every token has a loss.
      row |= {'bits_per_token': values['cross_entropy'] / math.log(2),
              'supervised_tokens': with_loss}
    seconds, phases = self._time_step()
    rate = self._step_tokens / seconds
    timing = {'step': step, 'seconds': seconds, 'tokens_per_second': rate,
              'mfu': rate * self._flops_share, **phases}
    self._metrics.append(row)
    self.skipped.note(row, judged_by)
    self._timings.append(timing)
    self._to_board('train', row)
    self._to_board('timing', timing)
    self._progress.update(step, row['loss'], rate, timing['mfu'], n_suspected)
    return row

  def heldout(self, row: dict[str, Any]) -> None:
    """Writes a row of held-out loss."""
    self._evals.append(row)
    self._to_board('heldout', row)

  def monitors(self, step: int, accuracies: dict[str, float]) -> None:
    """Shows the accuracy of every dataset of a snapshot in TensorBoard."""
    self._to_board('monitors', {'step': step, **accuracies})

  def sync(self) -> None:
    """Brings all rows to the disk, so that none is missing before a checkpoint that follows."""
    for log in (self._metrics, self._evals, self._timings, self.skipped):
      log.sync()
    if self._board:
      self._board.flush()

  def close(self) -> None:
    """Flushes and closes all logs."""
    for log in (self._metrics, self._evals, self._timings, self.skipped, self._board):
      if log:
        log.close()

  def _to_board(self, group: str, row: dict[str, Any]) -> None:
    if self._board:
      self._board.write(group, row)

  def _time_step(self) -> tuple[float, dict[str, float]]:
    """Returns the step's own seconds, and those of each phase, since the last call.

    The phases IN_STEP belong to it, others stand beside it.
    """
    now = time.perf_counter()
    phases, self._phases = self._phases, {}
    beside = sum(seconds for name, seconds in phases.items() if name not in IN_STEP)
    seconds, self._lap = max(now - self._lap - beside, 1e-9), now
    return seconds, phases
