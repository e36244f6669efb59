"""Do generalizing answers hop while the loss looks smooth, when pattern documents come in windows?

Command:  python -m launchers.pretrain --experiment=quickstart
Hardware: two CPU cores. Time: under 4 minutes of training and monitoring.
Model:    2 layers, width 64; 2,400 steps of 3,072 tokens (7.4M tokens).
Data:     the micro-world; the shares of Successive and Repetitive documents drift by windows of
          60 steps (log-normal, sd 1.5), all else is i.i.d.
Expected: Flipped is known by heart and then hops to the labels of the context, in all five prompt
          variants; Successive and Repetitive change sides with the windows, seldom for long enough
          to be a hop; no control hops.
"""

from models.config import ModelConfig
from research.config import ExperimentConfig, MonitorConfig
from research.data.config import DataConfig
from research.data.microworld import WORDS, MicroworldConfig
from research.training.config import CheckpointConfig, EvalConfig, OptimizerConfig

VOCAB_SIZE = 64 * -(-(len(WORDS) + 8) // 64)  # words and specials, rounded up to devices' liking


def get_config() -> ExperimentConfig:
  """Returns the experiment."""
  return ExperimentConfig(
      name='quickstart', n_steps=2400,
      model=ModelConfig(vocab_size=VOCAB_SIZE, context_length=64, n_layers=2, d_model=64,
                        n_heads=4, n_kv_heads=4, d_head=16, d_ff=256),
      data=DataConfig(kind='microworld', sequence_length=64, batch_size=48,
                      microworld=MicroworldConfig(drift_window=60, drift_sd=1.5)),
      optimizer=OptimizerConfig(name='adamw', peak_lr=2e-3, schedule='constant', warmup_steps=50,
                                weight_decay=0.1, clip_norm=1.0),
      checkpoints=CheckpointConfig(every=600, snapshot_every=20),
      monitors=MonitorConfig(suite='microworld'),
      evals=EvalConfig(every=100, n_batches=1))
