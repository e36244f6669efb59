"""Rows: how a chunk of a token stream becomes tokens, targets, segments and positions.

A stream is EOS document EOS document ... EOS. A segment begins with the EOS before its document,
so that a document's first token has a context to be predicted from, and its end is predicted as
the next EOS; every target counts.
"""

import numpy as np

Row = dict[str, np.ndarray]


def make_row(chunk: np.ndarray, eos_id: int, length: int, pad_id: int) -> Row:
  """Row of `length` tokens from a chunk of at most length + 1 tokens of a stream.

  Returns:
    tokens_L, targets_L int32; segment_ids_L int32, from 1, 0 where padded; positions_L int32,
    from 0 at the start of the row and of every segment; loss_mask_L float32, 0 where padded.
  """
  n = len(chunk) - 1
  row = {name: np.zeros(length, np.int32) for name in ('segment_ids_L', 'positions_L')}
  row['tokens_L'] = np.full(length, pad_id, np.int32)
  row['targets_L'] = np.full(length, pad_id, np.int32)
  row['loss_mask_L'] = np.zeros(length, np.float32)
  row['tokens_L'][:n] = chunk[:-1]
  row['targets_L'][:n] = chunk[1:]
  row['loss_mask_L'][:n] = 1
  starts = row['tokens_L'][:n] == eos_id
  index = np.arange(n, dtype=np.int32)
  row['segment_ids_L'][:n] = np.cumsum(starts) + (0 if n and starts[0] else 1)
  row['positions_L'][:n] = index - np.maximum.accumulate(np.where(starts, index, 0))
  return row


def stack_rows(rows: list[Row]) -> dict[str, np.ndarray]:
  """Batch of rows: 'tokens' [B, L] from every row's 'tokens_L', and so on."""
  return {name.removesuffix('_L'): np.stack([row[name] for row in rows]) for name in rows[0]}
