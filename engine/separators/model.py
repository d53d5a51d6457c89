"""The built-in separator: queries, which are labels or text, and the network that separates by them.

A query can name rivals: the sounds that its stem must not contain. Source separation with the classes of all sources
known gains about 1 dB over that without (Tzinis et al. 2019, arXiv 1911.07951); CLAPSep's negative queries (arXiv
2402.17455) do the same.

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
from engine.separators.queries import Embeddings, Query, QueryEmbedder, label_of_query, unwanted_labels

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
    """A closed vocabulary of labels, each with a learned vector ``[Q]`` as a target and one as a rival."""

    def __init__(self, labels: Sequence[str], query_features: int) -> None:
        super().__init__()
        self.vectors_LQ = nn.Parameter(torch.zeros(0, query_features))
        self.rivals_LQ = nn.Parameter(torch.zeros(0, query_features))
        self.grow(labels)

    @property
    def knows_rivals(self) -> bool:
        """True if some training named rivals."""
        return bool(self.rivals_LQ.any())

    def grow(self, labels: Sequence[str]) -> None:
        """Add the labels that are new; known labels keep their row and their vectors."""
        has_some = bool(self.labels)
        new = self._add(labels)
        fresh_LQ = torch.randn(len(new), self.vectors_LQ.shape[1], device=self.vectors_LQ.device)
        self.vectors_LQ = nn.Parameter(torch.cat([self.vectors_LQ.data, fresh_LQ]) if has_some else fresh_LQ)
        none_LQ = torch.zeros(len(new), self.rivals_LQ.shape[1], device=self.rivals_LQ.device)
        self.rivals_LQ = nn.Parameter(torch.cat([self.rivals_LQ.data, none_LQ]) if has_some else none_LQ)

    def forward(self, index_B: Tensor, rivals_BL: Tensor) -> Tensor:
        """Vectors ``[B, Q]`` of rows of the vocabulary, with a 1 for each of their rivals."""
        return self.vectors_LQ[index_B] + rivals_BL @ self.rivals_LQ


class TextQueries(Vocabulary):
    """Queries in text: learned projections of embeddings ``[E]``, and the embeddings of the labels of the training."""

    vectors_LE: Tensor

    def __init__(self, labels: Sequence[str], query_features: int, text_features: int) -> None:
        super().__init__()
        self.project = nn.Linear(text_features, query_features)
        self.project_rivals = nn.Linear(text_features, query_features, bias=False)
        self.project_rivals.weight = nn.Parameter(torch.zeros(query_features, text_features))
        if labels:
            self._add(labels)
        self.register_buffer("vectors_LE", torch.zeros(len(self.labels), text_features))

    def grow(self, embeddings: Embeddings) -> None:
        """Add the labels that are new, with their embeddings; known labels keep their row and their embedding."""
        new = set(self._add(embeddings.labels))
        rows = [row for row, label in enumerate(embeddings.labels) if label in new]
        self.vectors_LE = torch.cat([self.vectors_LE, embeddings.vectors_LE[rows].to(self.vectors_LE)])

    @property
    def knows_rivals(self) -> bool:
        """True if some training named rivals."""
        return bool(self.project_rivals.weight.any())

    def forward(self, query: Tensor, rivals_BE: Tensor) -> Tensor:
        """Vectors ``[B, Q]`` of rows ``[B]`` of the vocabulary, or of embeddings ``[B, E]``, and of their rivals."""
        vectors_BE = query if query.is_floating_point() else self.vectors_LE[query]
        scale = vectors_BE.shape[1] ** 0.5  # entries of unit variance
        projected_BQ: Tensor = self.project(vectors_BE * scale) + self.project_rivals(rivals_BE * scale)
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

    @property
    def uses_unwanted(self) -> bool:  # type: ignore[override]
        """True if a training named the rivals of its queries."""
        return self.queries.knows_rivals

    def grow(self, labels: Sequence[str]) -> None:
        """Add the labels that are new; known labels keep their vector."""
        if isinstance(self.queries, QueryEncoder):
            self.queries.grow(labels)
        else:
            embeddings = self._embedder().embed_labels(labels)
            self._embedder().know(embeddings)
            self.queries.grow(embeddings)

    def encode(self, queries: Sequence[str | Query]) -> Tensor:
        """See :meth:`NetworkSeparator.encode`; without text, each sound of a query is a label of the vocabulary."""
        if isinstance(self.queries, QueryEncoder):
            rows = [self.queries.index(label_of_query(query)) for query in queries]
            given = small_tensor(rows, self.device)
            named = [(row, one) for row, query in enumerate(queries) for one in unwanted_labels(query)]
            rivals = torch.zeros(len(queries), len(self.queries.labels), device=self.device)
            places = ([row for row, _ in named], [self.queries.index(label) for _, label in named])
            rivals[tuple(small_tensor(one, self.device) for one in places)] = 1.0
        else:
            given = torch.stack([self._embedder().wanted(query) for query in queries]).to(self.device)
            unwanted = [self._embedder().unwanted(query) for query in queries]
            nothing_E = torch.zeros(given.shape[1])
            rivals = torch.stack([nothing_E if one_E is None else one_E for one_E in unwanted]).to(self.device)
        vectors_BQ: Tensor = self.queries(given, rivals)
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

    def forward(self, mix_BT: Tensor, query: Tensor, rivals: Tensor) -> Tensor:
        """Stems ``[B, T]``, differentiable, in one chunk.

        Queries are rows of the vocabulary ``[B]`` with ones for their rivals ``[B, L]``, or embeddings of text ``[B,
        E]`` with those of their rivals ``[B, E]``, which are zeros if none is named.
        """
        stems_BT: Tensor = self.network(mix_BT, self.queries(query, rivals))
        return stems_BT
