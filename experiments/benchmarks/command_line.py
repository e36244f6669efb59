"""How the benchmarks read their command line and end."""

import sys
from collections.abc import Callable, Iterable
from typing import Any

from absl import app, flags, logging

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


def positive_numbers(flag: flags.FlagHolder, default: list[str] | None = None) -> list[int]:
  """Returns the numbers of a list flag, those of `default` where it is not given.

  Raises:
    UserError: one is not a positive whole number.
  """
  texts = flag.value or default or []
  for text in texts:
    if not text.isdigit() or not int(text):
      raise UserError(f'--{flag.name}={text} is not a positive whole number')
  return [int(text) for text in texts]


def chosen(flag: flags.FlagHolder, known: Iterable[str]) -> list[str]:
  """Returns the names of a list flag, each once; all that are known where it is not given.

  Raises:
    UserError: one is not known, or there is none.
  """
  known = list(known)
  names = known if flag.value is None else list(dict.fromkeys(flag.value))
  for name in names:
    if name not in known:
      raise UserError(f'--{flag.name}={name} is not one of {", ".join(known)}')
  if not names:
    raise UserError(f'--{flag.name} is empty; name at least one of {", ".join(known)}')
  return names


def fail(error: Exception) -> None:
  """Prints one sentence and ends the process with code 2."""
  print(f'error: {error}', file=sys.stderr)
  sys.exit(2)


def run(main: Callable[[], Any]) -> None:
  """Runs a benchmark's main under absl; user errors end it with one sentence and code 2."""
  def guarded(unused_argv):
    logging.set_verbosity(logging.WARNING)
    quiet_plugins()
    try:
      main()
    except UserError as error:
      fail(error)
  app.run(guarded, flags_parser=_parse)
