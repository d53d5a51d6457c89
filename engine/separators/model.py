"""The built-in separator: a vocabulary of queries and the network that separates by them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.errors import nearest
from engine.schema import plain_label
from engine.separators.base import NetworkSeparator
from engine.separators.network import MaskNetwork, NetworkConfig
from engine.separators.queries import Query, label_of_query

BUILT_IN = "band_split_tcn"
"""Architecture of the project's own network, the only one that is trained here."""


class QueryEncoder(nn.Module):
    """A vocabulary of labels, each with a learned vector ``[Q]``; labels can be added."""

    def __init__(self, labels: Sequence[str], query_features: int) -> None:
        super().__init__()
        self.labels: tuple[str, ...] = ()
        self.vectors_LQ = nn.Parameter(torch.zeros(0, query_features))
        self.grow(labels)

    def grow(self, labels: Sequence[str]) -> None:
        """Add the labels that are new; known labels keep their row and their vector."""
        if not labels and not self.labels:
            raise ValueError("a separator must have at least one label, got none; give it labelled clips")
        new = [label for label in dict.fromkeys(labels) if label not in self.labels]
        index = {plain_label(label): i for i, label in enumerate((*self.labels, *new))}
        if len(index) != len(self.labels) + len(new):
            names = sorted({*self.labels, *new})
            raise ValueError(f"labels must differ in more than case and underscores, got {names}; rename one")
        fresh_LQ = torch.randn(len(new), self.vectors_LQ.shape[1], device=self.vectors_LQ.device)
        vectors_LQ = torch.cat([self.vectors_LQ.data, fresh_LQ]) if self.labels else fresh_LQ
        self.vectors_LQ = nn.Parameter(vectors_LQ)
        self.labels, self._index = (*self.labels, *new), index

    def index(self, query: str) -> int:
        """Row of a query's vector; an unknown label is a ``ValueError`` that names the nearest known one."""
        row = self._index.get(plain_label(query))
        if row is None:
            known = {plain_label(label): label for label in self.labels}
            near = difflib.get_close_matches(plain_label(query), known, n=1, cutoff=0.5)
            hint = nearest(known[near[0]] if near else query, self.labels)
            raise ValueError(f"there is no label {query!r} in the separator; {hint}")
        return row

    def forward(self, index_B: Tensor) -> Tensor:
        """Vectors ``[B, Q]`` of rows of the vocabulary."""
        return self.vectors_LQ[index_B]


class QuerySeparator(NetworkSeparator):
    """The built-in :class:`~engine.separators.base.Separator`, of a network and a vocabulary."""

    architecture = BUILT_IN

    def __init__(self, config: NetworkConfig, labels: Sequence[str]) -> None:
        super().__init__()
        self.network = MaskNetwork(config)
        self.queries = QueryEncoder(labels, config.query_features)

    @property
    def config(self) -> NetworkConfig:
        return self.network.config

    @property
    def sample_rate_hz(self) -> int:  # type: ignore[override]
        return self.config.sample_rate_hz

    @property
    def labels(self) -> tuple[str, ...]:
        return self.queries.labels

    def encode(self, queries: Sequence[str | Query]) -> Tensor:
        """See :meth:`NetworkSeparator.encode`; a query is a label of the vocabulary."""
        rows = [self.queries.index(label_of_query(query)) for query in queries]
        vectors_BQ: Tensor = self.queries(torch.tensor(rows, device=self.device, dtype=torch.long))
        return vectors_BQ

    def separate_chunk(self, mix_BT: Tensor, query_BQ: Tensor, lengths_B: Tensor) -> Tensor:
        """See :meth:`NetworkSeparator.separate_chunk`."""
        stems_BT: Tensor = self.network(mix_BT, query_BQ, lengths_B)
        return stems_BT

    def forward(self, mix_BT: Tensor, index_B: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Stems ``[B, T]`` for rows of the vocabulary; differentiable, in one chunk."""
        stems_BT: Tensor = self.network(mix_BT, self.queries(index_B), lengths_B)
        return stems_BT
