"""Files of the published suite: a local folder or a dataset of the Hugging Face hub, and its rows.

  <family>/<dataset>.jsonl                     {split: demo, prompt, answer, label?, demo_set?}
                                               {split: test, prompt, correct_answer,
                                                incorrect_answer, ...}
  multihop_persona_qa/<persona>/facts.jsonl    {messages: [{role, content}, ...]}
  multihop_persona_qa/<persona>/test_questions.json
                                               [{id, question, category, expected_answer_regex}]
"""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import huggingface_hub
from huggingface_hub import errors

from research.dynamics.revisions import unreachable
from research.errors import UserError

HUB_NAME = 'jiaxin-wen/generalization-dynamics-evals'


def find(location: str, folders: Sequence[str]) -> pathlib.Path:
  """Returns the folder of a suite, of a hub dataset the cached one, fetched if need be.

  Without a network what was fetched once is used. An interrupted fetch goes on where it stopped.

  Args:
    location: a folder, or owner/dataset on the hub.
    folders: sub-folders that are fetched.

  Raises:
    UserError: it is neither, cannot be fetched, or has none of the sub-folders.
  """
  path = pathlib.Path(location).expanduser()
  if not path.is_dir():
    if path.is_absolute() or location.startswith(('.', '~')) or location.count('/') != 1:
      raise UserError(f'{location!r} is neither a folder that exists nor a dataset name like '
                      f'{HUB_NAME}')
    path = _fetched(location, folders)
  if not any((path / folder).is_dir() for folder in folders):
    raise UserError(f'{location} has none of the folders {", ".join(folders)}')
  return path


def _fetched(name: str, folders: Sequence[str]) -> pathlib.Path:
  """Returns the cached copy of a dataset's newest revision."""
  try:
    return pathlib.Path(huggingface_hub.snapshot_download(
        name, repo_type='dataset', allow_patterns=[f'{folder}/*' for folder in folders]))
  except (errors.HTTPError, errors.HFValidationError, OSError) as error:
    if isinstance(error, errors.HFValidationError):
      sentence = f'{name!r} is neither a folder nor a name like {HUB_NAME}'
    elif isinstance(error, errors.RepositoryNotFoundError):
      sentence = (f'{name} is no public dataset of huggingface.co, nor one that this account may '
                  'read; check the name, or log in with `hf auth login`')
    elif unreachable(error):
      sentence = (f'dataset {name} is not in the cache and huggingface.co cannot be reached; go '
                  'online once')
    else:
      sentence = f'dataset {name} cannot be fetched: {error}'.splitlines()[0]
    raise UserError(sentence) from error


def json_lines(path: pathlib.Path) -> list[tuple[str, dict[str, Any]]]:
  """Returns (file:line, object) of every line that is not blank.

  Raises UserError for a line that is not a JSON object: what it was cannot be told, and were it a
  demonstration, every draw would change.
  """
  rows = []
  with path.open(encoding='utf-8') as lines:
    for number, line in enumerate(lines, start=1):
      if line.strip():
        where = f'{path}:{number}'
        try:
          row = json.loads(line)
        except json.JSONDecodeError as error:
          raise UserError(f'{where} is not valid JSON: {error}') from error
        if not isinstance(row, dict):
          raise UserError(f'{where} is not a JSON object')
        rows.append((where, row))
  return rows


def problem(row: dict[str, Any], fields: Sequence[str]) -> str:
  """Returns what is wrong with those fields of a row, which are text; '' where nothing is."""
  missing = [field for field in fields if field not in row]
  if missing:
    return f'has no field {" and no field ".join(missing)}'
  for field in fields:
    if not isinstance(row[field], str):
      return f'{field}={row[field]!r} is not text'
    if not row[field].strip():
      return f'{field} is empty'
  return ''


def require(where: str, row: dict[str, Any], fields: Sequence[str]) -> None:
  """Raises UserError where one of those fields of a demonstration is not text."""
  if wrong := problem(row, fields):
    raise UserError(f'{where}: this demonstration {wrong}; without it every draw would differ')
