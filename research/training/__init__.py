"""The training loop, its compiled step, optimizers, checkpoints, snapshots and logs."""
