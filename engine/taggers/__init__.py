"""Taggers: how much of each label is in a signal, independently of the separator that made the signal."""

from engine.taggers.base import Tagger, find_label, margin_db, rivals_of, tags_of
from engine.taggers.network import ShareTagger, TagNetworkConfig
from engine.taggers.tagger_source import TaggerSource, find_tagger, load_tagger, read_tagger, save_tagger

__all__ = [
    "ShareTagger",
    "TagNetworkConfig",
    "Tagger",
    "TaggerSource",
    "find_label",
    "find_tagger",
    "load_tagger",
    "margin_db",
    "read_tagger",
    "rivals_of",
    "save_tagger",
    "tags_of",
]
