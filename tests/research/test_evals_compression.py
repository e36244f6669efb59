"""Compressors as baselines, against the command-line programs."""

import shutil
import subprocess

import numpy as np
import pytest

from research.data.errors import DataError
from research.evals.compression import COMPRESSORS, compressed_bits_per_byte

TEXT = ' '.join(np.random.default_rng(0).choice(['fox', 'crow', 'ox', 'hen'], 4000)).encode()


@pytest.mark.parametrize('name', COMPRESSORS)
def test_size_of_the_program_of_that_name(name):
  command = name.split()
  if shutil.which(command[0]) is None:
    pytest.skip(f'the program {command[0]} is not installed')
  out = subprocess.run([*command, '-c'], input=TEXT, capture_output=True, check=True).stdout
  assert abs(len(out) - COMPRESSORS[name](TEXT)) <= 16  # headers: xz may record the sizes of blocks


def test_training_text_helps():
  train, heldout = TEXT[:-1000], TEXT[-1000:]
  for bits in compressed_bits_per_byte(train, heldout).values():
    assert 0.2 < bits < 8 * len(heldout) / 1000
  known = compressed_bits_per_byte(train, train[-1000:])['xz -9e']
  assert known < compressed_bits_per_byte(train, heldout)['xz -9e'] / 4
  with pytest.raises(DataError, match='no held-out text'):
    compressed_bits_per_byte(train, b'')


def test_published_figures_of_the_japanese_book(shared_data):
  # Witness: 2.16 (xz) and 1.89 (bzip2) were measured with the programs on this text.
  raw = (shared_data / 'public_domain_books/wagahaiwa_nekodearu_300k.txt').read_bytes()
  at = len(raw) - round(len(raw) * 0.1)
  bits = compressed_bits_per_byte(raw[:at], raw[at:])
  assert abs(bits['xz -9e'] - 2.16) < 0.02 and abs(bits['bzip2 -9'] - 1.89) < 0.02
