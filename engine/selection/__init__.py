"""Selection of tracks: thresholds over the stored scores of a pass decide which stems are kept for training."""
