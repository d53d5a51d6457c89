"""Taggers: what says which labels a signal holds, independently of the separator that made it."""

from engine.storage.paths import Name, location
from engine.taggers.base import Tagger, find_label, margin_db, rivals_of
from engine.taggers.folder import load_tagger, read_tagger, save_tagger
from engine.taggers.network import ShareTagger, TagNetworkConfig

__all__ = [
    "ShareTagger",
    "TagNetworkConfig",
    "Tagger",
    "find_label",
    "load_tagger",
    "margin_db",
    "open_tagger",
    "read_tagger",
    "rivals_of",
    "save_tagger",
]


def open_tagger(folder: Name, device: str = "cpu") -> Tagger:
    """The tagger in a folder: the built-in one, or an audio classifier of Hugging Face's format."""
    if (location(folder) / "config.json").is_file():
        from engine.taggers.adapters import HuggingFaceTagger

        return HuggingFaceTagger(str(folder), device=device)
    return load_tagger(folder, device=device)
