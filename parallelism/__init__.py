"""Placement: the mesh, the sharding table, start-up, hardware facts; compiled programs read."""
