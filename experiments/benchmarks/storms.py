"""A storm of kills over a run: when they strike, what they cost, whether anything was lost.

A kill waits for a step and then for the moment that it is meant for, as the run's files show it:
while a step is computed, a checkpoint written, a snapshot scored, the report made, or the process
still starting (right after another kill). It is the same launcher, settings and files as any run's.
"""

import dataclasses
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import pyarrow.parquet as pq

from parallelism.mesh import MeshConfig, make_mesh
from research import build as build_lib
from research import config as config_lib
from research.dynamics import verify
from research.errors import PREEMPTED
from research.monitors import table
from research.run_dir import RunDir
from research.training import manifest as manifest_lib
from research.training.checkpoints import Checkpoints
from research.training.logs import read_rows
from research.training.snapshots import SnapshotReader
from research.training.stored import DamagedError

ROOT = pathlib.Path(__file__).resolve().parents[2]
EVERY = {'checkpoints.every': 6, 'checkpoints.snapshot_every': 4, 'evals.every': 10}
SETTINGS = {  # A tiny model that has dropout and an average, so that a lost key or average shows.
    'model.n_layers': 1, 'model.d_model': 32, 'model.d_ff': 64, 'model.n_heads': 2,
    'model.n_kv_heads': 2, 'model.dropout': 0.1, 'optimizer.ema_decay': 0.9,
    'data.batch_size': 8, 'data.microworld.drift_window': 6, 'mesh.data': 1,
    'logging.tensorboard': 'false', **EVERY}
MOMENTS = ('step', 'save', 'monitor', 'start', 'report')
_POLL = 0.002  # seconds


class Kill(NamedTuple):
  """One kill: the moment (of `MOMENTS`) it is meant for, and from which step on it may come."""

  moment: str
  step: int
  delay: float  # seconds after the moment was seen


class Struck(NamedTuple):
  """What a kill found.

  Attributes:
    kill: what it was meant for.
    rows: steps recorded by then.
    repeated: how many of them were computed by the killed process and are not in a checkpoint.
    seconds: since the start of the process.
    in_time: whether the files it left are those of its moment; of a step nothing can be seen.
    code: exit code of the process.
  """

  kill: Kill
  rows: int
  repeated: int
  seconds: float
  in_time: bool
  code: int


def plan(n_kills: int, n_steps: int, seed: int, moments: tuple[str, ...] = MOMENTS) -> list[Kill]:
  """Returns kills in order of their steps; one in five comes while the process starts again.

  Args:
    n_kills: how many.
    n_steps: all but those of the report come before this step's checkpoint is whole.
    seed: of steps, delays and thus of all that is left to chance.
    moments: those to draw from; a run that is asked to stop at its end just ends.
  """
  draw = random.Random(seed)
  n_report = max(1, n_kills // 12) if 'report' in moments else 0
  usual = [moment for moment in ('step', 'save', 'monitor') if moment in moments]
  steps = sorted(draw.randint(1, n_steps - 1) for _ in range(n_kills - n_report))
  kills = []
  for i, step in enumerate(steps):
    if i % 5 == 4:
      kills.append(Kill('start', step, draw.uniform(0.2, 4)))
    else:
      moment = usual[i % len(usual)]
      last_due = n_steps - n_steps % EVERY['checkpoints.every']
      kills.append(Kill(moment, min(step, last_due - 1), draw.uniform(0, 0.02)))
  return kills + [Kill('report', n_steps, draw.uniform(0, 0.4)) for _ in range(n_report)]


def asked(n_kills: int, n_steps: int, seed: int) -> list[Kill]:
  """Returns a plan for signals that only ask to stop; at the last step a run would just end."""
  before_the_end = n_steps - 2 * EVERY['checkpoints.every']
  return plan(n_kills, before_the_end, seed, MOMENTS[:-1])


def command(run_dir: pathlib.Path, n_steps: int) -> list[str]:
  """Returns the command line of a run of so many steps."""
  settings = {**SETTINGS, 'n_steps': n_steps}
  return [sys.executable, '-m', 'launchers.pretrain', '--experiment=quickstart',
          f'--run_dir={run_dir}', *(f'--config.{name}={text}' for name, text in settings.items())]


def environment(cache: pathlib.Path) -> dict[str, str]:
  """Returns the environment of all runs: one CPU device, compiled programs kept in `cache`."""
  return {**os.environ, 'JAX_PLATFORMS': 'cpu', 'JAX_COMPILATION_CACHE_DIR': str(cache),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'XLA_FLAGS': ''}


def finish(run_dir: pathlib.Path, n_steps: int, cache: pathlib.Path) -> float:
  """Runs to the end from wherever the run stands; returns the seconds that took.

  Raises:
    RuntimeError: it failed; the message is what it said.
  """
  began = time.perf_counter()
  done = subprocess.run(command(run_dir, n_steps), cwd=ROOT, env=environment(cache), check=False,
                        capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f'{run_dir} ended with code {done.returncode}: {done.stderr}')
  return time.perf_counter() - began


def _saving(run_dir: RunDir, since: float) -> bool:
  """Returns whether a checkpoint is being written that was begun after `since`."""
  for path in run_dir.checkpoints.glob('*tmp*'):
    try:
      if path.stat().st_ctime > since:
        return True
    except FileNotFoundError:
      continue  # It has become whole.
  return False


def _n_rows(run_dir: RunDir, since: float) -> int:
  """Returns the recorded steps, 0 until a process that was started at `since` has opened them."""
  path = run_dir.metrics_jsonl
  opened = path.exists() and path.stat().st_mtime > since
  return path.read_bytes().count(b'\n') if opened else 0


def _at_moment(moment: str, run_dir: RunDir, n_steps: int, n_rows: int, since: float) -> bool:
  """Returns whether the run's files are those of a moment."""
  if moment == 'save':
    return _saving(run_dir, since)
  if moment == 'monitor':
    due = n_rows % EVERY['checkpoints.snapshot_every'] == 0 or n_rows == n_steps
    return due and not (run_dir.monitor_scores / table.scores_name(n_rows)).exists()
  if moment == 'report':
    return (n_rows == n_steps and (run_dir.checkpoints / str(n_steps)).exists()
            and not run_dir.done.exists())
  return True


def strike(kill: Kill, run_dir: RunDir, n_steps: int, cache: pathlib.Path, number: int) -> Struck:
  """Starts the run, sends it the signal at the kill's moment and waits for its end."""
  since = time.time()
  process = subprocess.Popen(command(run_dir.path, n_steps), cwd=ROOT, env=environment(cache),
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

  def at_moment() -> bool:
    n_rows = _n_rows(run_dir, since)
    return n_rows >= kill.step and _at_moment(kill.moment, run_dir, n_steps, n_rows, since)
  while kill.moment != 'start' and process.poll() is None and not at_moment():
    time.sleep(_POLL)
  time.sleep(kill.delay)
  process.send_signal(number)
  code = process.wait()
  n_rows = _n_rows(run_dir, since)
  whole = max((int(path.name) for path in run_dir.checkpoints.glob('*') if path.name.isdigit()),
              default=0)
  return Struck(kill, n_rows, max(0, n_rows - whole), time.time() - since,
                kill.moment == 'start' or at_moment(), code)


def storm(kills: list[Kill], run_dir: RunDir, n_steps: int, cache: pathlib.Path,
          number: int = signal.SIGKILL) -> Iterator[Struck]:
  """Yields what each kill found.

  Raises:
    RuntimeError: a run ended otherwise than by the signal, or as the signal asks it to.
  """
  expected = (-number, PREEMPTED) if number != signal.SIGKILL else (-number,)
  for kill in kills:
    struck = strike(kill, run_dir, n_steps, cache, number)
    late = kill.moment == 'report' and struck.code == 0  # It was done before the kill came.
    if struck.code not in expected and not late:
      raise RuntimeError(f'{run_dir.path}: {kill} ended with code {struck.code}')
    yield struck


def differences(whole: RunDir, other: RunDir) -> list[str]:
  """Returns what a run lost against an uninterrupted one, bit by bit; nothing if all is there.

  Compared are rows of metrics, held-out loss and skipped steps, the checkpoints that both have and
  the last, all snapshots and all scores of monitors.
  """
  found = [f'{path.name}: rows differ' for path, others in (
      (getattr(whole, name), getattr(other, name))
      for name in ('metrics_jsonl', 'evals_jsonl', 'skipped_jsonl'))
           if read_rows(path) != read_rows(others)]
  found += [] if other.done.exists() else ['DONE is missing']
  built = _built(whole)
  with_states = [Checkpoints(run_dir.checkpoints) for run_dir in (whole, other)]
  last = with_states[0].steps[-1]
  if last not in with_states[1].steps:
    found.append(f'checkpoint {last} is missing')
  for step in sorted(set(with_states[0].steps) & set(with_states[1].steps)):
    found += _differing(f'checkpoint {step}', lambda checkpoints: checkpoints.restore(
        step, built.abstract_state), with_states)
  for checkpoints in with_states:
    checkpoints.close()
  readers = [SnapshotReader(run_dir.snapshots) for run_dir in (whole, other)]
  if readers[0].steps != readers[1].steps:
    return [*found, f'snapshots of steps {readers[1].steps} instead of {readers[0].steps}']
  for step in readers[0].steps:
    found += _differing(f'snapshot {step}', lambda reader: reader.params(step, built.params), readers)
  steps = [table.score_steps(run_dir.monitor_scores) for run_dir in (whole, other)]
  if steps[0] != steps[1]:
    return [*found, f'scores of steps {steps[1]} instead of {steps[0]}']
  for step in steps[0]:
    scores = [pq.read_table(run_dir.monitor_scores / table.scores_name(step))
              for run_dir in (whole, other)]
    found += [] if scores[0].equals(scores[1]) else [f'scores of step {step}']
  return found


def _differing(what: str, read: Callable[[Any], Any], readers: Sequence[Any]) -> list[str]:
  """Returns the leaves in which two trees differ, or that one of them is damaged."""
  try:
    return [f'{what}: {name}' for name in verify.differences(*map(read, readers))]
  except DamagedError as error:
    return [f'{what}: {error}']


def _built(run_dir: RunDir) -> build_lib.Build:
  """Returns the model of a run on one device, whatever it was trained on."""
  config = config_lib.from_json(run_dir.config_json.read_text(encoding='utf-8'))
  config = dataclasses.replace(config, mesh=MeshConfig(data=1))
  numerics = manifest_lib.read(run_dir)['numerics']
  return build_lib.build(config, make_mesh(config.mesh, jax.devices()[:1]), numerics)
