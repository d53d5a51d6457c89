"""Separators with a known answer, and recordings for them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from scipy.signal import fftconvolve, firwin
from torch import Tensor

from engine.audio.decode import ChannelBlock
from engine.files.stream import separated_blocks


class BandPass:
    """Returns the band of a label: ``low`` is below 1 kHz, ``high`` above, ``all`` everything, ``nothing`` silence."""

    labels = ("low", "high", "all", "nothing")
    fingerprint = "band-pass"

    def __init__(self, sample_rate_hz: int = 8000) -> None:
        self.sample_rate_hz = sample_rate_hz
        self.filter_T = firwin(513, 1000, fs=sample_rate_hz).astype(np.float32)

    def separate(self, mix_BT: Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None) -> Tensor:
        """The same samples whatever is before or after the filter's reach."""
        unknown = [query for query in queries if query not in self.labels]
        if unknown:
            raise ValueError(f"there is no label {unknown[0]!r}; give one of {self.labels}")
        if not mix_BT.shape[1]:
            return mix_BT
        low_BT = torch.from_numpy(fftconvolve(mix_BT.numpy(), self.filter_T[None], axes=1)[:, 256:-256])
        answers = {"low": low_BT, "high": mix_BT - low_BT, "all": mix_BT, "nothing": 0 * mix_BT}
        return torch.stack([answers[query][row] for row, query in enumerate(queries)])


def open_band_pass(device: str) -> BandPass:
    """A factory."""
    return BandPass()


def as_blocks(samples_CT: np.ndarray, rate_hz: int, *, size: int = 100_000) -> Iterator[ChannelBlock]:
    """A recording whose channels' mean is its mixture, in blocks."""
    used = tuple(range(len(samples_CT)))
    for first in range(0, samples_CT.shape[1], size):
        block_TC = samples_CT.T[first : first + size].astype(np.float32)
        yield ChannelBlock(samples_TC=block_TC, sample_rate_hz=rate_hz, mono_channels=used)


def stems_of(
    samples_CT: np.ndarray, separator: object, queries: Sequence[str], *, rate_hz: int, size: int = 100_000
) -> np.ndarray:
    """Stems ``[Q, C, T]`` of a recording that is streamed; the recording must come out unchanged."""
    parts = list(separated_blocks(as_blocks(samples_CT, rate_hz, size=size), separator, queries))
    assert np.array_equal(np.concatenate([one for one, _ in parts], axis=1), samples_CT.astype(np.float32))
    return np.concatenate([one for _, one in parts], axis=2)


def snr_db(estimate: np.ndarray, reference: np.ndarray) -> float:
    """Signal-to-noise ratio of arrays."""
    noise = np.sum(np.square(estimate - reference, dtype=np.float64))
    return float(10 * np.log10(np.sum(np.square(reference, dtype=np.float64)) / max(noise, 1e-30)))
