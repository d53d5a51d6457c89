"""The stereo image: what a stem is in every channel of a recording, from the stem of the recording mixed to mono.

One complex mask for all channels, M = S conj(X) / |X|² of the mono stem S and the mono mixture X in every bin, limited
to |M| = 1, keeps level and phase differences of channels. What is left of the stem, S - M X (where a separator gives
more than the mixture has), is laid on the channels by their least-squares gains relative to the mixture in bands. So
the channels of a stem, mixed as those of the recording are, make the mono stem exactly, and equal channels stay equal.

Shape legend: ``T`` samples, ``C`` channels, ``Q`` queries, ``N`` frames, ``F`` bins, ``K`` bands.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_FRAME_S = 0.046
_HOPS = 4  # in a frame
_FRAMES_AT_ONCE = 32  # so that spectra stay in cache
_BAND_BINS = 8
_EPS = 1e-12  # of the mixture's power; 24-bit noise has more


class StereoImage:
    """Applies the mono stems of a recording to its channels, block by block; samples come out one frame later."""

    def __init__(self, *, sample_rate_hz: int, mono_channels: Sequence[int]) -> None:
        self._size = 2 ** max(4, round(math.log2(_FRAME_S * sample_rate_hz)))
        self._hop = self._size // _HOPS
        self._window_T = torch.hann_window(self._size).sqrt()
        self._mono = list(mono_channels)
        self._rest: list[Tensor] = []
        """Channels and stems that are not in a frame yet."""
        self._sums_QCT: Tensor | None = None
        """Frames that overlap with later ones."""
        self._num_in = self._num_out = 0

    def push(self, channels_CT: Tensor, stems_QT: Tensor) -> Iterator[Tensor]:
        """Yield stems ``[Q, C, T]`` for the next samples of the channels and of the mono stems."""
        self._num_in += channels_CT.shape[1]
        lead = self._size - self._hop
        before = self._rest or [channels_CT.new_zeros(len(channels_CT), lead), stems_QT.new_zeros(len(stems_QT), lead)]
        signals = [torch.cat([rest, new], dim=1) for rest, new in zip(before, (channels_CT, stems_QT), strict=True)]
        step = _FRAMES_AT_ONCE * self._hop
        position, num_frames = 0, (signals[0].shape[1] - lead) // self._hop
        while position < num_frames * self._hop:
            stop = min(position + step, num_frames * self._hop)
            yield self._next(*(one[:, position : stop + lead] for one in signals))
            position = stop
        self._rest = [one[:, position:].clone() for one in signals]

    def finish(self) -> Iterator[Tensor]:
        """Yield the rest."""
        wanted, channels, stems = self._num_in, *self._rest
        for block_QCT in self.push(*(one.new_zeros(len(one), self._size) for one in (channels, stems))):
            surplus = max(0, self._num_out - wanted)
            yield block_QCT[..., : max(0, block_QCT.shape[-1] - surplus)]

    def _next(self, channels_CT: Tensor, stems_QT: Tensor) -> Tensor:
        """The samples that a block's frames complete."""
        frames_QCNT = torch.fft.irfft(self._masked(self._spectra(channels_CT), self._spectra(stems_QT)), self._size) * (
            self._window_T * (2 / _HOPS)
        )
        size = frames_QCNT.shape[2] * self._hop
        sums_QCT = frames_QCNT.new_zeros(*frames_QCNT.shape[:2], size + self._size - self._hop)
        for number, part in enumerate(frames_QCNT.split(self._hop, dim=-1)):
            sums_QCT[..., number * self._hop :][..., :size] += part.flatten(2)
        lead = self._size - self._hop
        is_first = self._sums_QCT is None
        if self._sums_QCT is not None:
            sums_QCT[..., :lead] += self._sums_QCT
        self._sums_QCT = sums_QCT[..., size:].clone()
        done_QCT = sums_QCT[..., :size]
        return self._counted(done_QCT, is_first)

    def _counted(self, done_QCT: Tensor, is_first: bool) -> Tensor:
        """The samples without those before the recording's first."""
        if is_first:
            self._num_out = -(self._size - self._hop)
        begin = max(0, -self._num_out)
        self._num_out += done_QCT.shape[-1]
        return done_QCT[..., min(begin, done_QCT.shape[-1]) :]

    def _spectra(self, signals: Tensor) -> Tensor:
        spectra: Tensor = torch.fft.rfft(signals.unfold(-1, self._size, self._hop) * self._window_T)
        return spectra

    def _masked(self, channels_CNF: Tensor, stems_QNF: Tensor) -> Tensor:
        """Spectra ``[Q, C, N, F]`` of the stems in every channel.

        With P = |X|² and the limit l = min(1, 1/|M|), they are S (l conj(X) X_c / P + (1 - l) g_c) for the gain g_c.
        """
        mono_NF = channels_CNF[self._mono].mean(0)
        power_NF = _power(mono_NF)
        products_CNF = channels_CNF * mono_NF.conj()
        gains_CNF = self._gains(products_CNF, power_NF)
        over_NF = power_NF + _EPS
        size_QNF = (_power(stems_QNF) * power_NF).sqrt_()
        limit_QNF = torch.maximum(size_QNF, over_NF).reciprocal_()  # l / P
        left_QNF = (1.0 - limit_QNF * power_NF)[:, None]
        weights_QCNF = limit_QNF[:, None] * products_CNF + left_QNF * gains_CNF
        return weights_QCNF.mul_(stems_QNF[:, None])

    def _gains(self, products_CNF: Tensor, power_NF: Tensor) -> Tensor:
        """Least-squares gain of every channel relative to the mixture, by band; 1 without sound."""
        gain_CNK = (_bands(products_CNF) + _EPS) / (_bands(power_NF) + _EPS)
        gain_CNK = gain_CNK * (len(self._mono) / gain_CNK.abs().clamp(min=len(self._mono)))
        return gain_CNK.repeat_interleave(_BAND_BINS, dim=-1)[..., : power_NF.shape[-1]]


def _power(spectra: Tensor) -> Tensor:
    return spectra.real.square() + spectra.imag.square()


def _bands(bins: Tensor) -> Tensor:
    padded = torch.nn.functional.pad(bins, (0, -bins.shape[-1] % _BAND_BINS))
    return padded.view(*padded.shape[:-1], -1, _BAND_BINS).sum(-1)
