"""How the benchmarks read their command line and end."""

import sys
from collections.abc import Callable
from typing import Any

from absl import app, flags

from parallelism.topologies import quiet_plugins
from research.errors import UserError


def _parse(argv: list[str]) -> list[str]:
  main = sys.modules['__main__']
  if any(argument in ('--help', '-help', '-h', '--helpfull') for argument in argv[1:]):
    print(f'{main.__doc__.strip()}\n\n{flags.FLAGS.module_help(main)}')
    sys.exit(0)
  try:
    rest = flags.FLAGS(argv)
    if len(rest) > 1:
      raise UserError(f'unexpected argument {rest[1]!r}; see --help')
    return rest
  except (UserError, flags.Error) as error:
    fail(error)


def fail(error: Exception) -> None:
  """Prints one sentence and ends the process with code 2."""
  print(f'error: {error}', file=sys.stderr)
  sys.exit(2)


def run(main: Callable[[], Any]) -> None:
  """Runs a benchmark's main under absl; user errors end it with one sentence and code 2."""
  def guarded(unused_argv):
    quiet_plugins()
    try:
      main()
    except UserError as error:
      fail(error)
  app.run(guarded, flags_parser=_parse)
