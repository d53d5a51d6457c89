"""TODO train/evaluation."""
