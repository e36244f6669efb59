"""Placement: the mesh, the sharding table, multi-host start-up and hardware facts."""
