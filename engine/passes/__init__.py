"""TODO engine/passes."""
