"""Labels that move: kept, dropped and added by the evidence of a pass, and clips in which one label sounds alone."""
