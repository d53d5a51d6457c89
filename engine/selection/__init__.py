"""TODO engine/selection."""
