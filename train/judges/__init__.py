"""Training of what scores are judged with: the SI-SDR estimator and the built-in tagger."""
