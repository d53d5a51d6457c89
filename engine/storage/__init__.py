"""Files that are written completely or not at all, locally and in S3, with retries, locks and fingerprints."""
