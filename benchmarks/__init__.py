"""Benchmarks: every table of the README and of docs/results.md, each module with ``--help``."""
