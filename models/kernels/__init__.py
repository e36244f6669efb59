"""Attention over arrays behind one signature, `interface.Attention`: oracle, XLA and TPU kernels."""
