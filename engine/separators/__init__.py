"""Separators: what takes a mixture and a query and returns the stem, and how it is kept on disk."""

from engine.separators.base import Separator, overlap_add
from engine.separators.checkpoint import load, read_description, save
from engine.separators.model import QueryEncoder, QuerySeparator
from engine.separators.network import NetworkConfig

__all__ = [
    "NetworkConfig",
    "QueryEncoder",
    "QuerySeparator",
    "Separator",
    "load",
    "overlap_add",
    "read_description",
    "save",
]
