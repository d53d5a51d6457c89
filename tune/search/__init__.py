"""The search for the best schedule of thresholds with Ray Tune: space, trials, stages, verdict and report."""
