"""The record of skipped steps, and when there are too many of them."""

from typing import Any

from research.config import ExperimentConfig
from research.data.batches import Source, window_documents
from research.errors import DIVERGED, Stopped
from research.run_dir import RunDir
from research.training.logs import JsonLines

_LEFT_OUT = ('step', 'text')  # of what describes a document: known already, and long


class Skipped:
  """One line per skipped step: what it was judged by and what its batch was made of.

  The batch itself is `research.data.batches.batch_at` of the step before, as of any step.
  """

  def __init__(self, config: ExperimentConfig, run_dir: RunDir, source: Source, kept: int):
    """Opens the record and drops its lines after step `kept` (-1: all)."""
    self._config, self._source, self._path = config, source, run_dir.skipped_jsonl
    self._lines = JsonLines(self._path, kept)
    self._last: dict[str, Any] | None = None

  @property
  def too_many(self) -> bool:
    """Whether so many steps in a row were skipped that the run has to stop."""
    return self._last is not None

  def note(self, row: dict[str, Any], judged_by: dict[str, float]) -> None:
    """Takes in a step; writes a line if it was skipped.

    Args:
      row: the step's row of metrics.
      judged_by: the metrics `guards.JUDGED_BY`.
    """
    if not row['skipped']:
      self._last = None
      return
    known, in_a_row = judged_by.pop('usual_known'), int(judged_by.pop('skipped_in_a_row'))
    line = {'step': row['step'], 'loss': row['loss'], 'grad_norm': row['grad_norm'],
            'in_a_row': in_a_row,
            **{name: value if known else None for name, value in judged_by.items()},
            'first_row': (row['step'] - 1) * self._config.data.batch_size,
            'documents': self._documents(row['step'])}
    self._lines.append(line)
    stop_after = self._config.guards.stop_after
    self._last = line if stop_after and in_a_row >= stop_after else None

  def _documents(self, step: int) -> list[dict[str, Any]]:
    """Returns what the batch of a step was made of, document by document."""
    return [{name: value for name, value in document.items() if name not in _LEFT_OUT}
            for document in window_documents(
                self._source, self._config.data.batch_size, step - 1, step)]

  def stopped(self, step: int) -> Stopped:
    """Returns the end of a run that was saved at `step` because of too many skipped steps."""
    last = self._last
    return Stopped(
        f'{last["in_a_row"]} steps in a row were skipped up to step {last["step"]} (loss '
        f'{last["loss"]:g}, gradient norm {last["grad_norm"]:g}), see {self._path}; saved at '
        f'step {step}: to go on skipping until the new level is the usual one, repeat the command '
        'with --config.guards.stop_after=0; to train otherwise from here, begin a run with '
        '--config.start.run_dir', DIVERGED)

  def sync(self) -> None:
    """Brings all lines to the disk."""
    self._lines.sync()

  def close(self) -> None:
    """Closes the record."""
    self._lines.close()
