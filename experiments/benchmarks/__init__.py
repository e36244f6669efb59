"""Side-by-side measurements; unlike the rest of experiments/, code that is run itself.

  python -m experiments.benchmarks.train_step   training step against PyTorch and ordinary Flax
  python -m experiments.benchmarks.run_cost     what monitoring and saving cost a run
  python -m experiments.benchmarks.dense_snapshots   what hundreds of snapshots cost
  python -m experiments.benchmarks.audit_faults   which damage the audit of checkpoints sees
  python -m experiments.benchmarks.attention    attention against dense JAX and PyTorch
  python -m experiments.benchmarks.decode       generation against recomputation and PyTorch
"""
