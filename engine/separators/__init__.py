"""Separators: given a mixture and a query, a separator returns the stem; built-in network, checkpoints, batches."""

from engine.separators.base import Separator, overlap_add
from engine.separators.checkpoint import load, open_checkpoint, read_description, require_fingerprint, save
from engine.separators.model import QueryEncoder, QuerySeparator
from engine.separators.network import NetworkConfig
from engine.separators.queries import AudioExample, Query
from engine.separators.separator_source import SeparatorFactory, SeparatorSource, find_separator, load_separator

__all__ = [
    "AudioExample",
    "NetworkConfig",
    "Query",
    "QueryEncoder",
    "QuerySeparator",
    "Separator",
    "SeparatorFactory",
    "SeparatorSource",
    "find_separator",
    "load",
    "load_separator",
    "open_checkpoint",
    "overlap_add",
    "read_description",
    "require_fingerprint",
    "save",
]
