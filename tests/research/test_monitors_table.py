"""Monitor tables. Witness: pandas' own reading and grouping."""

import numpy as np
import pandas as pd
import pytest

from research.data import tokenizers
from research.errors import UserError
from research.monitors import table
from research.monitors.encoding import encode_items
from research.monitors.items import MonitorItem
from research.monitors.scoring import Scores

ITEMS = [
    MonitorItem(f'{dataset}/{seed}/{i}', 'family', dataset, seed, 'plain', f'prompt {i}',
                ' yes', ' no', dataset == 'b')
    for dataset in 'ab' for seed in range(3) for i in range(seed + 2)]


def scores(seed: int = 0) -> Scores:
  rng = np.random.default_rng(seed)
  logps = -rng.exponential(size=(2, len(ITEMS))).astype(np.float32)
  return Scores(*logps)


def test_scores_survive_a_file(tmp_path):
  expected = scores()
  path = table.write_scores(tmp_path, 20, expected)
  assert path.name == 'step-00000020.parquet'
  step, got = table.read_scores(path)
  assert step == 20
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_array_equal(a, b)
  frame = pd.read_parquet(path)
  assert {name: str(dtype) for name, dtype in frame.dtypes.items()} == {
      'step': 'int64', 'item': 'int32', 'logp_generalizing': 'float32',
      'logp_shortcut': 'float32'}
  table.write_scores(tmp_path, 100_000_000, expected)
  assert table.score_steps(tmp_path) == [20, 100_000_000]
  assert not list(tmp_path.glob('*.tmp'))


def test_items_survive_a_file(tmp_path):
  tokenizer = tokenizers.byte_tokenizer()
  encoded = encode_items(ITEMS, tokenizer, 64)
  table.write_item_table(tmp_path / 'items.parquet', ITEMS, encoded)
  assert table.read_item_table(tmp_path / 'items.parquet') == ITEMS
  frame = pd.read_parquet(tmp_path / 'items.parquet')
  assert frame['item'].tolist() == list(range(len(ITEMS)))
  assert frame['n_prompt_tokens'].tolist() == [len(item.prompt) for item in ITEMS]
  assert not frame['straddles'].any()


def test_summary_is_that_of_pandas():
  logps = scores(1)
  logps.logp_shortcut[3] = logps.logp_generalizing[3]  # a tie counts as wrong
  rows = table.summary(ITEMS, 7, logps)
  frame = pd.DataFrame({
      'dataset': [item.dataset for item in ITEMS], 'seed': [item.seed for item in ITEMS],
      'right': logps.logp_generalizing > logps.logp_shortcut,
      'margin': np.exp(logps.logp_generalizing.astype(float))
                - np.exp(logps.logp_shortcut.astype(float))})
  groups = frame.groupby(['dataset', 'seed'])
  for row in rows:
    group = groups.get_group((row.dataset, row.seed))
    assert (row.step, row.n_items) == (7, len(group))
    assert row.is_control == (row.dataset == 'b')
    assert row.accuracy == pytest.approx(group['right'].mean())
    assert row.margin == pytest.approx(group['margin'].mean())
  assert len(rows) == len(groups)
  assert table.dataset_means(rows, 'accuracy') == pytest.approx(
      frame.groupby('dataset')['right'].mean().to_dict())


def test_damaged_tables_are_refused(tmp_path):
  path = table.write_scores(tmp_path, 20, scores())
  with pytest.raises(UserError, match='does not exist'):
    table.read_scores(tmp_path / 'step-00000040.parquet')
  frame = pd.read_parquet(path)
  frame.iloc[1:].to_parquet(path, index=False)
  with pytest.raises(UserError):
    table.read_scores(path)
  path.write_bytes(path.read_bytes()[:50])
  with pytest.raises(UserError, match='not readable Parquet'):
    table.read_scores(path)
  with pytest.raises(UserError, match='expected'):
    table.write_item_table(path, ITEMS, encode_items(ITEMS, tokenizers.byte_tokenizer(), 64))
    table.read_scores(path)
