"""Public benchmarks along a trajectory: tasks of lm-evaluation-harness at chosen checkpoints."""

import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import lm_eval

from models.interop.files import CONFIG
from research import build as build_lib
from research.data import tokenizers
from research.data.tokenizers import Tokenizer
from research.dynamics.imports import imported_config, prepared
from research.dynamics.public import open_checkpoint
from research.dynamics.public_trajectory import PublicTrajectory
from research.dynamics.trajectory import Trajectory, open_trajectory
from research.errors import UserError
from research.evals import results as results_lib
from research.evals.harness import HarnessModel, evaluated
from research.evals.results import Row
from research.evals.samples import build_here
from research.run_dir import RunDir
from research.training.logs import duration
from research.training.streaming import place_streamed

# Resamples behind errors that have no formula: their own error is 2%.
BOOTSTRAP_ITERS = 1000
Say = Callable[[str], None]


class _Asked(NamedTuple):
  """A task as it is asked.

  Attributes:
    name: of the task or group.
    loaded: it, from `harness_tasks.load`.
    limit: documents of each task, at most; None asks all.
    variant: name of its folder.
    definition: hash of what it asks.
  """

  name: str
  loaded: dict[str, Any]
  limit: int | None
  variant: str
  definition: str


_say = functools.partial(print, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Subject:
  """Checkpoints that can be asked.

  Attributes:
    name: of the run or series.
    built, tokenizer, start_id: of the model.
    steps: of its checkpoints, ascending.
    tokens: step -> tokens seen, None where not known.
    params: step -> float32 parameters on the mesh.
    content: step -> what tells this checkpoint from another.
  """

  name: str
  built: build_lib.Build
  tokenizer: Tokenizer
  start_id: int | None
  steps: list[int]
  tokens: Callable[[int], int | None]
  params: Callable[[int], Any]
  content: Callable[[int], str]


def open_subject(run_dir: RunDir, source: str = '', overrides: Sequence[tuple[str, str]] = ()
                 ) -> Subject:
  """Returns what is to be evaluated.

  Args:
    run_dir: of a run of ours, of a series that was monitored, or of none yet with a source.
    source: a folder as `transformers` writes it, or a series; '' for what the run directory has.
    overrides: settings, for a source.

  Raises:
    UserError: there is no such checkpoint, its tokenizer or mesh cannot be used, or settings are
      given without a source.
  """
  if not source and overrides:
    raise UserError(f'--config.{overrides[0][0]} means nothing here: the settings are those of '
                    f'{run_dir.path}; they can be chosen for a --source')
  if not source:
    return _of_run(run_dir)
  if run_dir.manifest_json.exists():
    raise UserError(f'--run_dir={run_dir.path} is the directory of a run, of which --source is no '
                    'part; leave --source out, or choose another directory for the results')
  folder = pathlib.Path(source).expanduser()
  if (folder / CONFIG).is_file():
    return _of_folder(folder, overrides)
  trajectory = open_trajectory(source)
  if not isinstance(trajectory, PublicTrajectory):
    raise UserError(f'--source={source} is the directory of a run; give it as --run_dir')
  return _of_series(trajectory, overrides)


def _of_run(run_dir: RunDir) -> Subject:
  """Returns the checkpoints of a run directory; raises UserError where no mesh here fits it."""
  trajectory = open_trajectory(run_dir.path)
  manifest = json.loads(run_dir.manifest_json.read_text(encoding='utf-8'))
  try:
    built = build_here(trajectory.config)
  except ValueError as error:
    raise UserError(str(error)) from error
  if isinstance(trajectory, PublicTrajectory):
    trajectory = trajectory.only([int(step) for step in manifest['series']['monitored']])
  return Subject(
      trajectory.config.name, built, tokenizers.load(run_dir.tokenizer_json), manifest['start_id'],
      trajectory.steps, trajectory.tokens, _reader(trajectory, built), _content(trajectory))


def _of_series(trajectory: PublicTrajectory, overrides: Sequence[tuple[str, str]]) -> Subject:
  """Returns the revisions of a public series."""
  config = imported_config(trajectory.model, trajectory.location, trajectory.steps[-1], 'float32',
                           overrides)
  imported = prepared(config, trajectory.model, trajectory.tokenizer_folder())
  content = _content(trajectory)
  return Subject(trajectory.location, imported.built, imported.tokenizer, imported.start_id,
                 trajectory.steps, trajectory.tokens, _reader(trajectory, imported.built),
                 lambda step: _hash([content(step), _described(imported.built)]))


def _of_folder(folder: pathlib.Path, overrides: Sequence[tuple[str, str]]) -> Subject:
  """Returns the one checkpoint of a folder as step 0."""
  checkpoint = open_checkpoint(folder)
  config = imported_config(checkpoint.config, folder.name, 0, 'float32', overrides)
  imported = prepared(config, checkpoint.config, folder)
  files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns)
                 for path in folder.iterdir() if path.is_file())
  return Subject(folder.name, imported.built, imported.tokenizer, imported.start_id, [0],
                 lambda step: None,
                 lambda step: place_streamed(checkpoint.read, imported.built.params),
                 lambda step: _hash([str(folder.resolve()), files, _described(imported.built)]))


def _reader(trajectory: Trajectory, built: build_lib.Build) -> Callable[[int], Any]:
  """Returns a function from a step to its parameters on the mesh; no files stay open."""
  def params(step: int) -> Any:
    placed = trajectory.params(step, built.params)
    if isinstance(trajectory, PublicTrajectory):
      trajectory.close(step)
    return placed
  return params


def _content(trajectory: Trajectory) -> Callable[[int], str]:
  """Returns a function from a step to a hash of what is recorded of its checkpoint."""
  def content(step: int) -> str:
    if isinstance(trajectory, PublicTrajectory):
      name = trajectory.name_of(step)
      return _hash([trajectory.location, name, trajectory.commits().get(name, ''),
                    trajectory.file_sizes(step)])
    return _hash([trajectory.recorded(step, name) for name in trajectory.names])
  return functools.cache(content)


def _described(built: build_lib.Build) -> str:
  """Returns how the model computes: settings may differ for the same files."""
  return repr(built.config.model)


def _definition(loaded: dict[str, Any], limit: int | None) -> str:
  """Returns a hash of what tasks ask: their settings and documents."""
  facts = [[name, task.dump_config(), list(itertools.islice(task.eval_docs, limit))]
           for name, task in sorted(loaded['tasks'].items())]
  # Functions without a source are described by where they lie in memory.
  return _hash(re.sub(r' at 0x[0-9a-f]+', '', json.dumps(facts, default=str)))


def _hash(facts: Any) -> str:
  return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def chosen_steps(subject: Subject, wanted: str) -> list[int]:
  """Returns the steps that a text names: '' the newest, 'all', or several with commas between.

  Raises:
    UserError: one of them is not there; the nearest are named.
  """
  if wanted in ('', 'all'):
    return subject.steps if wanted else subject.steps[-1:]
  try:
    steps = sorted({int(step) for step in wanted.split(',')})
  except ValueError as error:
    raise UserError(f'--steps={wanted}: give all, or steps with commas between') from error
  for step in steps:
    if step not in subject.steps:
      near = sorted(subject.steps, key=lambda other: abs(other - step))[:2]
      raise UserError(f'--steps={step}: {subject.name} has no such checkpoint; the nearest are '
                      f'{" and ".join(map(str, sorted(near)))}')
  return steps


def evaluate_trajectory(subject: Subject, run_dir: RunDir, loaded: dict[str, dict[str, Any]],
                        steps: Sequence[int], *, num_fewshot: int | None = None,
                        limit: int | None = None, say: Say = _say) -> list[Row]:
  """Returns the metrics of tasks at steps, and writes them to the run directory.

  What was evaluated already, of the same checkpoint and documents, is not evaluated again.

  Args:
    subject: what is asked.
    run_dir: where results lie: evals/<task>/step-<step>.json, and all in evals/results.csv.
    loaded: tasks by name, from `harness_tasks.load`.
    steps: of checkpoints.
    num_fewshot, limit: with which the tasks were loaded and are asked; part of the folders' names.
    say: takes lines of progress.

  Raises:
    UserError: the directory has results of another model, a request cannot be answered by this
      one, or a task is not any more what it was when other checkpoints were asked.
  """
  earlier = next(run_dir.evals.glob('*/step-*.json'), None)
  if earlier and (name := results_lib.read_record(earlier)['model']) != subject.name:
    raise UserError(f'{run_dir.evals} holds results of {name}, not of {subject.name}; choose '
                    'another --run_dir')
  model = HarnessModel(subject.built, subject.tokenizer, subject.start_id, say=say)
  asked = [_Asked(name, tasks, limit, results_lib.variant_of(name, num_fewshot, limit),
                  _definition(tasks, limit)) for name, tasks in loaded.items()]
  wanted = [(step, one) for step in steps for one in asked]
  missing = [(step, one) for step, one in wanted if not _is_done(
      run_dir.eval_json(one.variant, step), subject.content(step), one.definition)]
  if len(missing) < len(wanted):
    say(f'{len(wanted) - len(missing)} of {len(wanted)} are there already')
  began, held = time.perf_counter(), None
  try:
    for number, (step, one) in enumerate(missing, 1):
      if held != step:
        model.params = None  # The next parameters take the place of the last.
        model.params, held = subject.params(step), step
      rows = _evaluated(subject, run_dir, model, one, step, say)
      left = (time.perf_counter() - began) / number * (len(missing) - number)
      say(f'[{number}/{len(missing)}] step {step}, {one.name}: {_short(rows, one.name)}, '
          f'{duration(left)} left')
  finally:
    if rows := results_lib.all_rows(run_dir):
      results_lib.write_table(run_dir.evals_csv, rows)
  return [row for step, one in wanted
          for row in results_lib.read_record(run_dir.eval_json(one.variant, step))['rows']]


def _is_done(path: pathlib.Path, content: str, definition: str) -> bool:
  """Returns whether a task of this definition was evaluated at a checkpoint of this content."""
  if not path.exists():
    return False
  record = results_lib.read_record(path)
  return (record['checkpoint'], record['definition']) == (content, definition)


def _evaluated(subject: Subject, run_dir: RunDir, model: HarnessModel, asked: _Asked, step: int,
               say: Say) -> list[Row]:
  """Returns the metrics of one task at one checkpoint, and writes them."""
  start = time.perf_counter()
  found = evaluated(model, asked.loaded, limit=asked.limit,
                    bootstrap_iters=BOOTSTRAP_ITERS)
  path = run_dir.eval_json(asked.variant, step)
  others = sorted(set(path.parent.glob('step-*.json')) - {path})
  if others and (record := results_lib.read_record(others[0]))['requests'] != model.asked:
    raise UserError(f'{path.parent} holds results of other requests (step {record["step"]}): the '
                    'task, its data or its demonstrations have changed since; move the folder away '
                    'to begin anew')
  n_cut = sum(model.n_truncated.values())
  if n_cut:
    say(f'{asked.variant}: {n_cut} of {sum(model.n_requests.values())} requests are longer than '
        f'model.context_length={model.max_length} and were cut from the left')
  rows = results_lib.rows_of(found, subject.name, step, subject.tokens(step), asked.variant)
  results_lib.write_record(path, {
      'model': subject.name, 'step': step, 'tokens': subject.tokens(step),
      'checkpoint': subject.content(step), 'definition': asked.definition,
      'requests': model.asked, 'n_requests': dict(model.n_requests),
      'n_truncated': dict(model.n_truncated), 'limit': asked.limit, 'versions': found['versions'],
      'higher_is_better': found['higher_is_better'], 'lm_eval': lm_eval.__version__,
      'bootstrap_iters': BOOTSTRAP_ITERS, 'seconds': time.perf_counter() - start}, rows)
  return rows


def _short(rows: list[Row], name: str) -> str:
  """Returns the metrics of a task or group itself in a few words, else those of its first task."""
  own = [row for row in rows if row.task == name] or rows[:1]
  return ', '.join(f'{row.metric} {row.value:.4f}' for row in own)
