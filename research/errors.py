"""The error that a user can mend: one sentence, shown without a traceback."""


class UserError(ValueError):
  """Something the user asked for cannot be done; the message says what, where and the fix."""
