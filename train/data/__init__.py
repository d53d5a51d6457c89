"""TODO train/data."""
