"""One pass over a corpus: clips in, scored stems, tracks and failures out."""
