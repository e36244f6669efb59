"""The error that bad data raises."""

from research.errors import UserError


class DataError(UserError):
  """Bad or missing data, in one sentence: what, in which file or field, and what would be right."""
