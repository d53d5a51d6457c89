"""The stems of one recording as a stream of blocks, in memory that does not depend on its length.

Shape legend: ``T`` samples, ``C`` channels, ``Q`` queries.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import numpy as np
import soxr
import torch
from torch import Tensor

from engine.audio.decode import ChannelBlock
from engine.audio.sndfile import Samples
from engine.files.image import StereoImage
from engine.files.queues import SampleQueue
from engine.files.windows import WindowedSeparator
from engine.separators import Query, Separator

_GPU_BATCH_S = 80.0  # a batch is no faster on a CPU, and takes memory
_MAX_WAITING = 1 << 26  # values of all channels that wait for a batch
OnStems = Callable[[Samples, Samples], None]
"""Takes the mixture ``[T]`` and its undivided stems ``[Q, T]`` at the separator's rate."""


def separated_blocks(
    blocks: Iterable[ChannelBlock],
    separator: Separator,
    queries: Sequence[str | Query],
    *,
    divides: bool = False,
    device: str = "cpu",
    on_stems: OnStems = lambda mix_T, stems_QT: None,
) -> Generator[tuple[Samples, Samples], None, None]:
    """Yield the recording ``[C, T]`` and its stems ``[Q, C, T]``, at the recording's rate and with all its samples.

    ``divides``: the recording is divided among the stems.
    """
    stream: _Stream | None = None
    for block in blocks:
        if stream is None:
            stream = _Stream(block, separator, queries, divides, device, on_stems)
        yield from stream.push(block)
    if stream is not None:
        yield from stream.finish()


class _Stream:
    """Mixes to mono, resamples, separates, resamples back, and applies the stems to the channels."""

    def __init__(
        self,
        first: ChannelBlock,
        separator: Separator,
        queries: Sequence[str | Query],
        divides: bool,
        device: str,
        on_stems: OnStems,
    ) -> None:
        rate, num_channels = first.sample_rate_hz, first.samples_TC.shape[1]
        batch_s = min(_GPU_BATCH_S, _MAX_WAITING / (rate * num_channels)) if device == "cuda" else 0.0
        self._windows = WindowedSeparator(separator, queries, divides=divides, batch_s=batch_s, device=device)
        self._to_separator = _resampler(rate, separator.sample_rate_hz, 1)
        self._to_file = _resampler(separator.sample_rate_hz, rate, len(queries))
        self._image = StereoImage(sample_rate_hz=rate, mono_channels=first.mono_channels) if num_channels > 1 else None
        self._on_stems = on_stems
        self._channels, self._stems = SampleQueue(num_channels), SampleQueue(len(queries))
        self._applied = SampleQueue(num_channels)
        """Channels whose stems are not out yet, for the image gives its samples later."""
        self._num_samples = self._num_stems = 0

    def push(self, block: ChannelBlock) -> Iterator[tuple[Samples, Samples]]:
        self._num_samples += len(block.samples_TC)
        self._channels.append(block.samples_TC.T)
        for mix_T, stems_QT in self._windows.push(self._to_separator(block.mono_T[:, None], False)[:, 0]):
            yield from self._resampled(mix_T, stems_QT)

    def finish(self) -> Iterator[tuple[Samples, Samples]]:
        rest_T = self._to_separator(np.zeros((0, 1), np.float32), True)[:, 0]
        for windows in (self._windows.push(rest_T), self._windows.finish()):
            for mix_T, stems_QT in windows:
                yield from self._resampled(mix_T, stems_QT)
        last_TQ = self._to_file(np.zeros((0, self._stems.num_rows), np.float32), True)
        missing = self._num_samples - self._num_stems - len(last_TQ)
        last_TQ = np.pad(last_TQ, ((0, max(0, missing)), (0, 0)))[: self._num_samples - self._num_stems]
        yield from self._ready(last_TQ)
        if self._image is not None:
            yield from map(self._aligned, self._image.finish())

    def _resampled(self, mix_T: Samples, stems_QT: Samples) -> Iterator[tuple[Samples, Samples]]:
        num_stems = self._stems.num_rows
        self._on_stems(mix_T, stems_QT[-num_stems:])  # scores are of stems before the division
        yield from self._ready(self._to_file(np.ascontiguousarray(stems_QT[:num_stems].T), False))

    def _ready(self, stems_TQ: Samples) -> Iterator[tuple[Samples, Samples]]:
        """The samples of which there are both channels and stems."""
        self._num_stems += len(stems_TQ)
        self._stems.append(stems_TQ.T)
        size = min(self._channels.size, self._stems.size)
        if not size:
            return
        channels_CT, stems_QT = self._channels.take(size), self._stems.take(size)
        if self._image is None:
            yield channels_CT, stems_QT[:, None]
            return
        self._applied.append(channels_CT)
        blocks = self._image.push(torch.from_numpy(channels_CT), torch.from_numpy(stems_QT))
        yield from map(self._aligned, blocks)

    def _aligned(self, stems_QCT: Tensor) -> tuple[Samples, Samples]:
        return self._applied.take(stems_QCT.shape[-1]), stems_QCT.numpy()


def _resampler(rate_hz: int, target_hz: int, num_rows: int) -> Callable[[Samples, bool], Samples]:
    """Resamples blocks ``[T, R]`` of a stream; the last call is with true."""
    if rate_hz == target_hz:
        return lambda block_TR, is_last: block_TR
    stream = soxr.ResampleStream(rate_hz, target_hz, num_rows, dtype="float32", quality="HQ")
    return lambda block_TR, is_last: stream.resample_chunk(block_TR, last=is_last)
