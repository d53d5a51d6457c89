"""TODO engine/audio."""
