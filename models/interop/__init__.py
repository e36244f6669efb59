"""Owns checkpoints of Hugging Face: their configs, tensor names and layouts, both ways."""
