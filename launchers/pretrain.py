r"""Trains or fine-tunes a language model, monitors every snapshot, ends with a report.

  python -m launchers.pretrain --experiment=quickstart
  python -m launchers.pretrain --experiment=text --config.data.text.paths=a.txt,b.jsonl.zst
  python -m launchers.pretrain --experiment=quickstart --config.seed=1 --run_dir=runs/seed1
  python -m launchers.pretrain --experiment=sft --init_from=runs/text@1200 \
      --config.data.sft.paths=conversations.jsonl

The last one fine-tunes: the loss is on responses only; model and tokenizer are those of the run
that it starts from, be it trained here or imported by launchers.convert.
With --config.monitors.captures=N up to N suspected hops are bracketed to one step by replay when
the run has ended, each in a directory beside it, from full checkpoints that stay for this; of a run
of several processes when the command is then repeated in one.
Repeating a command resumes an interrupted run; a finished one prints where its report is. SIGTERM
and Ctrl-C finish the step, save and end with code 85 (a second Ctrl-C leaves at once, with 130);
too many skipped steps in a row (--config.guards.stop_after) save and end it with code 3, bad input
with code 2 and nothing written. A watchdog names what hangs; with --config.watchdog.abort it ends
the process with code 75.
On several hosts start the same command on each: --coordinator=auto on Cloud TPU and SLURM, else
--coordinator=host:port --n_processes=N --process_id=I. When one process fails, all end (code 75
where another one is the cause), when one gets SIGTERM, all stop at the same step; the same command
on all resumes.
"""

import pathlib

from absl import flags
import jax

from launchers import flags as shared
from parallelism import distributed
from research.dynamics.captures import capture, check_settings
from research.errors import UserError
from research.run_dir import RunDir
from research.training.loop import train

EXPERIMENT = flags.DEFINE_string('experiment', 'quickstart', 'a module of experiments/')
RUN_DIR = flags.DEFINE_string('run_dir', '', 'where the run is written; default runs/<experiment>')
INIT_FROM = flags.DEFINE_string(
    'init_from', '', 'RUN_DIR or RUN_DIR@STEP: model, tokenizer and first parameters of a run; '
    'rows no longer than its context')
COORDINATOR = flags.DEFINE_string(
    'coordinator', '', "several hosts: 'auto' (Cloud TPU, SLURM) or host:port of process 0")
N_PROCESSES = flags.DEFINE_integer('n_processes', 1, 'number of processes, with host:port')
PROCESS_ID = flags.DEFINE_integer('process_id', 0, 'rank of this process, with host:port')


def main() -> None:
  config = shared.config_from_flags(EXPERIMENT.value, INIT_FROM.value)
  try:
    distributed.start(config.hosts, COORDINATOR.value, N_PROCESSES.value, PROCESS_ID.value)
  except ValueError as error:
    raise UserError(str(error)) from error
  path = RUN_DIR.value or pathlib.Path('runs') / EXPERIMENT.value
  check_settings(config)
  train(config, RunDir(path, jax.process_index()))
  if config.monitors.captures:
    capture(RunDir(path), config.monitors.captures,
            [pair for pair in shared.overrides() if pair[0].startswith('mesh.')])
  distributed.finish()


if __name__ == '__main__':
  shared.run(main)
