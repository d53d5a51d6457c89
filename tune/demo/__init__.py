"""A demo without a download: synthesised sounds, a corpus of mixtures of them, and settings for it."""
