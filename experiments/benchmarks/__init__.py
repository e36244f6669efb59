"""Side-by-side measurements; unlike the rest of experiments/, code that is run itself.

  python -m experiments.benchmarks.train_step   training step against PyTorch and ordinary Flax
  python -m experiments.benchmarks.run_cost     what monitoring and saving cost a run
"""
