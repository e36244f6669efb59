"""What is done to a model after pretraining."""
