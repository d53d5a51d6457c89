"""Scale: memory by corpus size, several nodes, what limits many GPUs, and what the trials of a search share."""
