"""What the timing rows of runs say about a stretch of steps."""

from typing import Any

NEVER = 10**9  # steps between what is not to happen


def window(rows: list[dict[str, Any]], skip: int, phase: str = '') -> float:
  """Returns the wall seconds between the rows of step `skip` and of the last step.

  A row's `seconds` leave out the phases of its step other than waiting for data; together they
  are the time since the row before.

  Args:
    rows: of timings.jsonl, one per step.
    skip: step whose end begins the window.
    phase: sum this phase alone.
  """
  rows = [row for row in rows if row['step'] > skip]
  if phase:
    return sum(row.get(phase, 0.0) for row in rows)
  return sum(value for row in rows for name, value in row.items()
             if name == 'seconds' or (name.endswith('_seconds') and name != 'data_seconds'))
