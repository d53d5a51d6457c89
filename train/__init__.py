"""One distillation: tracks and single-source clips in, a better separator out."""
