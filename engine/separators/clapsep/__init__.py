"""CLAPSep: CLAP's audio encoder, and a decoder that masks what a pair of embeddings describes (arXiv 2402.17455)."""

from engine.separators.clapsep.layout import from_original, recognises
from engine.separators.clapsep.network import ClapSepConfig
from engine.separators.clapsep.separator import ClapSep

__all__ = ["ClapSep", "ClapSepConfig", "from_original", "recognises"]
