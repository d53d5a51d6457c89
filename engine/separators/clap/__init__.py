"""CLAP: encoders that map text and audio to one space (Wu et al. 2023, arXiv 2211.06687)."""

from engine.separators.clap.encoder import Clap, ClapConfig
from engine.separators.clap.folder import open_clap, read_clap, save_clap
from engine.separators.clap.tokenizer import find_tokenizer

__all__ = ["Clap", "ClapConfig", "find_tokenizer", "open_clap", "read_clap", "save_clap"]
