"""What every separator offers, and separation of any length by overlap-add."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@runtime_checkable
class Separator(Protocol):
    """A query-conditioned separator; any object with these members can drive the engine."""

    @property
    def sample_rate_hz(self) -> int:
        """Rate of the audio it takes and returns."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels it knows."""

    def separate(self, mix_BT: Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None) -> Tensor:
        """Stems ``[B, T]`` (float32) of mixtures ``[B, T]``, one query a row, any length.

        A query is a label or ClearSep's sentence for it, "The sound of dog bark". Rows may be padded with zeros to a
        common length; ``lengths`` says how many samples of each row are real. Mixtures may lie in the CPU's memory
        wherever the separator runs, stems on any device. Raises ``ValueError`` for an unknown label.
        """


def overlap_add(
    separate: Callable[[Tensor, Tensor], Tensor],
    mix_BT: Tensor,
    lengths_B: Tensor,
    *,
    chunk_samples: int,
    overlap_samples: int,
) -> Tensor:
    """Separate chunk by chunk, cross-fading linearly where chunks overlap; one call where the mixture fits in a chunk.

    ``separate`` takes a chunk ``[B, T]`` and the lengths ``[B]`` inside it. Memory is that of one chunk.
    Where a row is cut depends on its own length alone, not on its padding.
    """
    num_samples = mix_BT.shape[1]
    if num_samples <= chunk_samples:
        return separate(mix_BT, lengths_B)
    ramp_T = torch.linspace(0.0, 1.0, overlap_samples + 2, device=mix_BT.device)[1:-1]
    stems_BT = torch.zeros_like(mix_BT)
    for first in range(0, num_samples - overlap_samples, chunk_samples - overlap_samples):
        end = min(first + chunk_samples, num_samples)
        weight_BT = mix_BT.new_ones(len(mix_BT), end - first)
        if first:  # a row that ended in the chunk before takes nothing from this one
            weight_BT[:, :overlap_samples] = ramp_T
            weight_BT *= (lengths_B > first + overlap_samples)[:, None]
        goes_on_B = lengths_B > end
        weight_BT[goes_on_B, end - first - overlap_samples :] *= ramp_T.flip(0)
        chunk_BT = separate(mix_BT[:, first:end], (lengths_B - first).clamp(0, end - first))
        stems_BT[:, first:end] += chunk_BT * weight_BT
    return stems_BT
