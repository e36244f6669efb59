"""A whole public series, monitored: audited, then scored revision by revision, nothing copied."""

import functools
import itertools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from research.dynamics.audit_content import Finding
from research.dynamics.audit_location import audit_public
from research.dynamics.imports import (
    Imported, Progress, check_settings, describe, imported_config, prepared)
from research.dynamics.public import UnusableError
from research.dynamics.public_trajectory import PublicTrajectory
from research.errors import UserError
from research.monitors import table
from research.reports.report import build_report
from research.run_dir import RunDir, write_whole
from research.training import manifest as manifest_lib
from research.training.logs import JsonLines, duration, read_rows
from research.training.streaming import place_streamed

# What these findings name is not monitored.
LEFT_OUT = ('damaged', 'config', 'shape', 'duplicate', 'nonfinite', 'splice', 'swapped')
Say = Callable[[str], None]
_say = functools.partial(print, flush=True)


class Plan(NamedTuple):
  """What is monitored, as the manifest holds it under `series`.

  Attributes:
    source, pattern: the series.
    files: bytes by file of each revision in a folder; none of a repository, whose revisions stay.
    findings: of the audit.
    left_out: name of each revision that is not monitored -> why.
    monitored: name of each that is, by step (as text, as JSON has it), ascending.
    commits: of each revision of a repository, by name.
  """

  source: str
  pattern: str
  files: dict[str, dict[str, int]]
  findings: list[dict[str, Any]]
  left_out: dict[str, str]
  monitored: dict[str, str]
  commits: dict[str, str] = {}

  @property
  def steps(self) -> list[int]:
    """Steps that are monitored, ascending."""
    return [int(step) for step in self.monitored]

  def content(self, step: int) -> tuple[str, dict[str, int], str]:
    """Returns what tells the revision of a step from another: name, bytes by file, commit."""
    name = self.monitored.get(str(step), '')
    return name, self.files.get(name, {}), self.commits.get(name, '')


def monitor_series(trajectory: PublicTrajectory, run_dir: RunDir,
                   overrides: Sequence[tuple[str, str]] = (), say: Say = _say) -> None:
  """Writes the scores of every sound revision as a run directory with a report.

  The weights go from their files onto the mesh one revision at a time, and are not stored. A
  revision with a finding of LEFT_OUT is left out. Repeating the command goes on after the last
  revision that was scored; where revisions, files or items have changed since, it audits or scores
  them again.

  Raises:
    UserError: no revision, or the tokenizer, the items or a setting cannot be used; the directory
      has another run; or a revision that it has scores of is gone.
  """
  config = imported_config(trajectory.model, trajectory.location, trajectory.steps[-1], 'float32',
                           overrides)
  if config.monitors.suite == 'none':
    raise UserError('--config.monitors.suite is none; name small, or a file of monitor items')
  imported = prepared(config, trajectory.model, trajectory.tokenizer_folder())
  run_dir.lock()
  try:
    known = _known(trajectory, run_dir, imported)
    now = _files(trajectory), trajectory.commits()
    plan = known if known and (known.files, known.commits) == now else _audited(trajectory, say)
    if plan == known and _is_done(run_dir, imported):
      say(f'monitored already: {run_dir.path}')
      return
    run_dir.done.unlink(missing_ok=True)
    watch = imported.watch(run_dir, _kept(run_dir, plan, known))
    kept = _kept(run_dir, plan, known)  # The watch puts scores of other items aside.
    describe(run_dir, imported, max(kept, 0), {'series': plan._asdict()})
    _score(trajectory.only([step for step in plan.steps if step > kept]), run_dir, imported, watch,
           kept, say)
    report = build_report(run_dir)
    write_whole(run_dir.done, json.dumps({'step': plan.steps[-1]}) + '\n')
    say(f'{len(plan.steps)} of {len(trajectory.steps)} revisions of {trajectory.location} are '
        f'monitored\nreport: {report.resolve()}')
  finally:
    run_dir.unlock()


def _known(trajectory: PublicTrajectory, run_dir: RunDir, imported: Imported) -> Plan | None:
  """Returns what the directory says is monitored; raises UserError if it is not this series."""
  manifest = manifest_lib.read(run_dir)
  if manifest is None:
    return None
  series = manifest.get('series', {})
  if (series.get('source'), series.get('pattern')) != (trajectory.location, trajectory.pattern):
    raise UserError(f'--run_dir={run_dir.path} holds another run; choose another directory')
  there = {trajectory.name_of(step) for step in trajectory.steps}
  for step, name in series['monitored'].items():
    if name not in there:
      raise UserError(f'{trajectory.location} no longer shows revision {name}, of which '
                      f'{run_dir.path} has scores (step {step}); bring it back, go online if the '
                      'cache has only a part, or choose another --run_dir')
  check_settings(run_dir, imported.config)
  return Plan(**series)


def _files(trajectory: PublicTrajectory) -> dict[str, dict[str, int]]:
  """Returns the bytes of every file by revision, without those of a repository."""
  return {trajectory.name_of(step): trajectory.file_sizes(step) for step in trajectory.steps}


def _audited(trajectory: PublicTrajectory, say: Say) -> Plan:
  """Returns what the audit leaves to be monitored; raises UserError where that is nothing."""
  began, said = time.perf_counter(), [0.0]
  def progress(name: str, number: int, of: int) -> None:
    took = time.perf_counter() - began
    if took - said[0] > Progress.SECONDS:
      said[0] = took
      say(f'audit [{number}/{of}] {name}')
  findings, _ = audit_public(trajectory, progress)
  out: dict[int, Finding] = {}
  for finding in findings:
    say(str(finding))
    if finding.kind in LEFT_OUT:
      out.setdefault(finding.step, finding)
  for step, finding in out.items():
    say(f'left out: {trajectory.name_of(step)}, {finding.kind}')
  plan = Plan(trajectory.location, trajectory.pattern, _files(trajectory),
              [finding._asdict() for finding in findings],
              {trajectory.name_of(step): f'{finding.kind}: {finding.problem}'
               for step, finding in out.items()},
              {str(step): trajectory.name_of(step) for step in trajectory.steps if step not in out},
              trajectory.commits())
  if not plan.monitored:
    raise UserError(f'all {len(out)} revisions of {trajectory.location} are left out, the first: '
                    f'{findings[0]}')
  say(f'audited {len(trajectory.steps)} revisions in {duration(time.perf_counter() - began)}: '
      f'{len(findings)} findings, {len(plan.monitored)} are monitored')
  return plan


def _is_done(run_dir: RunDir, imported: Imported) -> bool:
  return (run_dir.done.exists() and run_dir.report_html.exists()
          and table.read_item_table(run_dir.monitor_items) == imported.items)


def _kept(run_dir: RunDir, plan: Plan, known: Plan | None) -> int:
  """Returns the last step up to which all that is planned, and nothing else, was scored; else -1."""
  if known is None:
    return -1
  rows = {row['step'] for row in read_rows(run_dir.metrics_jsonl)}
  scored = [step for step in table.score_steps(run_dir.monitor_scores) if step in rows]
  same = itertools.takewhile(
      lambda pair: pair[0] == pair[1] and plan.content(pair[0]) == known.content(pair[0]),
      zip(scored, plan.steps))
  return max((step for step, _ in same), default=-1)


def _forget(run_dir: RunDir, name: str) -> None:
  """Takes a revision's files out of the manifest, so that the next start audits again."""
  manifest = manifest_lib.read(run_dir)
  del manifest['series']['files'][name]
  manifest_lib.write(run_dir, manifest)


def _score(trajectory: PublicTrajectory, run_dir: RunDir, imported: Imported, watch: Any, kept: int,
           say: Say) -> None:
  """Scores the revisions in order; each is done when its row stands."""
  rows, timings = JsonLines(run_dir.metrics_jsonl, kept), JsonLines(run_dir.timings_jsonl, kept)
  began = time.perf_counter()
  for number, step in enumerate(trajectory.steps, 1):
    name, start = trajectory.name_of(step), time.perf_counter()
    try:
      checkpoint = trajectory.checkpoint(step)
    except UnusableError as error:
      _forget(run_dir, name)
      raise UserError(f'{error}; it was whole when it was audited: repeat the command, which '
                      'audits again') from error
    params = jax.block_until_ready(place_streamed(
        checkpoint.read, imported.built.params, Progress(checkpoint, say)))
    read = time.perf_counter()
    accuracy = watch.score(step, params)
    del params, checkpoint  # The next revision takes their place.
    trajectory.close(step)
    end, tokens = time.perf_counter(), trajectory.tokens(step)
    timings.append({'step': step, 'read_seconds': read - start, 'monitor_seconds': end - read})
    rows.append({'step': step, 'suspected_hops': watch.n_suspected} | (
        {} if tokens is None else {'tokens': tokens}))
    left = (end - began) / number * (len(trajectory.steps) - number)
    curves = ' '.join(f'{dataset} {value:.3f}' for dataset, value in accuracy.items())
    say(f'[{number}/{len(trajectory.steps)}] {name}: {curves}, {duration(left)} left')
  rows.close()
  timings.close()
