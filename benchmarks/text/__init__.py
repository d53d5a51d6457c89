"""Quality on ESC-10: the loop, its thresholds, what a selection is worth, scores against the truth, a search."""
