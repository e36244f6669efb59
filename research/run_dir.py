"""Every path that a run writes, and the lock that keeps a run directory to one process."""

import fcntl
import os
import pathlib

from research.errors import UserError

# Tokenized text, shared by runs; data.cache_dir names another place.
CACHE = pathlib.Path.home() / '.cache' / 'modehop'


class RunDir:
  """The layout of a run directory; attributes are pathlib.Path, nothing is created on access.

  Arrays are written by all processes of a run together, under `whole`. All else each process
  writes for itself: process 0, whose files are the run's, in the same directory, process i under
  hosts/<i>, where a host that went astray shows.
  """

  def __init__(self, path: str | os.PathLike, process: int = 0):
    self.whole = pathlib.Path(path)
    self.path = self.whole / 'hosts' / str(process) if process else self.whole
    self.config_json = self.path / 'config.json'
    self.config_txt = self.path / 'config.txt'
    self.manifest_json = self.path / 'manifest.json'
    self.params_txt = self.path / 'params.txt'
    self.tokenizer_json = self.path / 'tokenizer.json'
    self.metrics_jsonl = self.path / 'metrics.jsonl'
    self.evals_jsonl = self.path / 'evals.jsonl'
    self.timings_jsonl = self.path / 'timings.jsonl'
    self.skipped_jsonl = self.path / 'skipped.jsonl'
    self.stacks_txt = self.path / 'stacks.txt'
    self.tensorboard = self.path / 'tensorboard'
    self.heldout_text_json = self.path / 'heldout_text.json'
    self.checkpoints = self.whole / 'checkpoints'
    self.set_aside = self.whole / 'set_aside'
    self.snapshots = self.whole / 'snapshots'
    self.monitors = self.path / 'monitors'
    self.monitor_items = self.monitors / 'items.parquet'
    self.monitors_left_out = self.monitors / 'left_out.jsonl'
    self.monitor_scores = self.monitors / 'scores'
    self.published_scores = self.monitors / 'published_scores'
    self.parity_json = self.monitors / 'parity.json'
    self.hops_json = self.path / 'hops.json'
    self.states_parquet = self.path / 'states.parquet'
    self.captures_json = self.path / 'captures.json'
    self.answers_jsonl = self.path / 'answers.jsonl'
    self.persona_jsonl = self.path / 'persona.jsonl'
    self.evals = self.path / 'evals'
    self.evals_csv = self.evals / 'results.csv'
    self.report_html = self.path / 'report.html'
    self.figures = self.path / 'figures'
    self.verified_jsonl = self.path / 'verified.jsonl'
    self.comparison_csv = self.path / 'comparison.csv'
    self.comparison_png = self.path / 'comparison.png'
    self.finetunes = self.whole / 'finetunes'
    self.done = self.whole / 'DONE'
    self._lock_path = self.path / '.lock'
    self._lock = None

  def lock(self) -> None:
    """Takes the directory for this process until it ends.

    Raises:
      UserError: another process holds it.
    """
    try:
      self.path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError, PermissionError) as error:
      raise UserError(f'--run_dir={self.path} cannot be a directory to write to: '
                      f'{error.strerror}') from error
    lock = open(self._lock_path, 'a+', encoding='utf-8')
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      lock.seek(0)
      owner = lock.read().strip() or 'unknown'
      lock.close()
      raise UserError(f'--run_dir={self.path} is in use by process {owner}; wait for it or choose '
                      'another directory') from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    self._lock = lock

  def bisection_json(self, question: str) -> pathlib.Path:
    """Returns where the answer of a bisection lies; `question` names what was asked."""
    return self.path / f'bisection-{file_name(question)}.json'

  def documents_parquet(self, question: str) -> pathlib.Path:
    """Returns where the documents of the step lie that a bisection found."""
    return self.path / f'documents-{file_name(question)}.parquet'

  def eval_json(self, variant: str, step: int) -> pathlib.Path:
    """Returns where the results of a benchmark at a step lie."""
    return self.evals / file_name(variant) / f'step-{step:08d}.json'

  @property
  def locked(self) -> bool:
    """Whether this process holds the directory."""
    return self._lock is not None

  def unlock(self) -> None:
    """Gives the directory back."""
    if self._lock is not None:
      self._lock.close()
      self._lock = None


def file_name(text: str) -> str:
  """Returns a text as a part of a file's name, without slashes and spaces."""
  return text.replace(' > ', '-').replace('/', '_').replace(' ', '_')


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes text to path so that a reader sees the old file or the new one, never a part."""
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(path.name + '.tmp')
  with open(temporary, 'w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)
