"""The protocol that every separator follows, the base of those that are networks, and overlap-add for any length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from engine.separators.queries import Query, QueryEmbedder


@runtime_checkable
class Separator(Protocol):
    """A query-conditioned separator; any object with these members can drive the engine.

    >>> class Half:
    ...     sample_rate_hz, labels = 8000, ("bell", "dog")
    ...
    ...     def separate(self, mix_BT, queries, *, lengths=None):
    ...         return 0.5 * mix_BT
    >>> isinstance(Half(), cs.Separator)
    True
    """

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the audio that it takes and returns."""

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that it knows."""

    def separate(
        self, mix_BT: Tensor, queries: Sequence[str | Query], *, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Stems ``[B, T]`` (float32) of mixtures ``[B, T]`` of any length, for one query per mixture.

        A query is a label, ClearSep's sentence for it ("The sound of dog bark"), or a :class:`Query`, which a separator
        gets only from callers that make one. Mixtures may be padded with zeros to a common length; ``lengths`` has the
        number of samples of each without padding. Mixtures may be in CPU memory whatever the separator's device is;
        stems may be on any device. Raises ``ValueError`` for an unknown label. A separator whose queries can name
        unwanted sounds says so by an attribute ``uses_unwanted``; a pass then names the other labels of each clip.
        """


class NetworkSeparator(nn.Module, ABC):
    """Base of the separators that are networks: checks mixtures, makes vectors of queries, joins chunks.

    A subclass defines ``architecture``, ``config``, ``sample_rate_hz``, :meth:`encode` and :meth:`separate_chunk`. It
    is made from its config and a list of labels, and its state dict is what a checkpoint stores.
    """

    architecture: str
    """Name of the network's code in ``separator.json``."""
    config: Any
    """Config object of the network's shape."""
    embedder: QueryEmbedder | None = None
    """Makes embeddings of queries; None for a closed vocabulary, or without one."""

    chunk_s, overlap_s = 12.0, 1.0
    """Longer mixtures are cut into chunks of this length, which overlap."""
    uses_unwanted = False
    """Queries can name sounds that the stem must not contain."""
    sample_rate_hz: int

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that it knows without an encoder."""
        return self.embedder.labels if self.embedder is not None else ()

    @abstractmethod
    def encode(self, queries: Sequence[str | Query]) -> Tensor:
        """Vectors ``[B, Q]`` of queries, on the network's device; ``ValueError`` for an unknown label."""

    @abstractmethod
    def separate_chunk(self, mix_BT: Tensor, query_BQ: Tensor, lengths_B: Tensor) -> Tensor:
        """Stems ``[B, T]`` of mixtures of one chunk's length at most, for vectors of queries."""

    def separate_unpadded(self, mix_BT: Tensor, query_BQ: Tensor) -> Tensor:
        """The same for mixtures without padding; torch can trace it, so that it can be exported."""
        return self.separate_chunk(mix_BT, query_BQ, torch.tensor([mix_BT.shape[1]] * len(mix_BT), device=self.device))

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @torch.inference_mode()
    def separate(
        self, mix_BT: Tensor, queries: Sequence[str | Query], *, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """See :meth:`Separator.separate`; mixtures longer than ``chunk_s`` are cut into chunks that overlap."""
        if isinstance(queries, str):
            raise ValueError(f"queries must be a list with one for each mixture, got {queries!r}; give a list")
        if mix_BT.ndim != 2 or len(mix_BT) != len(queries):
            raise ValueError(
                f"mixtures must have shape [B, T] for B queries, got {tuple(mix_BT.shape)} for {len(queries)} queries; "
                "give one query for each mixture"
            )
        if not torch.isfinite(mix_BT).all():
            raise ValueError("a mixture must be finite, got NaN or infinite samples; repair or drop the clip")
        if lengths and (len(lengths) != len(queries) or not all(0 <= one <= mix_BT.shape[1] for one in lengths)):
            raise ValueError(
                f"lengths must have for each mixture a number from 0 to {mix_BT.shape[1]}, got {list(lengths)}; leave "
                "them out for mixtures without padding"
            )
        if not queries:
            return torch.zeros_like(mix_BT, dtype=torch.float32, device=self.device)
        query_BQ = self.encode(queries)
        mix_BT = mix_BT.to(self.device, torch.float32)
        lengths_B = torch.tensor(lengths or [mix_BT.shape[1]] * len(queries), device=self.device, dtype=torch.long)
        if mix_BT.numel() == 0:
            return torch.zeros_like(mix_BT)
        return overlap_add(
            lambda chunk_BT, inside_B: self.separate_chunk(chunk_BT, query_BQ, inside_B),
            mix_BT,
            lengths_B,
            chunk_samples=round(self.chunk_s * self.sample_rate_hz),
            overlap_samples=round(self.overlap_s * self.sample_rate_hz),
        )


def overlap_add(
    separate: Callable[[Tensor, Tensor], Tensor],
    mix_BT: Tensor,
    lengths_B: Tensor,
    *,
    chunk_samples: int,
    overlap_samples: int,
) -> Tensor:
    """Separate chunk by chunk and cross-fade linearly where chunks overlap; a mixture that fits a chunk takes one call.

    ``separate`` takes a chunk ``[B, T]`` and the lengths ``[B]`` inside it. Memory is that of one chunk.
    The cuts of a mixture depend on its own length, not on its padding.
    """
    num_samples = mix_BT.shape[1]
    if num_samples <= chunk_samples:
        return separate(mix_BT, lengths_B)
    ramp_T = torch.linspace(0.0, 1.0, overlap_samples + 2, device=mix_BT.device)[1:-1]
    stems_BT = torch.zeros_like(mix_BT)
    for first in range(0, num_samples - overlap_samples, chunk_samples - overlap_samples):
        end = min(first + chunk_samples, num_samples)
        weight_BT = mix_BT.new_ones(len(mix_BT), end - first)
        if first:  # a mixture that ended in the previous chunk has no weight in this one
            weight_BT[:, :overlap_samples] = ramp_T
            weight_BT *= (lengths_B > first + overlap_samples)[:, None]
        continues_B = lengths_B > end
        weight_BT[continues_B, end - first - overlap_samples :] *= ramp_T.flip(0)
        chunk_BT = separate(mix_BT[:, first:end], (lengths_B - first).clamp(0, end - first))
        stems_BT[:, first:end] += chunk_BT * weight_BT
    return stems_BT
