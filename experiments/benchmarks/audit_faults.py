"""Which planted faults the audit of checkpoints catches, and what it cries wolf over.

  python -m experiments.benchmarks.audit_faults --run_dir=runs/dense
  python -m experiments.benchmarks.audit_faults --run_dir=runs/dense --trials=100 --seed=7

Takes a finished run of 500 snapshots, say, with several checkpoints among its first --keep ones
(--config.checkpoints.keep=0 --config.checkpoints.every=...), and audits:
  - the run as it is, which must give no finding, with hashes and without;
  - copies with one fault each in the files (truncated, flipped, swapped, duplicated, spliced, ...),
    hashes as they were: the finding must name the file, or at least its folder;
  - the same with every hash, list and chain recomputed after the fault;
  - stretches of its snapshots with one fault in the content of one checkpoint and no hashes at all,
    as in public series: the rate of trials in which a finding names the step.
"""

import collections
import json
import pathlib
import shutil
import sys
import tempfile
import time
from typing import Any

from absl import flags
import numpy as np

from experiments.benchmarks import command_line, faults
from experiments.benchmarks.estimates import machine, table
from research.dynamics.audit import audit_series
from research.dynamics.audit_content import Finding
from research.dynamics.audit_run import audit_run
from research.dynamics.series import SnapshotSeries, checkpoint_steps
from research.errors import UserError
from research.run_dir import RunDir, write_whole
from research.training import stored
from research.training.logs import read_rows

RUN_DIR = flags.DEFINE_string('run_dir', '', 'a finished run with snapshots and checkpoints')
TRIALS = flags.DEFINE_integer('trials', 40, 'content faults of each kind', lower_bound=1)
COPIES = flags.DEFINE_integer('copies', 2, 'damaged copies of the run of each kind', lower_bound=1)
STRETCH = flags.DEFINE_integer('stretch', 24, 'checkpoints around a content fault', lower_bound=4)
KEEP = flags.DEFINE_integer('keep', 24, 'snapshots of a damaged copy, from its start', lower_bound=6)
SEED = flags.DEFINE_integer('seed', 0, 'of what is planted where')
JSON = flags.DEFINE_string('json', '', 'also write everything measured to this file')


class Unhashed(SnapshotSeries):
  """Snapshots of which nothing is recorded."""

  def recorded(self, step: int, name: str) -> str:
    """Returns ''."""
    return ''


def named(found: list[Finding], planted: faults.Planted) -> str:
  """Returns what findings of the fault's step name: 'file', the 'folder' it is in, else 'missed'.

  Where the fault is in a whole folder, that or a file in it counts as the file.
  """
  files = [pathlib.Path(finding.file) for finding in found if finding.step == planted.step]
  if any(file == planted.file or planted.file in file.parents for file in files):
    return 'file'
  return 'folder' if any(file in planted.file.parents for file in files) else 'missed'


def copy_of(run_dir: RunDir, folder: pathlib.Path, n_snapshots: int) -> RunDir:
  """Returns a copy of the start of a run, up to some snapshot, as one that is not done."""
  copy, lines = RunDir(folder / 'run'), read_rows(run_dir.snapshots / 'commits.jsonl')[:n_snapshots]
  late = [str(step) for step in checkpoint_steps(run_dir.checkpoints) if step > lines[-1]['step']]
  for name in ('config_json', 'manifest_json', 'metrics_jsonl', 'snapshots', 'checkpoints'):
    source, target = getattr(run_dir, name), getattr(copy, name)
    if source.is_dir():
      shutil.copytree(source, target, ignore=shutil.ignore_patterns(*late))
    else:
      target.parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(source, target)
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (copy.snapshots / 'commits.jsonl').write_text(text, encoding='utf-8')
  return copy


def file_trial(run_dir: RunDir, name: str, seed: tuple[int, ...], recomputed: bool) -> str:
  """Returns what the audit names of a fault (`named`).

  'refused': the hashes cannot be recomputed, for what is left cannot be read at all.
  """
  with tempfile.TemporaryDirectory(prefix='modehop-faults-') as folder:
    copy = copy_of(run_dir, pathlib.Path(folder), KEEP.value)
    planted = faults.FILE_FAULTS[name](copy, np.random.default_rng(seed))
    if recomputed:
      try:
        faults.rehash(copy)
      except (ValueError, OSError, KeyError):
        return 'refused'
    return named(audit_run(copy)[0], planted)


def content_trial(series: SnapshotSeries, name: str, seed: tuple[int, ...], where: str) -> bool:
  """Returns whether the audit of a stretch names the checkpoint with a fault in its content."""
  rng = np.random.default_rng(seed)
  first = int(rng.integers(len(series.steps) - STRETCH.value + 1))
  steps = series.steps[first:first + STRETCH.value]
  memory = faults.in_memory(series, steps)
  i = {'inside': int(rng.integers(1, len(steps) - 1)), 'newest': len(steps) - 1}[where]
  outside = [step for step in series.steps if step not in steps] or [steps[0]]
  away = outside[int(rng.integers(len(outside)))]
  donor = {tensor: series.leaf(away, tensor) for tensor in series.names}
  faults.CONTENT_FAULTS[name](memory._rows, i, rng, donor)
  found, _ = audit_series(memory)
  return any(finding.step == steps[i] for finding in found)


def false_alarms(run_dir: RunDir) -> dict[str, Any]:
  """Returns findings and seconds of the audit of the run as it is, with hashes and without."""
  began = time.perf_counter()
  with_hashes, _ = audit_run(run_dir)
  middle = time.perf_counter()
  series = Unhashed(run_dir.snapshots)
  without, _ = audit_series(series)
  return {'snapshots': len(series.steps), 'with hashes': [str(f) for f in with_hashes],
          'without hashes': [str(f) for f in without],
          'seconds': [middle - began, time.perf_counter() - middle]}


def checked_run() -> tuple[RunDir, SnapshotSeries]:
  """Returns the run of the command line and its snapshots; raises UserError for one too short."""
  run_dir = RunDir(RUN_DIR.value)
  if not RUN_DIR.value or not run_dir.done.exists():
    raise UserError(f'--run_dir={RUN_DIR.value!r} is not the directory of a finished run')
  series = Unhashed(run_dir.snapshots)
  if len(series.steps) <= STRETCH.value:
    raise UserError(f'--stretch={STRETCH.value} needs more than the {len(series.steps)} snapshots of '
                    f'{run_dir.path}')
  last = series.steps[min(KEEP.value, len(series.steps)) - 1]
  if sum(step <= last for step in checkpoint_steps(run_dir.checkpoints)) < 3:
    raise UserError(f'{run_dir.path} needs three checkpoints up to step {last}, its snapshot '
                    f'{KEEP.value}: train it with --config.checkpoints.keep=0 and a smaller '
                    '--config.checkpoints.every')
  return run_dir, series


def file_results(run_dir: RunDir) -> dict[str, dict[str, collections.Counter]]:
  """Returns how often each fault in files is named, by whether hashes are kept or recomputed."""
  results = {}
  for number, name in enumerate(faults.FILE_FAULTS):
    results[name] = {kind: collections.Counter(
        file_trial(run_dir, name, (SEED.value, number, i), kind == 'recomputed')
        for i in range(COPIES.value)) for kind in ('kept', 'recomputed')}
    print(f'[{number + 1}/{len(faults.FILE_FAULTS)}] {name}: {results[name]}', file=sys.stderr,
          flush=True)
  return results


def content_results(series: SnapshotSeries) -> dict[str, dict[str, float]]:
  """Returns the share of each fault in content that is named, by its place in the series."""
  results = {}
  for number, name in enumerate(faults.CONTENT_FAULTS):
    results[name] = {where: float(np.mean([
        content_trial(series, name, (SEED.value, number, i), where)
        for i in range(TRIALS.value)])) for where in ('inside', 'newest')}
    print(f'[{number + 1}/{len(faults.CONTENT_FAULTS)}] {name}', file=sys.stderr, flush=True)
  return results


def show(files: dict[str, Any], content: dict[str, Any]) -> None:
  """Prints both tables."""
  print(f'\nFaults in files of a copy, {COPIES.value} of each: step named, and file or only folder.\n')
  headings = [f'{kind}: {what}' for kind in ('hashes kept', 'recomputed')
              for what in ('file', 'folder', 'of')]
  print(table(['fault', *headings], [
      [name, *(str(n) for kind in ('kept', 'recomputed') for n in (
          counts[kind]['file'], counts[kind]['folder'], COPIES.value - counts[kind]['refused']))]
      for name, counts in files.items()]))
  print(f'\nFaults in the content of one of {STRETCH.value} checkpoints without hashes, '
        f'{TRIALS.value} of each: step named.\n')
  print(table(['fault', 'inside the series', 'newest checkpoint'], [
      [name, f'{rates["inside"]:.0%}', f'{rates["newest"]:.0%}'] for name, rates in content.items()]))


def main() -> None:
  """Audits the run as it is, then with every fault, and prints what was found."""
  run_dir, series = checked_run()
  facts = machine()
  print(facts, flush=True)
  healthy = false_alarms(run_dir)
  print(f'healthy: {healthy["snapshots"]} snapshots, findings {len(healthy["with hashes"])} with '
        f'hashes in {healthy["seconds"][0]:.1f} s, {len(healthy["without hashes"])} without in '
        f'{healthy["seconds"][1]:.1f} s', *healthy['with hashes'], *healthy['without hashes'],
        sep='\n', flush=True)
  files, content = file_results(run_dir), content_results(series)
  show(files, content)
  if JSON.value:
    write_whole(pathlib.Path(JSON.value), json.dumps(
        {'machine': facts, 'healthy': healthy, 'files': files, 'content': content},
        indent=2) + '\n')
  missed = [name for name, counts in files.items() if counts['kept']['missed']]
  if missed or healthy['with hashes'] or healthy['without hashes']:
    raise stored.DamagedError(f'missed with hashes: {", ".join(missed) or "nothing"}; false alarms: '
                              f'{len(healthy["with hashes"])}, {len(healthy["without hashes"])}')


if __name__ == '__main__':
  command_line.run(main)
