"""Does OLMo 3 7B, retrained from your text, pass through the phases of its published checkpoints?

Command:  python -m launchers.pretrain --experiment=olmo3_7b --coordinator=auto, on every host
Hardware: a v5p:4x4x4 slice (64 chips, 16 hosts of four). Time: about 7 days at 40% of the
          bf16 peak, by arithmetic; not measured.
Model:    32 layers, width 4,096, 32 heads, 32 key/value heads, feed-forward 11,008.
          7,298,617,344 parameters; 46.6 GFLOP per token of a row of 8,192.
Scale:    34,800 steps of 4.2M tokens: 146B tokens, 20 per parameter; 6.8e21 FLOP.
Data:     your text files (--config.data.text.paths) and the model's published tokenizer.json beside
          them (--config.data.text.tokenizer); 10% of each file is held out.
Expected: about 2.18 nats per token by eq. 10 of Hoffmann et al. 2022, whose text and tokenizer are
          others: a rough guide. No run of ours.
Shape:    allenai/Olmo-3-1025-7B/config.json and OLMo-core (arXiv:2512.13961): three layers that
          see 4,096 tokens, then a full one; norms after attention and feed-forward; QK-norm over
          the projection; z-loss 1e-5. The published model has 100,278 tokens; OLMo-core pads them
          to a multiple of 128 for training, as here: 606,208 parameters more, which stand for no
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
      name='olmo3_7b', n_steps=34_800,
      model=ModelConfig(
          vocab_size=VOCAB_SIZE, context_length=8192, n_layers=32, d_model=4096, n_heads=32,
          n_kv_heads=32, d_head=128, d_ff=11_008, rope=RopeConfig(theta=500_000.0),
          sliding_rope=RopeConfig(theta=500_000.0), norm_eps=1e-6, norm_placement='post',
          qk_norm='projection', window=4096,
          layer_pattern=('sliding', 'sliding', 'sliding', 'full'),
          tie_embeddings=False, compute_dtype='bfloat16', remat='full', scan_layers='scan'),
      data=DataConfig(kind='text', sequence_length=8192, batch_size=512,
                      text=TextConfig(paths=('text',), tokenizer='tokenizer.json')),
      optimizer=OptimizerConfig(name='adamw', peak_lr=3e-4, schedule='cosine', warmup_steps=2000,
                                final_lr_fraction=0.1, b1=0.9, b2=0.95, weight_decay=0.1,
                                z_weight=1e-5),
      mesh=MeshConfig(fsdp=64),
      checkpoints=CheckpointConfig(every=1000, snapshot_every=1000, snapshot_dtype='bfloat16'),
      evals=EvalConfig(every=500, n_batches=4))
