"""The protocol that every separator follows, and separation of any length by overlap-add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


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

    def separate(self, mix_BT: Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None) -> Tensor:
        """Stems ``[B, T]`` (float32) of mixtures ``[B, T]`` of any length, for one query per mixture.

        A query is a label or ClearSep's sentence for it, "The sound of dog bark". Mixtures may be padded with zeros to
        a common length; ``lengths`` has the number of samples of each without padding. Mixtures may be in CPU memory
        whatever the separator's device is; stems may be on any device. Raises ``ValueError`` for an unknown label.
        """


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
