"""The protocol that every separator follows, the base of those that are networks, and overlap-add for any length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
        unwanted sounds says so by an attribute ``uses_unwanted``; a pass then names the other labels of each clip. One
        whose method takes ``rows``, the number of each query's mixture, says so by an attribute ``shares_mixtures``: it
        then gets each mixture once, on its device, and a length for each.
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
    shares_mixtures = True
    """:meth:`separate` takes ``rows``, so that the queries of a mixture share what no query changes."""
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
    def separate_chunk(self, mix_MT: Tensor, query_BQ: Tensor, lengths: Sequence[int], rows: Sequence[int]) -> Tensor:
        """Stems ``[B, T]`` of mixtures of one chunk's length at most, for vectors of queries.

        Mixture ``rows[b]`` is that of query ``b``; ``lengths`` are the mixtures' without padding.
        """

    def separate_unpadded(self, mix_BT: Tensor, query_BQ: Tensor) -> Tensor:
        """The same for one mixture a query without padding; torch can trace it, so that it can be exported."""
        return self.separate_chunk(mix_BT, query_BQ, [mix_BT.shape[1]] * len(mix_BT), range(len(mix_BT)))

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self.parameters()).device

    @torch.inference_mode()
    def separate(
        self,
        mix_MT: Tensor,
        queries: Sequence[str | Query],
        *,
        lengths: Sequence[int] | None = None,
        rows: Sequence[int] | None = None,
    ) -> Tensor:
        """See :meth:`Separator.separate`; mixtures longer than ``chunk_s`` are cut into chunks that overlap.

        With ``rows``, query ``b`` is for mixture ``rows[b]``, so that several queries can share one.
        """
        _require_rows(mix_MT, queries, lengths, rows)
        if not queries:
            return torch.zeros(0, mix_MT.shape[1], device=self.device)
        rows = range(len(queries)) if rows is None else rows
        lengths = [mix_MT.shape[1]] * len(mix_MT) if lengths is None else lengths
        mix_MT = mix_MT.to(self.device, torch.float32, non_blocking=self.device.type == "cuda")
        is_finite = mix_MT.isfinite().all()
        query_BQ = self.encode(queries)
        if not mix_MT.numel():
            return mix_MT.new_zeros(len(queries), mix_MT.shape[1])
        with _full_precision():
            stems_BT = overlap_add(
                lambda chunk_MT, inside: self.separate_chunk(chunk_MT, query_BQ, inside, rows),
                mix_MT,
                lengths,
                rows,
                chunk_samples=round(self.chunk_s * self.sample_rate_hz),
                overlap_samples=round(self.overlap_s * self.sample_rate_hz),
            )
        if not is_finite:  # looked at last, because a GPU must first have computed it
            raise ValueError("a mixture must be finite, got NaN or infinite samples; repair or drop the clip")
        return stems_BT


@contextmanager
def _full_precision() -> Iterator[None]:
    """Let convolutions in 32 bits be so on a GPU too, where cuDNN would round their inputs to 19 (TF32)."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _require_rows(
    mix_MT: Tensor, queries: Sequence[str | Query], lengths: Sequence[int] | None, rows: Sequence[int] | None
) -> None:
    if isinstance(queries, str):
        raise ValueError(f"queries must be a list with one for each mixture, got {queries!r}; give a list")
    if mix_MT.ndim != 2 or (rows is None and len(mix_MT) != len(queries)):
        raise ValueError(
            f"mixtures must have shape [B, T] for B queries, got {tuple(mix_MT.shape)} for {len(queries)} queries; "
            "give one query for each mixture"
        )
    if rows is not None and (len(rows) != len(queries) or not all(0 <= row < len(mix_MT) for row in rows)):
        raise ValueError(
            f"rows must have for each of {len(queries)} queries the number of one of {len(mix_MT)} mixtures, got "
            f"{list(rows)}; leave them out for one query for each mixture"
        )
    if lengths is not None and (len(lengths) != len(mix_MT) or not all(0 <= one <= mix_MT.shape[1] for one in lengths)):
        raise ValueError(
            f"lengths must have for each mixture a number from 0 to {mix_MT.shape[1]}, got {list(lengths)}; leave "
            "them out for mixtures without padding"
        )


def small_tensor(values: Sequence[int], device: torch.device | str) -> Tensor:
    """Numbers as a tensor, without waiting for a GPU."""
    is_pinned = torch.device(device).type == "cuda"
    return torch.tensor(values, dtype=torch.long, pin_memory=is_pinned).to(device, non_blocking=True)


def padded_rows(signals: Sequence[Tensor], device: torch.device | str) -> Tensor:
    """Signals ``[T]`` as the rows of a tensor on a device, with zeros after the short ones."""
    if torch.device(device).type == "cuda" and not any(signal_T.is_cuda for signal_T in signals):
        rows_BT = torch.zeros(len(signals), max(map(len, signals)), pin_memory=True)
        for row_T, signal_T in zip(rows_BT, signals, strict=True):
            row_T[: len(signal_T)] = signal_T
        return rows_BT.to(device, non_blocking=True)
    return torch.nn.utils.rnn.pad_sequence([signal_T.to(device) for signal_T in signals], batch_first=True)


def overlap_add(
    separate: Callable[[Tensor, list[int]], Tensor],
    mix_MT: Tensor,
    lengths: Sequence[int],
    rows: Sequence[int],
    *,
    chunk_samples: int,
    overlap_samples: int,
) -> Tensor:
    """Separate chunk by chunk and cross-fade linearly where chunks overlap; a mixture that fits a chunk takes one call.

    ``separate`` takes a chunk ``[M, T]`` and the lengths inside it, and gives stems ``[B, T]`` of mixtures ``rows``.
    Memory is that of one chunk. The cuts of a mixture depend on its own length, not on its padding.
    """
    num_samples = mix_MT.shape[1]
    if num_samples <= chunk_samples:
        return separate(mix_MT, list(lengths))
    ramp_T = torch.linspace(0.0, 1.0, overlap_samples + 2, device=mix_MT.device)[1:-1]
    lengths_B1 = small_tensor([lengths[row] for row in rows], mix_MT.device)[:, None]
    stems_BT = mix_MT.new_zeros(len(rows), num_samples)
    for first in range(0, num_samples - overlap_samples, chunk_samples - overlap_samples):
        end = min(first + chunk_samples, num_samples)
        weight_BT = mix_MT.new_ones(len(rows), end - first)
        if first:  # a mixture that ended in the previous chunk has no weight in this one
            weight_BT[:, :overlap_samples] = ramp_T
            weight_BT *= lengths_B1 > first + overlap_samples
        fading_BT = weight_BT[:, end - first - overlap_samples :]
        fading_BT *= torch.where(lengths_B1 > end, ramp_T.flip(0), 1.0)
        chunk_BT = separate(mix_MT[:, first:end], [min(max(one - first, 0), end - first) for one in lengths])
        stems_BT[:, first:end] += chunk_BT * weight_BT
    return stems_BT
