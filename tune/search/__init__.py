"""TODO tune/search."""
