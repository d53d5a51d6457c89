"""TODO engine/cli."""
