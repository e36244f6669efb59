"""The small-scale suite: text items generated here, for models of 1M to 1B parameters."""
