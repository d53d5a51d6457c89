"""Labels after a pass: its evidence, the rules by which labels move, and clips in which one label sounds alone."""
