"""What happened along a trajectory: accuracy curves, swings between modes, control gates."""
