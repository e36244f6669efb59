"""Where revisions of a public model lie: sub-folders of a folder, or a Hugging Face repository."""

import dataclasses
import difflib
import fnmatch
import functools
import pathlib
import re
from collections.abc import Sequence
from typing import Protocol

import huggingface_hub
from absl import logging
from huggingface_hub import errors

from models.interop.files import CONFIG
from research.errors import UserError
from research.training.stored import DamagedError

SAFE = '*.safetensors'
_WEIGHTS = (SAFE, '*.bin')
FILES = (CONFIG, SAFE, '*.safetensors.index.json', 'tokenizer.json',
         'tokenizer_config.json')
_UNITS = {'': 1, 'K': 10**3, 'M': 10**6, 'B': 10**9, 'T': 10**12}
_NUMBER = r'(\d+(?:[.]\d+)?)'


@dataclasses.dataclass(frozen=True)
class Revision:
  """One revision.

  Attributes:
    name: of the sub-folder, branch or tag.
    stage: number after 'stage' in the name, 0 where there is none.
    step: optimizer steps, counted anew in every stage.
    tokens: seen by then, rounded as in the name; None where the name does not say.
  """

  name: str
  stage: int
  step: int
  tokens: int | None


def parse(name: str) -> Revision | None:
  """Returns the revision of a name such as 'step1000' or 'stage1-step1000-tokens5B', else None."""
  step = re.search(rf'(?<![a-zA-Z])steps?[-_]?{_NUMBER}([KMB]?)(?![a-zA-Z0-9.])', name)
  if not step:
    return None
  stage = re.search(r'(?<![a-zA-Z])stage[-_]?(\d+)', name)
  tokens = re.search(rf'(?<![a-zA-Z])tokens?[-_]?{_NUMBER}([KMBT]?)(?![a-zA-Z0-9.])', name)
  return Revision(name, int(stage[1]) if stage else 0, _count(step),
                  _count(tokens) if tokens else None)


def _count(found: re.Match) -> int:
  return round(float(found[1]) * _UNITS[found[2]])


def chosen(names: Sequence[str], pattern: str, where: str) -> list[Revision]:
  """Returns the revisions whose names match a pattern of the shell and name a step, in order.

  Raises:
    UserError: none does; names the nearest. Or two are of one stage and step.
  """
  matching = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
  found = sorted(filter(None, map(parse, matching)), key=lambda r: (r.stage, r.step, r.name))
  if not matching:
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
    raise UserError(f'{where}: no revision matches {pattern!r}; of {len(names)} the nearest are '
                    f'{", ".join(near) or "none"}')
  if not found:
    raise UserError(f'{where}: {len(matching)} revisions match {pattern!r} but none names a step, '
                    f'as step1000 does; one is {matching[0]}')
  for a, b in zip(found, found[1:]):
    if (a.stage, a.step) == (b.stage, b.step):
      raise UserError(f'{where}: revisions {a.name} and {b.name} are both of step {a.step}; give a '
                      'pattern that matches one of them')
  return found


class Place(Protocol):
  """Where revisions lie."""

  def names(self) -> list[str]:
    """Every revision there is."""

  def folder(self, name: str, files: Sequence[str] = FILES) -> pathlib.Path:
    """The folder of a revision with the files of these patterns in it, fetched if need be."""

  def commits(self) -> dict[str, str]:
    """The commit of every revision by name; {} where there are none."""


class UnusableError(DamagedError):
  """A checkpoint is not whole, or no model of ours; `path` is the file or folder to blame.

  `kind` is that of the finding which the audit makes of it.
  """

  kind = 'damaged'

  def __init__(self, message: str, path: pathlib.Path):
    super().__init__(message)
    self.path = path


class Folder:
  """Revisions as sub-folders: those with a config.json or weights, or with a step for a name."""

  def __init__(self, path: pathlib.Path):
    self._path = path

  def __str__(self):
    return str(self._path)

  def names(self) -> list[str]:
    return sorted(path.name for path in self._path.iterdir() if path.is_dir() and (
        parse(path.name) or any(next(path.glob(kind), None) for kind in (CONFIG, *_WEIGHTS))))

  def folder(self, name: str, files: Sequence[str] = FILES) -> pathlib.Path:
    del files  # all there are
    return self._path / name

  def commits(self) -> dict[str, str]:
    return {}


class Repository:
  """Branches and tags of a repository; what was fetched stays in the cache of huggingface_hub.

  An interrupted fetch goes on where it stopped. Without a network the cached revisions are there.
  """

  def __init__(self, name: str):
    self.name = name

  def __str__(self):
    return self.name

  def names(self) -> list[str]:
    return sorted(self.commits())

  def commits(self) -> dict[str, str]:
    return self._commits

  @functools.cached_property
  def _commits(self) -> dict[str, str]:
    try:
      refs = huggingface_hub.HfApi().list_repo_refs(self.name)
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
      if unreachable(error) and (cached := self._cached()):
        logging.warning('huggingface.co cannot be reached: of %s there are the %d revisions in the '
                        'cache', self.name, len(cached))
        return cached
      raise UserError(self._sentence(error, '')) from error
    # Of a tag and a branch of one name the branch is what is fetched.
    return {ref.name: ref.target_commit for ref in [*refs.tags, *refs.branches]}

  def folder(self, name: str, files: Sequence[str] = FILES) -> pathlib.Path:
    try:
      folder = pathlib.Path(huggingface_hub.snapshot_download(
          self.name, revision=name, allow_patterns=list(files), ignore_patterns=['*/*']))
      if SAFE in files and not next(folder.glob(SAFE), None):
        self._refuse_pickled(name, folder)
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
      raise UserError(self._sentence(error, name)) from error
    return folder

  def _refuse_pickled(self, name: str, folder: pathlib.Path) -> None:
    """Raises UnusableError for a revision that has weights, but none that are fetched."""
    pickled = [file for file in huggingface_hub.HfApi().list_repo_files(self.name, revision=name)
               if file.endswith('.bin')]
    if pickled:
      raise UnusableError(f'{self.name} at revision {name} has only {min(pickled)}, which may run '
                          'code when read; convert it to safetensors', folder)

  def _cached(self) -> dict[str, str]:
    """Returns the commits of the revisions that the cache knows by name."""
    try:
      repos = huggingface_hub.scan_cache_dir().repos
    except errors.CacheNotFound:
      return {}
    return {ref: revision.commit_hash for repo in repos if repo.repo_id == self.name
            for revision in repo.revisions for ref in revision.refs}

  def _sentence(self, error: Exception, name: str) -> str:
    """Returns what was wrong with a request, by its error."""
    what = f'{self.name} at revision {name}' if name else self.name
    if isinstance(error, errors.HFValidationError):
      return f'{self.name!r} is neither a folder nor a name like owner/repository'
    if isinstance(error, errors.RevisionNotFoundError):
      near = difflib.get_close_matches(name, self.names(), n=3, cutoff=0.0)
      return f'{self.name} has no revision {name}; the nearest are {", ".join(near)}'
    if isinstance(error, errors.RepositoryNotFoundError):  # a gated one too
      return (f'{self.name} is no public repository of huggingface.co, nor one that this account '
              'may read; check the name, or log in with `hf auth login`')
    if unreachable(error):
      return f'{what} is not in the cache and huggingface.co cannot be reached; go online once'
    return f'{what} cannot be fetched: {_answer(error) or error}'.splitlines()[0]


def _answer(error: Exception) -> errors.HfHubHTTPError | None:
  """Returns the answer of the server that an error is about, or was raised from."""
  while error is not None and not isinstance(error, errors.HfHubHTTPError):
    error = error.__cause__
  return error


def unreachable(error: Exception) -> bool:
  """Returns whether no answer came, or one that says that the server is down."""
  if answer := _answer(error):
    return answer.response.status_code >= 500
  if isinstance(error, OSError):
    return isinstance(error, (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError,
                              ConnectionError))
  return isinstance(error, errors.HTTPError)


def place_of(location: str) -> Place:
  """Returns the place that a location names: a folder that exists, or a repository.

  Raises UserError for what is neither.
  """
  path = pathlib.Path(location).expanduser()
  if path.is_dir():
    return Folder(path)
  if path.is_absolute() or location.startswith(('.', '~')) or location.count('/') != 1:
    raise UserError(f'{location!r} is neither a folder that exists nor a name like '
                    'owner/repository')
  return Repository(location)
