"""TODO train/judges."""
