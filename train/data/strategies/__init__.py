"""Training options, one file each, off by default: Self-Remixing, which recipes use, and ablations, which lost."""
