"""A thread that names what hangs: it looks at how long ago the run last moved on."""

import faulthandler
import os
import socket
import sys
import threading
import time

import jax

from parallelism import distributed, roll_call
from research.run_dir import RunDir
from research.training.config import WatchdogConfig

# What a process is doing, as a sentence may have it.
PHASES = {
    'start': 'reading its checkpoint and opening its files',
    'data': 'waiting for data',
    'step': 'compiling or computing a step, or waiting in it for other processes',
    'batch_hash': 'hashing a batch',
    'hash': 'hashing tensors',
    'save': 'saving, or waiting for other processes to have saved',
    'monitor': 'scoring monitors',
    'eval': 'computing the held-out loss',
    'report': 'scoring held-out text and writing the report',
}
# How long these take nobody knows, and what is ended in them would be ended in them again.
UNBOUNDED = ('start', 'report')
DISK_SECONDS = 10.0  # for writing stacks: the disk may be what hangs


class Watchdog:
  """Watches while it is entered; `at` is how the run says that it moves on."""

  def __init__(self, config: WatchdogConfig, run_dir: RunDir):
    self._config, self._path = config, run_dir.stacks_txt
    self._phase, self._step, self._since = 'start', 0, time.monotonic()
    self._warm = False  # Whether a step was finished: the first is compiled.
    self._ended = threading.Event()
    self._thread = threading.Thread(target=self._watch, name='watchdog', daemon=True)

  def __enter__(self) -> 'Watchdog':
    """Starts the thread, unless it is turned off."""
    if self._config.seconds:
      self._thread.start()
    return self

  def __exit__(self, *unused: object) -> None:
    """Ends the thread."""
    self._ended.set()

  def at(self, phase: str, step: int | None = None) -> None:
    """Says that the run has come to a phase (a key of `PHASES`), and to a step if one is given."""
    self._warm |= phase == 'step' and step is not None
    self._phase, self._step = phase, self._step if step is None else step
    self._since = time.monotonic()

  def _watch(self) -> None:
    """Looks at the time again and again; tells of a hang once."""
    told = None
    while not self._ended.wait(min(1.0, self._config.seconds / 4)):
      since = self._since
      if time.monotonic() - since >= self._config.seconds and since != told:
        told = since  # Once per hang.
        self._tell(time.monotonic() - since)

  def _tell(self, seconds: float) -> None:
    """Says where the run hangs, writes the stacks of all threads, ends the process if it is to."""
    sentence = (f'no progress for {seconds:.0f} s: process {jax.process_index()} of '
                f'{jax.process_count()} ({socket.gethostname()}) is {PHASES[self._phase]}, '
                f'phase {self._phase} after step {self._step}; stacks in {self._path}')
    print(f'watchdog: {sentence}', file=sys.stderr, flush=True)
    distributed.tell(f'watchdog: {sentence}')
    writing = threading.Thread(target=self._write_stacks, args=(sentence,), daemon=True)
    writing.start()
    writing.join(DISK_SECONDS)
    if self._config.abort and self._warm and self._phase not in UNBOUNDED:
      distributed.fail(sentence, roll_call.EXIT_CODE)
      os._exit(roll_call.EXIT_CODE)

  def _write_stacks(self, sentence: str) -> None:
    """Appends the stacks of all threads to the run's file."""
    with open(self._path, 'a', encoding='utf-8') as file:
      file.write(f'{time.strftime("%Y-%m-%dT%H:%M:%S%z")} {sentence}\n')
      file.flush()
      faulthandler.dump_traceback(file)
      file.write('\n')
