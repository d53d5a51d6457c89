"""TODO engine/corpus."""
