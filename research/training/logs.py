"""What a run says: rows in JSON-lines files, TensorBoard events, the progress line."""

import json
import os
import pathlib
import sys
import time
from typing import Any

from research.run_dir import write_whole


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the rows of a JSON-lines file; a last line torn by a kill is left out.

  Raises:
    ValueError: a broken line that is not the last.
  """
  if not path.exists():
    return []
  lines = path.read_text(encoding='utf-8').split('\n')  # splitlines() also parts at U+2028
  rows = []
  for number, line in enumerate(lines, 1):
    if not line and number == len(lines):
      break
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      if number < len(lines):
        raise ValueError(f'{path}:{number} is not JSON') from None
  return rows


class JsonLines:
  """An append-only file with one JSON object per line, in order of its `step`."""

  def __init__(self, path: pathlib.Path, last_step: int):
    """Opens the file for appending, keeping only whole rows with step <= last_step."""
    if path.exists():
      rows = [row for row in read_rows(path) if row['step'] <= last_step]
      write_whole(path, ''.join(json.dumps(row) + '\n' for row in rows))
    self._file = open(path, 'a', encoding='utf-8')

  def append(self, row: dict[str, Any]) -> None:
    """Writes one row through to the operating system."""
    self._file.write(json.dumps(row) + '\n')
    self._file.flush()

  def sync(self) -> None:
    """Brings all rows to the disk."""
    os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class TensorBoard:
  """Scalars for TensorBoard; rows after `last_step` of an earlier start are purged."""

  def __init__(self, path: pathlib.Path, last_step: int):
    from tensorboardX import SummaryWriter  # Imports PyTorch where that is installed: seconds.
    self._writer = SummaryWriter(str(path), purge_step=last_step + 1)

  def write(self, group: str, row: dict[str, Any]) -> None:
    """Writes every number of a row under group/name at the row's step."""
    for name, value in row.items():
      if name != 'step' and isinstance(value, (int, float)):
        self._writer.add_scalar(f'{group}/{name}', value, row['step'])

  def flush(self) -> None:
    """Writes all events through to the operating system."""
    self._writer.flush()

  def close(self) -> None:
    """Flushes and closes."""
    self._writer.close()


def duration(seconds: float) -> str:
  """Returns seconds as h:mm:ss or m:ss."""
  minutes, rest = divmod(int(seconds + 0.5), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02d}:{rest:02d}' if hours else f'{minutes}:{rest:02d}'


class Progress:
  """A line on stderr: step, loss, speed, MFU, ETA, suspected hops; rewritten on a terminal."""

  def __init__(self, n_steps: int, start_step: int, every_seconds: float):
    self._n_steps, self._start_step = n_steps, start_step
    self._terminal = sys.stderr.isatty()
    self._every = 0.5 if self._terminal else every_seconds
    self._began = self._said = time.monotonic()

  def update(self, step: int, loss: float, tokens_per_second: float, mfu: float, suspected: int
             ) -> None:
    """Says where the run is, at most once per interval and at the last step."""
    now = time.monotonic()
    if now - self._said < self._every and step < self._n_steps:
      return
    self._said = now
    per_step = (now - self._began) / max(1, step - self._start_step)
    line = (f'step {step}/{self._n_steps}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  '
            f'MFU {mfu:.0%}  ETA {duration(per_step * (self._n_steps - step))}  '
            f'suspected hops {suspected}')
    end = '\r' if self._terminal and step < self._n_steps else '\n'
    print(('\x1b[2K' if self._terminal else '') + line, end=end, file=sys.stderr, flush=True)
