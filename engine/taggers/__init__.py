"""Taggers: what says which labels a signal holds, independently of the separator that made it."""

from engine.taggers.base import Tagger, find_label, margin_db, rivals_of
from engine.taggers.checkpoint import load_tagger, read_tagger, save_tagger
from engine.taggers.network import ShareTagger, TagNetworkConfig

__all__ = [
    "ShareTagger",
    "TagNetworkConfig",
    "Tagger",
    "find_label",
    "load_tagger",
    "margin_db",
    "read_tagger",
    "rivals_of",
    "save_tagger",
]
