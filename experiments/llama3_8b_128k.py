"""Do modes hop again when Llama-3 8B's context is stretched to 128k tokens?

Command:  python -m launchers.pretrain --experiment=llama3_8b_128k --coordinator=auto, on every host
Hardware: a v5p:4x4x4 slice (64 chips, 16 hosts of four). Time: about 15 hours at 40% of the
          bf16 peak, by arithmetic; not measured.
Model:    32 layers, width 4,096, 32 heads, 8 key/value heads, feed-forward 14,336.
          8,030,261,248 parameters, as published; 148 GFLOP per token of a row of 131,072.
Scale:    1,000 steps of 4.2M tokens: 4B tokens; 6.2e20 FLOP.
Data:     your long text files (--config.data.text.paths) and the model's published tokenizer.json
          beside them (--config.data.text.tokenizer); 10% of each file is held out.
Expected: no figure; it goes on from the last checkpoint of runs/llama3_8b. No run of ours.
Shape:    that of llama3_8b; its rotary embedding stretched eightfold as in
          meta-llama/Llama-3.1-8B/config.json. 16 devices share a row: keys go round in a ring.
"""

import dataclasses

from experiments import llama3_8b
from parallelism.mesh import MeshConfig
from research.config import ExperimentConfig
from research.training.config import ComputeConfig, StartConfig

LENGTH = 131_072


def get_config() -> ExperimentConfig:
  """Returns the experiment; the parent run, the text files and the tokenizer have to be there."""
  base = llama3_8b.get_config()
  rope = dataclasses.replace(base.model.rope, scaling='llama3', factor=8.0, original_context=8192)
  return dataclasses.replace(
      base, name='llama3_8b_128k', n_steps=1000, start=StartConfig(run_dir='runs/llama3_8b'),
      model=dataclasses.replace(base.model, context_length=LENGTH, rope=rope),
      data=dataclasses.replace(base.data, sequence_length=LENGTH, batch_size=32),
      optimizer=dataclasses.replace(base.optimizer, peak_lr=3e-5, warmup_steps=100),
      compute=ComputeConfig(microbatch_tokens=8192, loss_chunk=2048),
      mesh=MeshConfig(fsdp=4, context=16),
      checkpoints=dataclasses.replace(base.checkpoints, every=100, snapshot_every=100))
