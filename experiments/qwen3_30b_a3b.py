"""How does a mixture of 128 experts, Qwen3-30B-A3B, learn on your text?

Command:  python -m launchers.pretrain --experiment=qwen3_30b_a3b --coordinator=auto, on every host
Hardware: a v5p:4x4x4 slice (64 chips, 16 hosts of four). Time: about 17 days at 40% of the
          bf16 peak, by arithmetic; not measured. The program that the compiler makes for this
          slice takes 38 of a chip's 95 GiB and at best 7.6 s a step (13 days, 52% of the peak),
          bound by compute: a roofline, with collectives on the sparse cores.
Mesh:     every chip gathers the experts of a layer whole, where it runs. With 65,536 tokens on a
          chip that is less to send than the tokens are: mesh.fsdp=8, mesh.expert=8 sends 4.7 GB
          a layer and forward pass to owners and back, and takes 11.5 s a step by the same roofline.
Model:    48 layers, width 2,048, 32 heads, 4 key/value heads, 128 experts of 768, 8 per token.
          30,532,122,624 parameters, 3,353,032,704 active; 27.9 GFLOP per token of a row of 8,192.
Scale:    145,600 steps of 4.2M tokens: 611B tokens, 20 per parameter; 1.7e22 FLOP.
Data:     your text files (--config.data.text.paths) and the model's published tokenizer.json beside
          them (--config.data.text.tokenizer); 10% of each file is held out.
Expected: no published curve of this shape trained so; a lower loss than llama3_8b at equal
          FLOP. No run of ours.
Shape:    Qwen/Qwen3-30B-A3B/config.json: QK-norm on each head, base 1e6, no biases, top-k weights
          rescaled to sum to 1, balance weight 0.001. Its learning rate is not published, this
          one is ours. The 151,936 tokens are 1,187 x 128, so up to 128 devices can split them.
"""

from models.config import ModelConfig, MoEConfig, RopeConfig
from parallelism.mesh import MeshConfig
from research.config import ExperimentConfig
from research.data.config import DataConfig, TextConfig
from research.training.config import CheckpointConfig, EvalConfig, OptimizerConfig


def get_config() -> ExperimentConfig:
  """Returns the experiment; the text files and the tokenizer have to be there."""
  return ExperimentConfig(
      name='qwen3_30b_a3b', n_steps=145_600,
      model=ModelConfig(
          vocab_size=151_936, context_length=8192, n_layers=48, d_model=2048, n_heads=32,
          n_kv_heads=4, d_head=128, d_ff=6144, rope=RopeConfig(theta=1_000_000.0), norm_eps=1e-6,
          qk_norm='head',
          moe=MoEConfig(n_experts=128, top_k=8, d_expert=768, balance_weight=0.001),
          tie_embeddings=False, compute_dtype='bfloat16', remat='full', scan_layers='scan'),
      data=DataConfig(kind='text', sequence_length=8192, batch_size=512,
                      text=TextConfig(paths=('text',), tokenizer='tokenizer.json')),
      optimizer=OptimizerConfig(name='adamw', peak_lr=3e-4, schedule='cosine', warmup_steps=2000,
                                final_lr_fraction=0.1, b1=0.9, b2=0.95, weight_decay=0.1),
      mesh=MeshConfig(fsdp=64),
      checkpoints=CheckpointConfig(every=1000, snapshot_every=1000, snapshot_dtype='bfloat16'),
      evals=EvalConfig(every=500, n_batches=4))
