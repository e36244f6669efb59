r"""What does a pretrained model learn from a few hundred conversations, by their responses alone?

Command:  python -m launchers.pretrain --experiment=sft --init_from=runs/text \
              --config.data.sft.paths=conversations.jsonl
Hardware: two CPU cores. Time: about a minute for a model of the text experiment.
Model:    that of the run named by --init_from; without it, of the text experiment from scratch.
Data:     chat messages, or pairs of prompt and response; a tenth of each file is held out.
Expected: the loss on responses falls within the first epoch, on held-out ones less (NOTEBOOK.md).
"""

import dataclasses

from experiments import text
from research.config import ExperimentConfig, MonitorConfig
from research.data.config import DataConfig, SftConfig
from research.training.config import CheckpointConfig, EvalConfig, OptimizerConfig


def get_config() -> ExperimentConfig:
  """Returns the experiment; data.sft.paths has to be given unless there is a folder `sft`."""
  config = text.get_config()
  return dataclasses.replace(
      config, name='sft', n_steps=100,
      data=DataConfig(kind='sft', sequence_length=320, batch_size=8,
                      sft=SftConfig(paths=('sft',))),
      optimizer=OptimizerConfig(name='adamw', peak_lr=3e-4, schedule='cosine', warmup_steps=10,
                                weight_decay=0.0, final_lr_fraction=0.1),
      checkpoints=CheckpointConfig(every=50, snapshot_every=25),
      monitors=MonitorConfig(suite='none'), evals=EvalConfig(every=10, n_batches=4))
