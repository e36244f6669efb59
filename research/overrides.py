"""Command-line overrides: (dotted path, text) pairs applied to a frozen config tree."""

import ast
import dataclasses
import difflib
import types
import typing
from typing import Any

from research.config import settings
from research.errors import UserError

_TRUTH = {'true': True, '1': True, 'yes': True, 'false': False, '0': False, 'no': False}


def _parse_scalar(kind: type, text: str) -> Any:
  if kind is bool:
    return _TRUTH[text.lower()]
  return kind(text)


def _parse_tuple(hint: Any, text: str) -> tuple:
  element = typing.get_args(hint)[0]
  if element is str and not text.lstrip().startswith(('(', '[')):
    return tuple(part for part in text.split(',') if part)
  value = ast.literal_eval(text if text.strip().startswith(('(', '[')) else f'({text},)')
  return _checked_tuple(hint, value)


def _checked_tuple(hint: Any, value: Any) -> tuple:
  element = typing.get_args(hint)[0]
  if typing.get_origin(element) is tuple:
    return tuple(_checked_tuple(element, part) for part in value)
  parts = tuple(element(part) if element is float else part for part in value)
  if not all(isinstance(part, element) for part in parts):
    raise ValueError(f'not all {element.__name__}')
  return parts


def parse(hint: Any, text: str) -> Any:
  """Returns text read as the type `hint`; raises ValueError, KeyError or SyntaxError if it isn't."""
  if typing.get_origin(hint) in (typing.Union, types.UnionType):
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    return None if text.lower() == 'none' else parse(options[0], text)
  if typing.get_origin(hint) is tuple:
    return _parse_tuple(hint, text)
  return _parse_scalar(hint, text)


def type_name(hint: Any) -> str:
  """Returns a short readable name of a setting's type."""
  return hint.__name__ if isinstance(hint, type) else str(hint).replace('typing.', '')


def _assemble(config: Any, values: dict[str, Any], prefix: str = '') -> Any:
  """Rebuilds the tree bottom-up so that every __post_init__ sees final values."""
  changed = {}
  for field in dataclasses.fields(config):
    path, old = prefix + field.name, getattr(config, field.name)
    if dataclasses.is_dataclass(old):
      new = _assemble(old, values, path + '.')
    else:
      new = values.get(path, old)
    if new is not old:
      changed[field.name] = new
  return dataclasses.replace(config, **changed) if changed else config


def apply(config: Any, overrides: list[tuple[str, str]]) -> Any:
  """Returns the config with overrides applied; later ones win.

  Raises:
    UserError: an unknown field (the message names the nearest), or text of the wrong type.
    ValueError: the final values contradict each other (from a config's __post_init__).
  """
  known = {row.path: row for row in settings(config)}
  values = {}
  for path, text in overrides:
    if path not in known:
      near = difflib.get_close_matches(path, known, n=1, cutoff=0.0)
      raise UserError(f'--config.{path}: no such setting; the nearest is --config.{near[0]}')
    hint = known[path].type
    try:
      values[path] = parse(hint, text)
    except (ValueError, KeyError, SyntaxError, TypeError):
      raise UserError(f'--config.{path}={text}: expected {type_name(hint)}, for instance '
                      f'--config.{path}={known[path].value}') from None
  return _assemble(config, values)
