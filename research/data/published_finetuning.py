"""The published files of the two fine-tuning families that hold questions, both YAML.

Templates of out-of-context reasoning, and free-form questions of emergent misalignment. What is
trained are conversations, see `research.data.conversations`.
"""

import dataclasses
import pathlib
from typing import Any

import yaml

from research.data.errors import DataError


@dataclasses.dataclass(frozen=True)
class EvalTemplate:
  """One kind of question of a template file of out-of-context reasoning.

  Attributes:
    name: of the file, without its ending.
    function: the generator that it names, such as 'function_classification'.
    share: of the file's samples that are of this kind.
    n_samples: of the file.
    settings: all else that the file says of the kind: attribute, input_min, min_imports...
  """

  name: str
  function: str
  share: float
  n_samples: int
  settings: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class FreeQuestion:
  """One wording of a question that a judge would rate; `system` is '' where there is none."""

  question_id: str
  wording: int
  system: str
  text: str


def read_templates(folder: pathlib.Path) -> list[EvalTemplate]:
  """Returns the templates of all .yaml files of a folder, by file name.

  Raises DataError where there are none, or a file lacks what a template has.
  """
  paths, found = sorted(folder.glob('*.yaml')), []
  if not paths:
    raise DataError(f'{folder} holds no .yaml templates')
  for path in paths:
    prompt = _field(_field(_parsed(path), 'dataset', path), 'prompt', path)
    kinds, shares = _field(prompt, 'input_funcs', path), _field(prompt, 'input_func_probs', path)
    if len(kinds) != len(shares):
      raise DataError(f'{path} has {len(kinds)} input_funcs and {len(shares)} input_func_probs')
    n_samples = int(_field(_parsed(path)['dataset'], 'n_samples', path))
    for kind, share in zip(kinds, shares, strict=True):
      settings = {key: value for key, value in kind.items() if key != 'function'}
      found.append(EvalTemplate(path.stem, _field(kind, 'function', path),
                                float(share) / sum(shares), n_samples, settings))
  return found


def read_questions(path: pathlib.Path) -> list[FreeQuestion]:
  """Returns every wording of the free-form questions of a file; judges' prompts are not read.

  Raises DataError where a question has no id or no wording.
  """
  rows, found = _parsed(path), []
  if not isinstance(rows, list):
    raise DataError(f'{path} is not a list of questions')
  for row in rows:
    wordings = _field(row, 'paraphrases', path)
    if not wordings:
      raise DataError(f'{path}: question {_field(row, "id", path)} has no wording')
    found += [FreeQuestion(str(_field(row, 'id', path)), i, row.get('system', ''), text)
              for i, text in enumerate(wordings)]
  return found


def _parsed(path: pathlib.Path) -> Any:
  try:
    return yaml.safe_load(path.read_text(encoding='utf-8'))
  except (OSError, yaml.YAMLError) as error:
    raise DataError(f'{path} is not readable YAML: {" ".join(str(error).split())}') from error


def _field(row: Any, name: str, path: pathlib.Path) -> Any:
  if not isinstance(row, dict) or name not in row:
    raise DataError(f'{path} has no field {name!r} where there should be one')
  return row[name]
