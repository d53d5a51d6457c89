"""Runs of several iterations: settings, inputs, schedule of thresholds, records, and the search for a schedule."""
