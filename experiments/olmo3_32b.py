"""Does OLMo 3 32B, retrained from your text, pass through the phases of its published checkpoints?

Command:  python -m launchers.pretrain --experiment=olmo3_32b --coordinator=auto, on every host
Hardware: a v5p:8x8x8 slice (512 chips, 128 hosts of four). Time: about 16 days at 40% of the
          bf16 peak, by arithmetic; not measured.
Model:    64 layers, width 5,120, 40 heads, 8 key/value heads, feed-forward 27,648.
          32,234,279,936 parameters; 203 GFLOP per token of a row of 8,192.
Scale:    76,900 steps of 8.4M tokens: 645B tokens, 20 per parameter; 1.3e23 FLOP.
Data:     your text files (--config.data.text.paths) and the model's published tokenizer.json beside
          them (--config.data.text.tokenizer); 10% of each file is held out.
Expected: about 2.00 nats per token by eq. 10 of Hoffmann et al. 2022, whose text and tokenizer are
          others: a rough guide. No run of ours.
Shape:    allenai/Olmo-3-1125-32B/config.json and OLMo-core (arXiv:2512.13961): three layers that
          see 4,096 tokens, then a full one; norms after attention and feed-forward; QK-norm over
          the projection; z-loss 1e-5. The published model has 100,278 tokens; OLMo-core pads them
          to a multiple of 128 for training, as here: 757,760 parameters more, which stand for no
          token.
          Long contexts stretch full layers only, in a run of their own: --config.start.run_dir=...
          --config.model.context_length=65536 --config.data.sequence_length=65536
          --config.model.rope.scaling=yarn --config.model.rope.factor=8
"""

from models.config import ModelConfig, RopeConfig
from parallelism.mesh import MeshConfig
from research.config import ExperimentConfig
from research.data.config import DataConfig, TextConfig
from research.training.config import CheckpointConfig, EvalConfig, OptimizerConfig

VOCAB_SIZE = 128 * -(-100_278 // 128)  # the tokens, rounded up to what devices can split


def get_config() -> ExperimentConfig:
  """Returns the experiment; the text files and the tokenizer have to be there."""
  return ExperimentConfig(
      name='olmo3_32b', n_steps=76_900,
      model=ModelConfig(
          vocab_size=VOCAB_SIZE, context_length=8192, n_layers=64, d_model=5120, n_heads=40,
          n_kv_heads=8, d_head=128, d_ff=27_648, rope=RopeConfig(theta=500_000.0),
          sliding_rope=RopeConfig(theta=500_000.0), norm_eps=1e-6, norm_placement='post',
          qk_norm='projection', window=4096,
          layer_pattern=('sliding', 'sliding', 'sliding', 'full'),
          tie_embeddings=False, compute_dtype='bfloat16', remat='full', scan_layers='scan'),
      data=DataConfig(kind='text', sequence_length=8192, batch_size=1024,
                      text=TextConfig(paths=('text',), tokenizer='tokenizer.json')),
      optimizer=OptimizerConfig(name='adamw', peak_lr=6e-4, schedule='cosine', warmup_steps=2000,
                                final_lr_fraction=0.1, b1=0.9, b2=0.95, weight_decay=0.1,
                                z_weight=1e-5),
      mesh=MeshConfig(fsdp=512),
      checkpoints=CheckpointConfig(every=1000, snapshot_every=1000, snapshot_dtype='bfloat16'),
      evals=EvalConfig(every=500, n_batches=4))
