"""Experiments on the content of stems: their true quality, and what a student makes of it."""
