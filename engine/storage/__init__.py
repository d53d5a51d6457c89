"""TODO engine/storage."""
