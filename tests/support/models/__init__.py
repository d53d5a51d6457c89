"""Checkpoints in the original layouts and in ours, with random weights, for tests."""
