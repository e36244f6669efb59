"""Reads the compiler's schedule of the TPU attention kernels: bundles of every part of a grid step.

A TPU core issues one bundle of instructions a cycle. libtpu can write the final schedule of a
program as text; its parts are told apart by the branches around them (`flash_tpu._on_pair`).
"""

import importlib.metadata
import os
import pathlib
import re
from typing import NamedTuple

import numpy as np

from models.kernels.interface import Mask
from models.kernels.pairs import MASKED, live_pairs
from research.errors import UserError

# Cycles per second (the published bf16 peak over the matrix units' size), bytes per second of HBM.
CLOCK = {'TPU v4': 1.05e9, 'TPU v5 lite': 1.5e9, 'TPU v5': 1.75e9, 'TPU v6 lite': 1.75e9}
BANDWIDTH = {'TPU v4': 1.228e12, 'TPU v5 lite': 0.819e12, 'TPU v5': 2.765e12,
             'TPU v6 lite': 1.64e12}
READABLE = '0.0.52'  # the libtpu whose schedules these functions were written for
BRANCH = 24  # bundles; branches around shorter code are waits for copies


class UnknownSchedule(UserError):
  """A schedule whose parts cannot be told apart."""


class Parts(NamedTuple):
  """Bundles of a kernel: what every grid step runs, and what only some do."""

  always: int
  start: int
  steps: tuple[int, ...]  # of a whole pair and of a masked one, as far as they occur
  finish: int


def write_schedules_to(folder: pathlib.Path) -> None:
  """Makes libtpu write the schedule of all it compiles; to be called before it is loaded."""
  os.environ['LIBTPU_INIT_ARGS'] = ' '.join([
      os.environ.get('LIBTPU_INIT_ARGS', ''), f'--xla_jf_dump_to={folder}',
      '--xla_jf_dump_llo_text=true', '--xla_jf_dump_llo_pass_label_regex=.*final_bundles.*'])


def parts(text: str, n_steps: int) -> Parts:
  """Returns the parts of a kernel's final bundles, with so many kinds of steps.

  Branches before its own, around the start of a copy, count as what every step runs.

  Raises:
    UnknownSchedule: it has fewer branches; those around very small blocks disappear.
  """
  address, last, opened, spans = 0, 0, {}, []
  for line in text.splitlines():
    found = re.match(r'\s*(0x[0-9a-f]+|0)\s', line)
    address = int(found[1], 16) if found else address
    last = max(last, address)
    for region in re.findall(r'Start/End empty region (\d+)', line):
      if region in opened:
        spans.append((opened[region], address))
    for region in re.findall(r'target = \$region(\d+)', line):
      opened[region] = address
  leaves = sorted((a, b) for a, b in spans if not any(a < c < b for c, _ in spans))
  sizes = [b - a for a, b in leaves if b - a > BRANCH][-n_steps - 2:]
  if len(sizes) != n_steps + 2:
    raise UnknownSchedule(f'the schedule of a kernel has parts of {sizes} bundles, not '
                          f'{n_steps + 2} parts; blocks are very small, or libtpu '
                          f'{importlib.metadata.version("libtpu")} writes them otherwise than '
                          f'{READABLE}, which can be read')
  return Parts(last + 1 - sum(sizes), sizes[0], tuple(sizes[1:-1]), sizes[-1])


def read_kernels(folder: pathlib.Path) -> dict[str, str]:
  """Returns the schedules in the folder of attention kernels, ours or JAX's own, by name.

  Raises:
    UnknownSchedule: there is none.
  """
  kernels = {}
  for path in sorted(folder.iterdir()):
    name = re.search(r'-((?:flash|splash)\w+?)\.\d+-\d+-final_bundles\.txt$', path.name)
    if name:
      kernels[name[1]] = path.read_text(encoding='utf-8', errors='replace')
  if not kernels:
    raise UnknownSchedule(f'libtpu {importlib.metadata.version("libtpu")} wrote no schedule of a '
                          f'kernel under a known name; {READABLE} does')
  return kernels


def empty(folder: pathlib.Path) -> None:
  """Removes what was written so far."""
  for path in folder.iterdir():
    path.unlink()


def cycles(kernels: dict[str, str], mask: Mask, length: int, blocks: tuple[int, int],
           heads: int, key_heads: int) -> dict[str, int]:
  """Returns the bundles that each kernel runs for one row of `length` tokens.

  `kernels` are their schedules by name.
  """
  result = {}
  for name, text in kernels.items():
    by_keys = name == 'flash_tpu_keys'
    pairs = live_pairs(mask, length, length, *blocks, by_keys=by_keys)
    counts = np.unique(pairs.flags & MASKED != 0, return_counts=True)[1]
    part = parts(text, len(counts))
    owners = -(-length // blocks[by_keys]) * (key_heads if by_keys else heads)
    steps = sum(n * size for n, size in zip(counts.tolist(), part.steps, strict=True))
    result[name] = (heads * (len(pairs.flags) * part.always + steps)
                    + owners * (part.start + part.finish))
  return result
