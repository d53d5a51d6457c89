"""The built-in separator: queries, which are labels or text, and the network that separates by them.

Shape legend: B batch, T samples, L labels, Q query features, E features of an embedding.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.errors import nearest
from engine.schema import plain_label
from engine.separators.base import NetworkSeparator, small_tensor
from engine.separators.network import MaskNetwork, NetworkConfig
from engine.separators.network.graphs import replayed
from engine.separators.queries import Embeddings, Query, QueryEmbedder, label_of_query

BUILT_IN = "band_split_tcn"
"""Architecture of the project's own network, the only one that is trained here."""


class Vocabulary(nn.Module):
    """Labels with a row of a table each; labels can be added."""

    def __init__(self) -> None:
        super().__init__()
        self.labels: tuple[str, ...] = ()
        self._index: dict[str, int] = {}

    def _add(self, labels: Sequence[str]) -> list[str]:
        """Add the labels that are new, after the known ones, which keep their rows; returns the new ones."""
        if not labels and not self.labels:
            raise ValueError("a separator must have at least one label, got none; give it labelled clips")
        new = [label for label in dict.fromkeys(labels) if label not in self.labels]
        index = {plain_label(label): i for i, label in enumerate((*self.labels, *new))}
        if len(index) != len(self.labels) + len(new):
            names = sorted({*self.labels, *new})
            raise ValueError(f"labels must differ in more than case and underscores, got {names}; rename one")
        self.labels, self._index = (*self.labels, *new), index
        return new

    def index(self, query: str) -> int:
        """Row of a query's vector; an unknown label is a ``ValueError`` that names the nearest known one."""
        row = self._index.get(plain_label(query))
        if row is None:
            known = {plain_label(label): label for label in self.labels}
            near = difflib.get_close_matches(plain_label(query), known, n=1, cutoff=0.5)
            hint = nearest(known[near[0]] if near else query, self.labels)
            raise ValueError(f"there is no label {query!r} in the separator; {hint}")
        return row


class QueryEncoder(Vocabulary):
    """A closed vocabulary of labels, each with a learned vector ``[Q]``."""

    def __init__(self, labels: Sequence[str], query_features: int) -> None:
        super().__init__()
        self.vectors_LQ = nn.Parameter(torch.zeros(0, query_features))
        self.grow(labels)

    def grow(self, labels: Sequence[str]) -> None:
        """Add the labels that are new; known labels keep their row and their vector."""
        has_some = bool(self.labels)
        new = self._add(labels)
        fresh_LQ = torch.randn(len(new), self.vectors_LQ.shape[1], device=self.vectors_LQ.device)
        self.vectors_LQ = nn.Parameter(torch.cat([self.vectors_LQ.data, fresh_LQ]) if has_some else fresh_LQ)

    def forward(self, index_B: Tensor) -> Tensor:
        """Vectors ``[B, Q]`` of rows of the vocabulary."""
        return self.vectors_LQ[index_B]


class TextQueries(Vocabulary):
    """Queries in text: a learned projection of embeddings ``[E]``, and the embeddings of the labels of the training."""

    vectors_LE: Tensor

    def __init__(self, labels: Sequence[str], query_features: int, text_features: int) -> None:
        super().__init__()
        self.project = nn.Linear(text_features, query_features)
        if labels:
            self._add(labels)
        self.register_buffer("vectors_LE", torch.zeros(len(self.labels), text_features))

    def grow(self, embeddings: Embeddings) -> None:
        """Add the labels that are new, with their embeddings; known labels keep their row and their embedding."""
        new = set(self._add(embeddings.labels))
        rows = [row for row, label in enumerate(embeddings.labels) if label in new]
        self.vectors_LE = torch.cat([self.vectors_LE, embeddings.vectors_LE[rows].to(self.vectors_LE)])

    def forward(self, query: Tensor) -> Tensor:
        """Vectors ``[B, Q]`` of rows ``[B]`` of the vocabulary, or of embeddings ``[B, E]``."""
        vectors_BE = query if query.is_floating_point() else self.vectors_LE[query]
        projected_BQ: Tensor = self.project(vectors_BE * vectors_BE.shape[1] ** 0.5)  # entries of unit variance
        return projected_BQ


class QuerySeparator(NetworkSeparator):
    """The built-in :class:`~engine.separators.base.Separator`, of a network and queries: labels, or text."""

    architecture = BUILT_IN

    def __init__(self, config: NetworkConfig, labels: Sequence[str]) -> None:
        super().__init__()
        self.network = MaskNetwork(config)
        self.queries: QueryEncoder | TextQueries = (
            TextQueries(labels, config.query_features, config.text_features)
            if config.text_features
            else QueryEncoder(labels, config.query_features)
        )

    @property
    def config(self) -> NetworkConfig:
        return self.network.config

    @property
    def sample_rate_hz(self) -> int:  # type: ignore[override]
        return self.config.sample_rate_hz

    @property
    def labels(self) -> tuple[str, ...]:
        return self.queries.labels if self.embedder is None else self.embedder.labels

    def grow(self, labels: Sequence[str]) -> None:
        """Add the labels that are new; known labels keep their vector."""
        if isinstance(self.queries, QueryEncoder):
            self.queries.grow(labels)
        else:
            embeddings = self._embedder().embed_labels(labels)
            self._embedder().know(embeddings)
            self.queries.grow(embeddings)

    def encode(self, queries: Sequence[str | Query]) -> Tensor:
        """See :meth:`NetworkSeparator.encode`; without text, a query is a label of the vocabulary."""
        if isinstance(self.queries, QueryEncoder):
            rows = [self.queries.index(label_of_query(query)) for query in queries]
            given = small_tensor(rows, self.device)
        else:
            given = torch.stack([self._embedder().wanted(query) for query in queries]).to(self.device)
        vectors_BQ: Tensor = self.queries(given)
        return vectors_BQ

    def _embedder(self) -> QueryEmbedder:
        if self.embedder is None:
            raise ValueError(
                "a separator that reads text must have an encoder, got none; describe it when the separator is saved"
            )
        return self.embedder

    def separate_chunk(self, mix_MT: Tensor, query_BQ: Tensor, lengths: Sequence[int], rows: Sequence[int]) -> Tensor:
        """See :meth:`NetworkSeparator.separate_chunk`."""
        is_padded, is_shared = min(lengths) < mix_MT.shape[1], list(rows) != list(range(len(mix_MT)))
        lengths_M = small_tensor(lengths, self.device) if is_padded else None
        rows_B = small_tensor(rows, self.device) if is_shared else None
        if mix_MT.is_cuda and not is_padded and len(mix_MT) <= len(query_BQ) and not torch.is_grad_enabled():
            return replayed(self.network, mix_MT, query_BQ, rows_B)
        stems_BT: Tensor = self.network(mix_MT, query_BQ, lengths_M, rows_B)
        return stems_BT

    def forward(self, mix_BT: Tensor, query: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Stems ``[B, T]`` for rows of the vocabulary, or for embeddings of text; differentiable, in one chunk."""
        stems_BT: Tensor = self.network(mix_BT, self.queries(query), lengths_B)
        return stems_BT
