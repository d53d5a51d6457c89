"""Evaluation of separators: seeded mixtures, published mixture lists, and the figures reported for both."""
