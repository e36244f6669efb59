"""Bits per byte of a text run's held-out part, beside compressors that know the training part."""

from collections.abc import Callable
from typing import Any

import numpy as np

from research.config import ExperimentConfig
from research.data.batches import Source
from research.data.text_corpus import read_texts
from research.evals.bits_per_byte import bits_per_byte
from research.evals.compression import compressed_bits_per_byte


def score_heldout_text(config: ExperimentConfig, source: Source,
                       score: Callable[[dict[str, np.ndarray]], np.ndarray]) -> dict[str, Any]:
  """Returns bits per byte by file and over all ('all'): the model's and each compressor's.

  Args:
    config: of a run on text (data.kind='text').
    source: its data.
    score: batch of host arrays -> nats per token [B, L].

  Raises:
    DataError: there is no held-out text, or its tokenizer does not restore it.
  """
  model = bits_per_byte(
      source.heldout_documents(), score, length=config.data.sequence_length,
      batch_size=config.data.batch_size, eos_id=source.tokenizer.eos_id,
      pad_id=source.tokenizer.pad_id)
  parts = {}
  train_all, heldout_all = [], []
  for _, files in read_texts(config.data.text):
    for file in files:
      train, heldout = (''.join(part).encode() for part in (file.train, file.heldout))
      parts[str(file.path)] = compressed_bits_per_byte(train, heldout)
      train_all.append(train)
      heldout_all.append(heldout)
  parts['all'] = compressed_bits_per_byte(b''.join(train_all), b''.join(heldout_all))
  return {name: {'bits_per_byte': scored.bits_per_byte, 'bytes': scored.n_bytes,
                 'tokens': scored.n_tokens, **parts[name]} for name, scored in model.items()}
