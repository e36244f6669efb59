"""Public series: the revisions of one model, as parameters of ours, read lazily."""

import pathlib

from models.config import ModelConfig
from models.interop.checkpoint import HfCheckpoint
from models.interop.configs import model_config
from models.interop.files import CONFIG, read_json
from research.data import tokenizers
from research.data.tokenizers import Tokenizer
from research.dynamics.revisions import Revision, UnusableError, chosen, place_of
from research.errors import UserError

TOKENIZER = ('tokenizer.json', 'tokenizer_config.json')


class OtherModelError(UnusableError):
  """A sound checkpoint whose config.json is not that of most of its series."""

  kind = 'config'


def open_checkpoint(folder: pathlib.Path) -> HfCheckpoint:
  """Returns the checkpoint of a folder; raises UnusableError for one that cannot be used."""
  try:
    return HfCheckpoint(folder)
  except ValueError as error:
    raise UnusableError(str(error), getattr(error, 'path', folder)) from error


def open_tokenizer(folder: pathlib.Path, config: ModelConfig) -> Tokenizer:
  """Returns the tokenizer beside a checkpoint.

  Raises:
    UserError: there is none, or it has more tokens than the model has rows.
  """
  if not (folder / TOKENIZER[0]).is_file():
    raise UserError(f'{folder} has no tokenizer.json')
  tokenizer = tokenizers.load(folder / TOKENIZER[0])
  if tokenizer.vocab_size > config.vocab_size:
    raise UserError(f'{folder}: tokenizer.json has {tokenizer.vocab_size} tokens, the model only '
                    f'vocab_size={config.vocab_size}; they do not belong together')
  return tokenizer


class PublicSeries:
  """The revisions of one public model in order of stage and step.

  Attributes:
    location: folder or repository.
    revisions: name, stage, step and tokens of each.
  """

  def __init__(self, location: str, pattern: str = '*step*'):
    """Lists the revisions whose names match a pattern of the shell; fetches no weights.

    Raises:
      UserError: the location is neither a folder nor a repository, or nothing matches.
    """
    self.location = location
    self._place = place_of(location)
    self.revisions: list[Revision] = chosen(self._place.names(), pattern, location)
    self._by_name = {revision.name: revision for revision in self.revisions}
    self._open: dict[str, HfCheckpoint] = {}

  @property
  def names(self) -> list[str]:
    """Names of the revisions."""
    return [revision.name for revision in self.revisions]

  def config(self, name: str) -> ModelConfig:
    """Returns the model of a revision; fetches no weights."""
    path = self.folder(name, (CONFIG,)) / CONFIG
    try:
      return model_config(read_json(path))
    except ValueError as error:
      raise UnusableError(f'{self.location}, revision {name}: {error}', path) from error

  def checkpoint(self, name: str) -> HfCheckpoint:
    """Returns a revision's files, fetched if need be and checked against its config.json."""
    if name not in self._open:
      self._open[name] = open_checkpoint(self.folder(name))
    return self._open[name]

  def commits(self) -> dict[str, str]:
    """Returns the commit of every revision of a repository by name; {} of a folder."""
    return self._place.commits()

  def close(self, name: str) -> None:
    """Lets go of a revision's open files."""
    self._open.pop(name, None)

  def folder(self, name: str, *files) -> pathlib.Path:
    """Returns a revision's folder, with the files of these patterns (all, without) in it."""
    if name not in self._by_name:
      raise UserError(f'{self.location} has no revision {name} in this series; it has '
                      f'{", ".join(self.names[:5])}{"..." if len(self.names) > 5 else ""}')
    return self._place.folder(name, *files)
