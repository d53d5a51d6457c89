"""TODO engine/scoring."""
