"""Owns measurements of a model on held-out data and benchmarks."""
