"""CLAPSep: CLAP's audio encoder, and a decoder that masks what a pair of embeddings describes (arXiv 2402.17455)."""

from engine.separators.clapsep.network import ClapSepConfig as ClapSepConfig
from engine.separators.clapsep.separator import ClapSep as ClapSep
