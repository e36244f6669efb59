"""How well does a small model trained for minutes on a few megabytes of text predict the rest?

Command:  python -m launchers.pretrain --experiment=text --config.data.text.paths='my_texts/*.txt'
Hardware: two CPU cores. Time: at most 10 minutes of training for 2 MB of text.
Model:    4 layers, width 128, 1.1M parameters with 2,048 byte-pair tokens.
Data:     the text files, documents packed; the last 10% of each file held out before anything else.
Expected: fewer bits per held-out byte than xz and bzip2 given the training text (NOTEBOOK.md). The
          monitors of the micro-world are run on it: what they see is chance or parroting.
"""

from models.config import ModelConfig
from research.config import ExperimentConfig, MonitorConfig
from research.data.config import DataConfig, TextConfig
from research.training.config import CheckpointConfig, EvalConfig, OptimizerConfig


def get_config() -> ExperimentConfig:
  """Returns the experiment; data.text.paths has to be given unless there is a folder `text`."""
  return ExperimentConfig(
      name='text', n_steps=1200,
      model=ModelConfig(vocab_size=2048, context_length=320, n_layers=4, d_model=128, n_heads=4,
                        n_kv_heads=4, d_head=32, d_ff=384, dropout=0.1),
      data=DataConfig(kind='text', sequence_length=320, batch_size=12,
                      text=TextConfig(paths=('text',), tokenizer='bpe', bpe_vocab_size=2048)),
      optimizer=OptimizerConfig(name='adamw', peak_lr=3e-3, schedule='cosine', warmup_steps=100,
                                weight_decay=0.1, final_lr_fraction=0.05),
      checkpoints=CheckpointConfig(every=400, snapshot_every=200),
      monitors=MonitorConfig(suite='microworld'),
      evals=EvalConfig(every=100, n_batches=4))
