"""What happened along a trajectory, and what happens when it is run again, with other data too."""
