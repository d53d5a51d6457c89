"""TODO tune/demo."""
