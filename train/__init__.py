"""Training: tracks and single-source clips in, a better separator out."""
