"""How does Llama-3 8B learn on your text, watched from its first step?

Command:  python -m launchers.pretrain --experiment=llama3_8b --coordinator=auto, on every host
Hardware: a v5p:4x4x4 slice (64 chips, 16 hosts of four). Time: about 8 days at 40% of the
          bf16 peak, by arithmetic; not measured.
Model:    32 layers, width 4,096, 32 heads, 8 key/value heads, feed-forward 14,336.
          8,030,261,248 parameters, as published; 51.5 GFLOP per token of a row of 8,192.
Scale:    38,300 steps of 4.2M tokens: 161B tokens, 20 per parameter; 8.3e21 FLOP.
Data:     your text files (--config.data.text.paths) and the model's published tokenizer.json beside
          them (--config.data.text.tokenizer); 10% of each file is held out.
Expected: about 2.16 nats per token by eq. 10 of Hoffmann et al. 2022, whose text and tokenizer are
          others: a rough guide. No run of ours.
Shape:    meta-llama/Meta-Llama-3-8B/config.json; learning rate of arXiv:2407.21783, table 3. The
          128,256 tokens are 501 x 256, so up to 256 devices can split them.
"""

from models.config import ModelConfig, RopeConfig
from parallelism.mesh import MeshConfig
from research.config import ExperimentConfig
from research.data.config import DataConfig, TextConfig
from research.training.config import CheckpointConfig, EvalConfig, OptimizerConfig


def get_config() -> ExperimentConfig:
  """Returns the experiment; the text files and the tokenizer have to be there."""
  return ExperimentConfig(
      name='llama3_8b', n_steps=38_300,
      model=ModelConfig(
          vocab_size=128_256, context_length=8192, n_layers=32, d_model=4096, n_heads=32,
          n_kv_heads=8, d_head=128, d_ff=14_336, rope=RopeConfig(theta=500_000.0), norm_eps=1e-5,
          tie_embeddings=False, compute_dtype='bfloat16', remat='full', scan_layers='scan'),
      data=DataConfig(kind='text', sequence_length=8192, batch_size=512,
                      text=TextConfig(paths=('text',), tokenizer='tokenizer.json')),
      optimizer=OptimizerConfig(name='adamw', peak_lr=3e-4, schedule='cosine', warmup_steps=2000,
                                final_lr_fraction=0.1, b1=0.9, b2=0.95, weight_decay=0.1),
      mesh=MeshConfig(fsdp=64),
      checkpoints=CheckpointConfig(every=1000, snapshot_every=1000, snapshot_dtype='bfloat16'),
      evals=EvalConfig(every=500, n_batches=4))
