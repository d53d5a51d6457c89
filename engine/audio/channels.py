"""Mixing a recording's channels to mono: by their mean, or by one channel where the mean would cancel the sound.

The first minute with sound decides, once for the complete file, so that every read of it has the same samples. In
windows of 0.5 s and bands of a third of an octave, the mean of channels that have nothing in common has the sum of
their energies, divided by the square of their number. A band is cancelled if the mean is 15 dB below that, as where one
channel has the sound of the other with its sign changed. If cancelled bands have a tenth of the energy in a tenth of
the windows with sound, the channel with the most energy is taken. Below 20 Hz nothing counts, so neither does a
constant offset. A channel for low-frequency effects is left out.

Shape legend: ``T`` samples, ``C`` channels, ``W`` windows, ``F`` frequencies, ``B`` bands.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from engine.errors import AudioError

if TYPE_CHECKING:
    from engine.audio.sndfile import Samples

_DECIDING_S = 60.0
_MOST_VALUES = 2**26  # in memory: of more than 20 channels at 48 kHz, less than a minute decides
_CANCELLATION_DB = -15.0
_MIN_CANCELLED_FRACTION = 0.1  # of a window's energy, and of the windows
_WINDOW_S = 0.5
_LOWEST_HZ = 20.0
_MIN_BAND_HZ = 40.0  # a narrower one has too few values: noise would cancel by chance
_ACTIVE_DB = -40.0  # a window with sound: relative to the loudest
_SILENCE = 2.0**-15  # peak that is taken for silence: the last bit of 16


class Downmix:
    """Mixes the channels of one recording."""

    def __init__(self, *, rate_hz: int, num_channels: int, lfe: Collection[int] = ()) -> None:
        self._rate_hz, self._num_channels = rate_hz, num_channels
        self._used = [number for number in range(num_channels) if number not in lfe] or list(range(num_channels))
        self.is_decided = len(self._used) == 1

    def mono(self, block_TC: Samples) -> Samples:
        """Mix a block; all channels of a block that has another number of them."""
        has_all = block_TC.shape[1] != self._num_channels or len(self._used) == self._num_channels
        used_TC = block_TC if has_all else block_TC[:, self._used]
        mono_T: Samples = used_TC[:, 0] if used_TC.shape[1] == 1 else used_TC.mean(axis=1, dtype=np.float32)
        return mono_T

    def mixed(self, blocks_TC: Iterable[Samples]) -> Iterator[Samples]:
        """Mix the blocks of a complete recording; decides on the way, unless that was done before."""
        blocks = iter(blocks_TC)
        yield from self._leading_silence(blocks)
        held, error = self._decide(blocks)
        yield from map(self.mono, held)
        if error is not None:
            raise error
        yield from map(self.mono, blocks)

    def decide(self, blocks_TC: Iterable[Samples]) -> None:
        """Decide by a recording's first blocks; takes no more of them than it needs, and none if it has decided."""
        if not self.is_decided:
            next((None for _ in self.mixed(blocks_TC) if self.is_decided), None)
            self.is_decided = True  # a recording without sound must not be read again to its end

    @property
    def used(self) -> tuple[int, ...]:
        """Numbers of the channels whose mean is the mixture."""
        return tuple(self._used)

    def _leading_silence(self, blocks: Iterator[Samples]) -> Iterator[Samples]:
        self._first: list[Samples] = []
        while not self.is_decided and (block_TC := next(blocks, None)) is not None:
            if len(block_TC) and np.ptp(block_TC, axis=0).max() > _SILENCE:
                self._first = [block_TC]
                break
            yield self.mono(block_TC)

    def _decide(self, blocks: Iterator[Samples]) -> tuple[list[Samples], AudioError | None]:
        """Decide by the next blocks, which are returned with the error that followed them."""
        held, error = self._first, None
        if self.is_decided or not held:
            return held, error
        most = min(round(_DECIDING_S * self._rate_hz), _MOST_VALUES // self._num_channels)
        missing = most - len(held[0])
        try:
            while missing > 0 and (block_TC := next(blocks, None)) is not None:
                held.append(block_TC)
                missing -= len(block_TC)
        except AudioError as caught:  # it must not cost the samples before it
            error = caught
        self.is_decided = True
        regular = [block_TC for block_TC in held if block_TC.shape[1] == self._num_channels]
        self._used = self._chosen(np.concatenate(regular)[:, self._used])
        return held, error

    def _chosen(self, samples_TC: Samples) -> list[int]:
        """Numbers of the channels to be used."""
        size = min(len(samples_TC), round(_WINDOW_S * self._rate_hz))
        starts = _band_starts(self._rate_hz, size)
        with np.errstate(all="ignore"):  # a decoder of a damaged file gives any value; NaN is below nothing
            spectra_CWF = [_spectra(one_T, size) for one_T in samples_TC.T]
            energies_CWB = np.stack([_band_energies(one_WF, starts) for one_WF in spectra_CWF])
            mean_WB = _band_energies(np.mean(spectra_CWF, axis=0, dtype=np.complex64), starts)
            total_WB = energies_CWB.sum(axis=0)
            expected_WB = total_WB / len(spectra_CWF) ** 2
            cancelled_WB = mean_WB < expected_WB * 10 ** (_CANCELLATION_DB / 10)
            total_W, lost_W = total_WB.sum(axis=1), (total_WB * cancelled_WB).sum(axis=1)
            active_W = (total_W > 0) & (total_W >= total_W.max() * 10 ** (_ACTIVE_DB / 10))
            losing_W = active_W & (lost_W >= _MIN_CANCELLED_FRACTION * total_W)
        if not losing_W.any() or losing_W.sum() < _MIN_CANCELLED_FRACTION * active_W.sum():
            return self._used
        return [self._used[int(energies_CWB.sum(axis=(1, 2)).argmax())]]


def _spectra(samples_T: Samples, size: int) -> NDArray[np.complex64]:
    windows_WT = samples_T[: len(samples_T) // size * size].reshape(-1, size)
    hann_T = np.hanning(size + 1)[:size].astype(np.float32)
    return np.fft.rfft((windows_WT - windows_WT.mean(axis=1, keepdims=True)) * hann_T).astype(np.complex64, copy=False)


def _band_energies(spectra_WF: NDArray[np.complex64], starts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Energy in each band ``[W, B]``."""
    squares_WF = np.square(spectra_WF.real) + np.square(spectra_WF.imag)
    energies_WB: NDArray[np.float64] = np.add.reduceat(squares_WF, starts, axis=1, dtype=np.float64)
    return energies_WB


def _band_starts(rate_hz: int, size: int) -> NDArray[np.int64]:
    """The first bin of each band."""
    edges_hz = [_LOWEST_HZ]
    while edges_hz[-1] < rate_hz / 2:
        edges_hz.append(edges_hz[-1] + max(_MIN_BAND_HZ, edges_hz[-1] * (2 ** (1 / 3) - 1)))
    starts = np.unique(np.ceil(np.array(edges_hz) * size / rate_hz).astype(np.int64))
    return starts[starts <= size // 2]
