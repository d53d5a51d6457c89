"""Across iterations: a run, its schedule of thresholds, and what came of it."""
