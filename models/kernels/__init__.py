"""Attention over arrays behind one signature, `interface.Attention`."""
