"""Owns what a run is fed: sources, tokenizers, packing, mixtures, and batches by step number."""
