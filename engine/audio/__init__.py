"""Decode recordings safely, store stems as FLAC and measure levels."""
