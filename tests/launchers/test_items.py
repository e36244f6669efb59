"""The launcher of item files. Witness: the files, read by pandas and by the reader of suites."""

import collections
import dataclasses
import re

import numpy as np
import pandas as pd

from research.data import tokenizers
from research.monitors import table
from research.monitors.encoding import encode_items
from research.monitors.items import sound_items
from research.monitors.scoring import Scores
from research.monitors.small.config import SmallSuiteConfig
from research.monitors.small.suite import small_suite
from research.run_dir import RunDir
from tests.launchers.test_launchers import launch

SIZE = SmallSuiteConfig(families=('successive', 'truthy'), levels=('easy',), contexts=3)


def test_the_suite_is_written(tmp_path):
  path = tmp_path / 'items.parquet'
  result = launch('items', f'--write={path}', '--config.monitors.small.families=successive,truthy',
                  '--config.monitors.small.levels=easy', '--config.monitors.small.contexts=3')
  assert result.returncode == 0, result.stderr
  assert sound_items(path) == (small_suite(SIZE), [])


def test_items_of_a_run_are_chosen(tmp_path):
  """Most items go up with the checkpoints, every 16th is never right."""
  items = small_suite(dataclasses.replace(SIZE, contexts=8))
  run_dir, is_wrong = RunDir(tmp_path / 'run'), np.arange(len(items)) % 16 == 0
  rng = np.random.default_rng(0)
  encoded = encode_items(items, tokenizers.byte_tokenizer(), 10_000)
  table.write_item_table(run_dir.monitor_items, items, encoded)
  for step in range(16):
    margin = rng.normal(size=len(items)) + np.where(is_wrong, -50, min(step / 4 - 1.5, 0.9))
    table.write_scores(run_dir.monitor_scores, step, Scores(
        margin.astype(np.float32), np.zeros(len(items), np.float32)))
  chosen, statistics = tmp_path / 'chosen.jsonl', tmp_path / 'statistics.csv'
  result = launch('items', f'--statistics_of={run_dir.path}', '--choose=12', f'--write={chosen}',
                  f'--table={statistics}')
  assert result.returncode == 0, result.stderr
  row = next(line for line in result.stdout.splitlines() if line.startswith('truthy/truthy_easy '))
  assert re.search(r'  0\.\d{3} \[0\.\d\d, [01]\.\d\d\] .* of 16$', row), row
  taken, _ = sound_items(chosen)
  assert len(taken) == 12 and not {items.index(item) for item in taken} & set(np.flatnonzero(
      is_wrong))
  assert collections.Counter(item.is_control for item in taken) == {False: 6, True: 6}
  frame = pd.read_csv(statistics)
  assert frame['item_id'].tolist() == [item.item_id for item in items]
  assert not frame['is_eligible'][is_wrong].any()
  assert (frame['share'][is_wrong] == 0).all()


def test_a_file_that_cannot_be_written_is_one_sentence():
  result = launch('items', '--write=/proc/items.jsonl', '--config.monitors.small.families=truthy',
                  '--config.monitors.small.contexts=3')  # where root may not write either
  assert result.returncode == 2, result.stderr
  assert result.stderr.startswith('error: ') and '/proc' in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1


def test_senseless_flags_are_refused(tmp_path):
  result = launch('items', '--choose=5', f'--write={tmp_path}/x.jsonl')
  assert result.returncode == 2 and '--statistics_of' in result.stderr
  assert len(result.stderr.strip().splitlines()) == 1
