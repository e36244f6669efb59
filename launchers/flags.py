"""The command line that all launchers share: --experiment, --config.* overrides, --help."""

import difflib
import importlib
import logging as stdlib_logging
import os
import pkgutil
import select
import signal
import sys
import types
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging

import experiments
from parallelism import distributed
from parallelism.topologies import quiet_plugins
from research import overrides as overrides_lib
from research.config import ExperimentConfig, settings
from research.errors import Stopped, UserError
from research.training.start import continued

_overrides: list[tuple[str, str]] = []


def experiment_names() -> list[str]:
  """Returns the names that --experiment takes: the modules of experiments/."""
  return sorted(module.name for module in pkgutil.iter_modules(experiments.__path__)
                if not module.ispkg)


def _chosen(name: str, among: list[str], what: str) -> str:
  if name not in among:
    near = difflib.get_close_matches(name, among, n=1, cutoff=0.0)
    raise UserError(f'--experiment={name}: no such {what}; the nearest is {near[0]} '
                    f'(all: {", ".join(among)})')
  return name


def _module(name: str) -> types.ModuleType:
  return importlib.import_module(f'experiments.{_chosen(name, experiment_names(), "experiment")}')


def _is_run(name: str) -> bool:
  return '/' in name or hasattr(_module(name), 'get_config')


def load_sweep(name: str) -> dict[str, ExperimentConfig]:
  """Returns the members of a sweep by name; raises UserError if it is none."""
  if _is_run(name):
    raise UserError(f'--experiment={name} is one run, not a sweep; start it with launchers.pretrain')
  return _module(name).get_configs()


def load_experiment(name: str) -> ExperimentConfig:
  """Returns the config of an experiment file, or of a member of a sweep ('<sweep>/<member>').

  Raises UserError naming the nearest where the name is unknown.
  """
  module_name, slash, member = name.partition('/')
  if slash:
    members = load_sweep(module_name)
    return members[_chosen(member, list(members), f'member of {module_name}')]
  if not _is_run(name):
    raise UserError(f'--experiment={name} is a sweep; start it with launchers.sweep, or one of its '
                    f'members as {name}/<member>: {", ".join(load_sweep(name))}')
  return _module(name).get_config()


def override_arguments() -> list[str]:
  """Returns the --config.* arguments of the command line, to hand them on."""
  return [f'--config.{path}={text}' for path, text in _overrides]


def overrides() -> list[tuple[str, str]]:
  """Returns the --config.* overrides of the command line as (path, text)."""
  return list(_overrides)


def config_from_flags(name: str, init_from: str = '') -> ExperimentConfig:
  """Returns the experiment with the --config.* overrides of the command line applied.

  `init_from` ('RUN_DIR@STEP') names a run whose model, tokenizer and parameters come first.
  """
  try:
    return overrides_lib.apply(continued(load_experiment(name), init_from), _overrides)
  except UserError:
    raise
  except ValueError as error:
    raise UserError(str(error)) from None


def _split(arguments: list[str]) -> list[str]:
  """Takes --config.path=text (or --config.path text) out of the arguments."""
  rest, waiting = [], iter(arguments)
  for argument in waiting:
    if not argument.startswith('--config.'):
      rest.append(argument)
      continue
    path, equals, text = argument.removeprefix('--config.').partition('=')
    if not equals:
      text = next(waiting, None)
      if text is None:
        raise UserError(f'{argument} needs a value: {argument}=...')
    _overrides.append((path, text))
  return rest


def _help(arguments: list[str]) -> str:
  main = sys.modules['__main__']
  lines = [(main.__doc__ or '').strip(), '', 'Flags:', flags.FLAGS.get_key_flags_for_module(main)
           and flags.FLAGS.module_help(main) or '']
  if 'experiment' in flags.FLAGS:
    chosen = [a.partition('=')[2] for a in arguments if a.startswith('--experiment=')]
    name = chosen[-1] if chosen else flags.FLAGS['experiment'].default
    config = load_experiment(name) if _is_run(name) else next(iter(load_sweep(name).values()))
    lines += ['Experiments: ' + ', '.join(experiment_names()), '',
              f'Settings (--config.<name>=<value>), with the values of {config.name}:']
    for row in settings(config):
      lines += [f'  {row.path}={row.value}', f'      {row.doc} [{row.kind}]']
  return '\n'.join(lines)


def _parse(argv: list[str]) -> list[str]:
  try:
    if any(a in ('--help', '-help', '-h', '--helpfull') for a in argv[1:]):
      print(_help(argv))
      sys.exit(0)
    return flags.FLAGS(argv[:1] + _split(argv[1:]))
  except (UserError, flags.Error) as error:
    fail(error)


def check_used(command: str, used: dict[str, list[str]]) -> None:
  """Raises UserError for a flag that was given and that other commands use, this one does not."""
  known = sorted({name for names in used.values() for name in names})
  for name in known:
    if flags.FLAGS[name].present and name not in used[command]:
      said = ', '.join(f'--{flag}' for flag in used[command])
      raise UserError(f'--{name} means nothing to {command}; it takes {said}')


def fail(error: Exception) -> None:
  """Prints one sentence and ends the process with code 2."""
  print(f'error: {error}', file=sys.stderr)
  sys.exit(2)


def _is_unread() -> bool:
  """Returns whether standard output is a pipe whose reader has gone, as `| head` does."""
  poll = select.poll()
  poll.register(sys.stdout.fileno(), 0)
  return any(event & select.POLLERR for _, event in poll.poll(0))


def _until_unread(start: Callable[[], Any]) -> None:
  """Runs what ends in SystemExit; where nobody reads its output any more, ends as by SIGPIPE."""
  try:
    try:
      start()
    except SystemExit:
      sys.stdout.flush()  # Here, not while Python ends, what is left meets a closed pipe.
      raise
  except BrokenPipeError:
    if not _is_unread():  # another pipe or a socket
      raise
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(128 + signal.SIGPIPE)


def run(main: Callable[..., Any], words: tuple[str, ...] = ()) -> None:
  """Runs a launcher's main under absl; user errors end it with one sentence and code 2.

  Args:
    main: called with one text for each of `words`; what it returns is the exit code, None for 0.
    words: names of the arguments that stand without a flag, in order, before or between flags.
  """
  flags.FLAGS.set_gnu_getopt(True)

  def guarded(argv):
    logging.set_verbosity(logging.WARNING)
    quiet_plugins()
    # Orbax logs a failed save with its traceback; the error itself reaches us when we wait for it.
    logging.get_absl_logger().addFilter(lambda record: '/orbax/' not in record.pathname or
                                        record.levelno < stdlib_logging.ERROR)
    try:
      if len(argv) > 1 + len(words):
        raise UserError(f'unexpected argument {argv[1 + len(words)]!r}; settings are given as '
                        '--config.<name>=<value>')
      if len(argv) < 1 + len(words):
        raise UserError(f'the {words[len(argv) - 1]} is missing; see --help')
      return main(*argv[1:])
    except UserError as error:
      distributed.fail(str(error), 2)
      fail(error)
    except Stopped as stop:
      signal.signal(signal.SIGTERM, signal.SIG_IGN)  # All is saved; a second one has no say.
      distributed.finish()
      print(stop, file=sys.stderr)
      sys.exit(stop.exit_code)
    except KeyboardInterrupt:
      distributed.fail('interrupted', 130)
      print('\ninterrupted; repeat the command to resume', file=sys.stderr)
      sys.exit(130)
    except Exception as error:
      distributed.fail(f'{type(error).__name__}: {error}'.splitlines()[0], 1)
      raise
  _until_unread(lambda: app.run(guarded, flags_parser=_parse))
