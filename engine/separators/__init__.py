"""Separators: given a mixture and a query, a separator returns the stem; built-in network, checkpoints, batches."""

from engine.separators.base import Separator, overlap_add
from engine.separators.checkpoint import (
    QueryDescription,
    find_encoder,
    identity_of,
    load,
    make_embedder,
    open_checkpoint,
    query_embedder,
    read_description,
    require_fingerprint,
    save,
)
from engine.separators.model import QueryEncoder, QuerySeparator
from engine.separators.network import NetworkConfig
from engine.separators.queries import AudioExample, Embeddings, Query, QueryEmbedder, QueryPart
from engine.separators.separator_source import SeparatorFactory, SeparatorSource, find_separator, load_separator

__all__ = [
    "AudioExample",
    "Embeddings",
    "NetworkConfig",
    "Query",
    "QueryDescription",
    "QueryEmbedder",
    "QueryEncoder",
    "QueryPart",
    "QuerySeparator",
    "Separator",
    "SeparatorFactory",
    "SeparatorSource",
    "find_encoder",
    "find_separator",
    "identity_of",
    "load",
    "load_separator",
    "make_embedder",
    "open_checkpoint",
    "overlap_add",
    "query_embedder",
    "read_description",
    "require_fingerprint",
    "save",
]
