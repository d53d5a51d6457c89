"""CLAP: encoders that map text and audio to one space (Wu et al. 2023, arXiv 2211.06687)."""
