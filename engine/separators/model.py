"""The built-in separator: a vocabulary of queries and the network that separates by them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.errors import nearest
from engine.schema import plain_label
from engine.separators.base import overlap_add
from engine.separators.network import MaskNetwork, NetworkConfig

_CHUNK_S, _OVERLAP_S = 12.0, 1.0  # of longer mixtures


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


class QuerySeparator(nn.Module):
    """The built-in :class:`~engine.separators.base.Separator`, of a network and a vocabulary."""

    def __init__(self, config: NetworkConfig, labels: Sequence[str]) -> None:
        super().__init__()
        self.network = MaskNetwork(config)
        self.queries = QueryEncoder(labels, config.query_features)

    @property
    def config(self) -> NetworkConfig:
        return self.network.config

    @property
    def sample_rate_hz(self) -> int:
        return self.config.sample_rate_hz

    @property
    def labels(self) -> tuple[str, ...]:
        return self.queries.labels

    def forward(self, mix_BT: Tensor, index_B: Tensor, lengths_B: Tensor | None = None) -> Tensor:
        """Stems ``[B, T]`` for rows of the vocabulary; differentiable, in one chunk."""
        stems_BT: Tensor = self.network(mix_BT, self.queries(index_B), lengths_B)
        return stems_BT

    @torch.inference_mode()
    def separate(self, mix_BT: Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None) -> Tensor:
        """See :meth:`Separator.separate`; mixtures longer than 12 s are cut into chunks that overlap by 1 s."""
        if mix_BT.ndim != 2 or len(mix_BT) != len(queries):
            raise ValueError(
                f"mixtures must have shape [B, T] for B queries, got {tuple(mix_BT.shape)} for {len(queries)} queries; "
                "give one query for each mixture"
            )
        if not torch.isfinite(mix_BT).all():
            raise ValueError("a mixture must be finite, got NaN or infinite samples; repair or drop the clip")
        device = self.queries.vectors_LQ.device
        index_B = torch.tensor([self.queries.index(query) for query in queries], device=device, dtype=torch.long)
        mix_BT = mix_BT.to(device, torch.float32)
        lengths_B = torch.tensor(lengths or [mix_BT.shape[1]] * len(queries), device=device, dtype=torch.long)
        if mix_BT.numel() == 0:
            return torch.zeros_like(mix_BT)
        return overlap_add(
            lambda chunk_BT, inside_B: self(chunk_BT, index_B, inside_B),
            mix_BT,
            lengths_B,
            chunk_samples=round(_CHUNK_S * self.sample_rate_hz),
            overlap_samples=round(_OVERLAP_S * self.sample_rate_hz),
        )
