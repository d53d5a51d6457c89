"""Speed of a pass: what to expect of it, what is done, and what limits it."""
