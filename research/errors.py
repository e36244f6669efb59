"""Ends of a run that are no defects: one sentence, shown without a traceback, and an exit code."""

# Exit codes of a run that stopped by itself with its state saved.
PREEMPTED = 85  # it was asked to; repeat the command to resume
DIVERGED = 3  # too many steps in a row were skipped; look before resuming


class UserError(ValueError):
  """Something the user asked for cannot be done; the message says what, where and the fix."""


class Stopped(Exception):
  """A run that ends before its last step, saved whole; the message says where and what next."""

  def __init__(self, sentence: str, exit_code: int):
    super().__init__(sentence)
    self.exit_code = exit_code
