"""The monitors of one run: which items it watches, their scores by snapshot, hops it suspects."""

import itertools
import pathlib
import time
from typing import Any

from research.build import Build
from research.config import ExperimentConfig
from research.data.tokenizers import Tokenizer
from research.monitors import published, table
from research.monitors.encoding import encode_item
from research.monitors.items import ITEM_SUFFIXES, MonitorItem, check_items, sound_items
from research.monitors.microworld_items import microworld_items
from research.monitors.published_score import PublishedScorer, encode_published
from research.monitors.scoring import Scorer, Scores
from research.monitors.small.suite import check_fits, small_suite
from research.monitors.suite import Suite, described, scorable, settled, write_left_out
from research.monitors.suspects import Suspects
from research.run_dir import RunDir
from research.training.logs import duration
from research.training.snapshots import SnapshotReader, cast
from research.training.divisions import replicas


def read_suite(config: ExperimentConfig, tokenizer: Tokenizer, start_id: int | None) -> Suite:
  """Returns what monitors.suite names, without the items that the model cannot score.

  These are said, and the scored set too. Raises UserError if the file is bad, if the small suite is
  too long for the context, and one that lists all items that cannot be scored where
  monitors.bad_items refuses them.
  """
  name, encode = config.monitors.suite, encode_item
  if name == 'none':
    return Suite([], [], [])
  if name == 'microworld':
    suite = Suite(microworld_items(config.data.microworld, config.data.sequence_length), [], [])
  elif name == 'small':
    suite = Suite(small_suite(config.monitors.small), [], [])
  elif pathlib.Path(name).suffix in ITEM_SUFFIXES:
    suite = Suite(*sound_items(name), [])
  else:
    suite, encode = published.read(name), encode_published
  suite = scorable(suite, tokenizer, config.model.context_length, start_id, encode)
  if name == 'small' and suite.left_out:  # what would fit is in the refusal
    check_fits(config.monitors.small, tokenizer, config.model.context_length, start_id)
  suite = settled(suite, config.monitors.bad_items)
  check_items(suite.items)
  if suite.left_out or encode is encode_published:
    print(*described(suite), sep='\n', flush=True)
  return suite


def make_scorer(config: ExperimentConfig, tokenizer: Tokenizer, start_id: int | None, built: Build,
                items: list[MonitorItem], kind: type[Scorer] = Scorer) -> Scorer:
  """Returns a scorer of `items` for the model of a build, rows spread over its data axes.

  `start_id` is the token that stood before every document in training, None where none did.
  """
  return kind(items, tokenizer, built.graphdef, context_length=config.model.context_length,
              batch_rows=config.monitors.batch_rows, row_multiple=replicas(built.mesh.shape),
              start_id=start_id, constrain=built.constrain)


def score_snapshot(scorer: Scorer, built: Build, stored: Any) -> Scores:
  """Returns the scores of the values that a snapshot stores; the one way, in training and after.

  Args:
    scorer: of the suite.
    built: the model and its mesh.
    stored: parameter tree in the snapshot's dtype, on the mesh.
  """
  return built.in_mesh(scorer.score)(cast(stored, 'float32'))


def _move_aside(run_dir: RunDir, kept: int) -> None:
  """Moves the scores of other items, and what was said of them, to a folder beside."""
  names = (f'monitors-until-{max(kept, 0):08d}{again}'
           for again in itertools.chain([''], (f'-{i}' for i in itertools.count(2))))
  aside = next(path for path in map(run_dir.monitors.with_name, names) if not path.exists())
  print(f'the monitor items have changed: earlier scores are kept in {aside}', flush=True)
  run_dir.monitors.rename(aside)
  for path in (run_dir.hops_json, run_dir.states_parquet, run_dir.captures_json):
    if path.exists():
      path.rename(aside / path.name)


class _Progress:
  """Says every few seconds how many stored snapshots are scored and how long the rest takes."""

  SECONDS = 5.0

  def __init__(self, n_steps: int):
    self._n_steps, self._n_done = n_steps, 0
    self._began = self._said = time.monotonic()

  def __call__(self, step: int) -> None:
    self._n_done, now = self._n_done + 1, time.monotonic()
    if now - self._said >= self.SECONDS or self._n_done == self._n_steps:
      self._said = now
      left = (now - self._began) / self._n_done * (self._n_steps - self._n_done)
      print(f'monitors: step {step} scored, [{self._n_done}/{self._n_steps}] of the stored '
            f'snapshots, {duration(left)} left', flush=True)


class Watch:
  """Scores every snapshot while training runs, and counts suspected hops."""

  def __init__(self, config: ExperimentConfig, suite: Suite, tokenizer: Tokenizer,
               start_id: int | None, built: Build, run_dir: RunDir, kept: int):
    """Loads what was scored up to step `kept` and removes what was scored after it.

    Where the items are not those of the scores on disk, the old monitors are moved aside and the
    stored snapshots are scored again with the new items.
    """
    items = self.items = suite.items
    self._built, self._folder = built, run_dir.monitor_scores
    self._suspects, self._captures = Suspects(), config.monitors.captures
    for step in table.score_steps(self._folder):
      if step > kept:
        scored_path(run_dir, step).unlink()
    self._scorer, self._published = None, None
    if not items:
      return
    self._scorer = make_scorer(config, tokenizer, start_id, built, items)
    if published.is_published(items):
      self._published = PublishedWriter(config, tokenizer, start_id, built, items, run_dir)
    if run_dir.monitor_items.exists() and table.read_item_table(run_dir.monitor_items) != items:
      _move_aside(run_dir, kept)
    table.write_item_table(run_dir.monitor_items, items, self._scorer.encoded)
    write_left_out(suite, run_dir.monitors_left_out)
    scored = set(table.score_steps(self._folder))
    reader = SnapshotReader(run_dir.snapshots)
    # Snapshots after `kept` are still on the disk here, and will be made and scored again.
    stored = {step for step in reader.steps if step <= kept}
    progress = _Progress(len(stored - scored))
    for step in sorted(scored | stored):
      if step in scored:
        self._remember(step, table.read_scores(scored_path(run_dir, step))[1])
      else:
        self.score(step, built.place_params(reader.params(step, built.params)))
        progress(step)

  def score(self, step: int, stored: Any) -> dict[str, float]:
    """Writes the scores of a snapshot; returns the accuracy of every dataset."""
    if not self._scorer:
      return {}
    scores = score_snapshot(self._scorer, self._built, stored)
    if self._published:  # first: a step counts as scored when the joint scores stand
      self._published.write(step, stored)
    table.write_scores(self._folder, step, scores)
    return table.dataset_means(self._remember(step, scores), 'accuracy')

  def cost(self, step_tokens: int, every: int) -> str:
    """Returns in words what a snapshot of a monitored run costs beside training.

    Training reads its tokens once forward and, at twice the price, once backward.

    Args:
      step_tokens: tokens of a training step.
      every: steps between snapshots.
    """
    steps = self._scorer.n_tokens / (3 * step_tokens)
    return (f'monitors: {len(self.items):,} items of '
            f'{len({item.dataset for item in self.items}):,} datasets, '
            f'{self._scorer.n_tokens:,} tokens per snapshot: about as much work as '
            f'{steps:.1f} training steps, {steps / every:.0%} of training beside it with '
            f'checkpoints.snapshot_every={every}')

  @property
  def n_suspected(self) -> int:
    """Hops suspected so far."""
    return self._suspects.n_suspected

  @property
  def needed(self) -> frozenset[int]:
    """Steps up to which the last full checkpoint has to stay for the captures that may be made."""
    return self._suspects.needed(self._captures) if self._captures else frozenset()

  def _remember(self, step: int, scores: Scores) -> list[table.ContextSummary]:
    """Shows a snapshot to the suspicion; returns its summary."""
    rows = table.summary(self.items, step, scores)
    watched = [row for row in rows if not row.is_control]
    self._suspects.add(step, table.dataset_means(watched, 'margin'))
    return rows


class PublishedWriter:
  """Keeps the published suite's own score beside the joint log-probabilities."""

  def __init__(self, config: ExperimentConfig, tokenizer: Tokenizer, start_id: int | None,
               built: Build, items: list[MonitorItem], run_dir: RunDir):
    self._scorer = make_scorer(config, tokenizer, start_id, built, items, PublishedScorer)
    self._built, self._folder = built, run_dir.published_scores

  def write(self, step: int, stored: Any) -> None:
    """Writes the published scores of a snapshot's values."""
    scores = score_snapshot(self._scorer, self._built, stored)
    table.write_published(self._folder, step, *scores, self._scorer.differs)


def rescore(config: ExperimentConfig, tokenizer: Tokenizer, start_id: int | None, built: Build,
            run_dir: RunDir, steps: list[int]):
  """Yields (step, scores) of stored snapshots, computed as in training.

  Of the published suite, writes that score of a snapshot too where it is not there.

  Args:
    config: the run's config.
    tokenizer: the run's tokenizer.
    start_id: the token before every document in training, or None.
    built: its model on a mesh.
    run_dir: where the snapshots are.
    steps: which of them.
  """
  items = table.read_item_table(run_dir.monitor_items)
  scorer = make_scorer(config, tokenizer, start_id, built, items)
  writer = None
  if published.is_published(items):
    writer = PublishedWriter(config, tokenizer, start_id, built, items, run_dir)
  reader = SnapshotReader(run_dir.snapshots)
  for step in steps:
    stored = built.place_params(reader.params(step, built.params))
    if writer and not (run_dir.published_scores / table.scores_name(step)).exists():
      writer.write(step, stored)
    yield step, score_snapshot(scorer, built, stored)


def scored_path(run_dir: RunDir, step: int) -> pathlib.Path:
  """Returns the file of the scores that training wrote for a step."""
  return run_dir.monitor_scores / table.scores_name(step)
