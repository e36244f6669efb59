"""Kills a run many times at every moment it has; says what was lost (nothing) and what it cost.

  python -m experiments.benchmarks.kill_storm
  python -m experiments.benchmarks.kill_storm --kills=40 --steps=60 --folder=/tmp/storm
  python -m experiments.benchmarks.kill_storm --signal=TERM --kills=40

Runs launchers.pretrain with a tiny model once without a kill, then once with all of them: while a
step is computed, a checkpoint written, a snapshot scored, the report made, and while the process is
starting again after a kill. At the end every row, checkpoint, snapshot and score of the two is
compared bit by bit. Repeating the command with the same --folder goes on where it was. Ends with
code 1 if anything was lost. 200 kills take about 20 minutes on two idle cores.
"""

import collections
import json
import pathlib
import signal
import statistics
import sys
import tempfile
import time

from absl import flags

from experiments.benchmarks import command_line, storms
from experiments.benchmarks.estimates import machine, table
from research.errors import UserError
from research.run_dir import RunDir, write_whole
from research.training.logs import JsonLines, duration, read_rows

KILLS = flags.DEFINE_integer('kills', 200, 'kills over the run', lower_bound=1)
STEPS = flags.DEFINE_integer('steps', 300, 'steps of the run', lower_bound=12)
SEED = flags.DEFINE_integer('seed', 0, 'of the moments')
SIGNAL = flags.DEFINE_enum('signal', 'KILL', ['KILL', 'TERM'], 'SIGKILL, or the one that asks')
FOLDER = flags.DEFINE_string('folder', '', 'where both runs are kept; default a temporary one')


def _without_kills(folder: pathlib.Path) -> float:
  """Returns the seconds of the uninterrupted run, of which the programs were compiled before."""
  known = folder / 'whole.json'
  if not known.exists():
    print('compiling, and one run without a kill', flush=True)
    storms.finish(folder / 'first', STEPS.value, folder / 'programs')
    seconds = storms.finish(folder / 'whole', STEPS.value, folder / 'programs')
    write_whole(known, json.dumps({'seconds': seconds, 'steps': STEPS.value}) + '\n')
  found = json.loads(known.read_text(encoding='utf-8'))
  if found['steps'] != STEPS.value:
    raise UserError(f'--folder={folder} holds runs of {found["steps"]} steps, not '
                    f'--steps={STEPS.value}; choose another')
  return found['seconds']


def _strike_all(folder: pathlib.Path, run_dir: RunDir) -> list[dict]:
  """Returns a row per kill, those of earlier starts of this command included."""
  number = getattr(signal, f'SIG{SIGNAL.value}')
  kills = storms.plan(KILLS.value, STEPS.value, SEED.value)
  if number == signal.SIGTERM:
    kills = storms.asked(KILLS.value, STEPS.value, SEED.value)
  path = folder / f'kills-{SIGNAL.value}-{KILLS.value}-{SEED.value}.jsonl'
  rows = read_rows(path)
  log, began, n_before = JsonLines(path, KILLS.value), time.monotonic(), len(rows)
  for blow in storms.storm(kills[n_before:], run_dir, STEPS.value, folder / 'programs', number):
    rows.append({'step': len(rows) + 1, 'moment': blow.kill.moment, 'rows': blow.rows,
                 'repeated': blow.repeated, 'seconds': blow.seconds, 'in_time': blow.in_time})
    log.append(rows[-1])
    per_kill = (time.monotonic() - began) / (len(rows) - n_before)
    print(f'kill {len(rows)}/{KILLS.value}  {blow.kill.moment} at step {blow.rows} of '
          f'{STEPS.value}, {blow.repeated} to repeat  ETA '
          f'{duration(per_kill * (KILLS.value - len(rows)))}', flush=True)
  log.close()
  return rows


def _report(rows: list[dict], lost: list[str], whole: float, last: float) -> str:
  by_moment = collections.defaultdict(list)
  for row in rows:
    by_moment[row['moment']].append(row)
  shown = [[moment, str(len(met)), str(sum(row['in_time'] for row in met)),
            f'{statistics.mean(row["repeated"] for row in met):.1f}',
            str(max(row['repeated'] for row in met))] for moment, met in by_moment.items()]
  repeated = [row['repeated'] for row in rows]
  spent = sum(row['seconds'] for row in rows) + last - whole
  return '\n'.join([
      table(['killed while', 'kills', 'met', 'steps repeated, mean', 'most'], shown), '',
      f'lost: {"; ".join(lost) if lost else "nothing"}',
      f'steps repeated per kill: {statistics.mean(repeated):.2f} (a full checkpoint every '
      f'{storms.EVERY["checkpoints.every"]})',
      f'time lost per kill: {spent / len(rows):.1f} s (start, compiled programs read, steps '
      f'repeated); the run without kills takes {whole:.1f} s'])


def main() -> None:
  print(machine(), flush=True)
  folder = pathlib.Path(FOLDER.value or tempfile.mkdtemp(prefix='modehop-storm-'))
  print(f'writing to {folder}', flush=True)
  whole = _without_kills(folder)
  run_dir = RunDir(folder / f'killed-{SIGNAL.value}-{KILLS.value}-{SEED.value}')
  rows = _strike_all(folder, run_dir)
  last = storms.finish(run_dir.path, STEPS.value, folder / 'programs')
  lost = storms.differences(RunDir(folder / 'whole'), run_dir)
  print(f'\n{len(rows)} SIG{SIGNAL.value} over {STEPS.value} steps\n')
  print(_report(rows, lost, whole, last))
  sys.exit(1 if lost else 0)


if __name__ == '__main__':
  command_line.run(main)
