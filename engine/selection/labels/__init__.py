"""Labels after a pass: the evidence that it stored of every clip, and the single events among its clips."""
