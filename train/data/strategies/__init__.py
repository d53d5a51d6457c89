"""Ablations: training options that did not help (``benchmarks/quality/gain.md``), one file each, off by default."""
