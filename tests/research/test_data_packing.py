"""Packing: segments, positions and masks, written out by hand."""

import numpy as np

from research.data.packing import make_row, stack_rows

EOS, PAD = 9, 8


def test_documents_in_the_middle_of_a_row():
  row = make_row(np.array([1, 2, 9, 3, 9, 4, 5], np.uint16), EOS, 6, PAD)
  expected = {
    'tokens_L': [1, 2, 9, 3, 9, 4], 'targets_L': [2, 9, 3, 9, 4, 5],
    'segment_ids_L': [1, 1, 2, 2, 3, 3], 'positions_L': [0, 1, 0, 1, 0, 1],
    'loss_mask_L': [1] * 6}
  assert {name: values.tolist() for name, values in row.items()} == expected
  assert {name: v.dtype for name, v in row.items()} == {
    name: np.float32 if name == 'loss_mask_L' else np.int32 for name in expected}


def test_row_that_begins_with_a_document_and_ends_in_padding():
  row = make_row(np.array([9, 1, 2, 9]), EOS, 5, PAD)
  assert row['tokens_L'].tolist() == [9, 1, 2, 8, 8]
  assert row['targets_L'].tolist() == [1, 2, 9, 8, 8]
  assert row['segment_ids_L'].tolist() == [1, 1, 1, 0, 0]
  assert row['positions_L'].tolist() == [0, 1, 2, 0, 0]
  assert row['loss_mask_L'].tolist() == [1, 1, 1, 0, 0]


def test_stacked_rows():
  rows = [make_row(np.array([a, 2, 3]), EOS, 2, PAD) for a in (0, 1)]
  batch = stack_rows(rows)
  assert batch['tokens'].tolist() == [[0, 2], [1, 2]]
  assert set(batch) == {'tokens', 'targets', 'segment_ids', 'positions', 'loss_mask'}
