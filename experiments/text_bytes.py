"""What does the text experiment lose when the model reads bytes instead of byte pairs?

Command:  python -m launchers.pretrain --experiment=text_bytes --config.data.text.paths='my_texts/*.txt'
Hardware: two CPU cores. Time: at most 10 minutes of training for 2 MB of text.
Model:    as text with a vocabulary of 256 bytes and three specials; 0.9M parameters.
Expected: more bits per held-out byte than byte pairs at equal time (NOTEBOOK.md).
"""

import dataclasses

from experiments import text
from research.config import ExperimentConfig


def get_config() -> ExperimentConfig:
  """Returns the text experiment over bytes."""
  config = text.get_config()
  return dataclasses.replace(
      config, name='text_bytes', model=dataclasses.replace(config.model, vocab_size=320),
      data=dataclasses.replace(config.data, text=dataclasses.replace(
          config.data.text, tokenizer='bytes')))
