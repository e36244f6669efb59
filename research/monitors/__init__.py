"""Monitors: items with rival answers, scored by log-probability at every snapshot."""
