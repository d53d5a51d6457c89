"""Audio read with FFmpeg, through PyAV (M4A, MP4, WebM, raw AAC and more).

Shape legend: ``T`` samples, ``C`` channels.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np

from engine.audio.channels import Downmix
from engine.audio.sndfile import AudioSource, Samples
from engine.errors import AudioError

_PREROLL_S = 0.5  # decoded and dropped before a segment: AAC and Opus need up to 80 ms
_UNTIMED = frozenset({"aac", "mp3"})  # raw streams: FFmpeg guesses their length and seeks inexactly
_FORMATS = "mov,matroska,ogg,aac,mp3,flac,wav,w64,aiff,au,caf,asf,avi,flv,mpegts,mpeg,amr,ape,wv,ac3"


class AvReader:
    """Reads a file as mono blocks; positions count from the first decoded sample. Raises AudioError and FFmpegError."""

    def __init__(self, source: AudioSource) -> None:
        self._is_path = isinstance(source, (str, os.PathLike))
        self._file: Any = Path(source).open("rb") if isinstance(source, (str, os.PathLike)) else source
        try:
            self._measure()
        except BaseException:
            self.close()
            raise

    def _measure(self) -> None:
        """Find the rate, the first time stamp and the rounding of the time stamps, from the first two frames."""
        with self._opened() as container:
            head = list(itertools.islice(_frames(container), 2))
            if not head:
                raise AudioError("cannot decode any of its audio (FFmpeg finds no frame); replace the file")
            self.rate_hz, self.num_channels = int(head[0].sample_rate), int(head[0].layout.nb_channels)
            lfe = [number for number, one in enumerate(head[0].layout.channels) if one.name.startswith("LFE")]
            self._downmix = Downmix(rate_hz=self.rate_hz, num_channels=self.num_channels, lfe=lfe)
            self.promised_samples = _promised_samples(container, self.rate_hz)
            self._has_times = container.format.name not in _UNTIMED and all(f.pts is not None for f in head)
        self._origin_s = _pts_s(head[0]) if self._has_times else 0.0
        if self._has_times and len(head) > 1:  # WebM rounds to 1 ms; the second frame shows the rounding of all
            error_s = _pts_s(head[1]) - _pts_s(head[0]) - head[0].samples / self.rate_hz
            self._origin_s += error_s if abs(error_s) <= head[1].time_base else 0.0

    @contextmanager
    def _opened(self) -> Iterator[av.container.InputContainer]:
        """Open the container; the whitelist of formats keeps playlists from opening other files or hosts."""
        self._file.seek(0)
        with av.open(
            self._file, container_options={"format_whitelist": _FORMATS}, metadata_errors="replace"
        ) as container:
            if not container.streams.audio:
                raise AudioError("it must have an audio track, got none; remove it from the corpus")
            yield container

    def blocks(self, start_samples: int) -> Iterator[Samples]:
        """Mono blocks from ``start_samples`` to the end or the first damage; gaps between frames are skipped."""
        seek_s = start_samples / self.rate_hz - _PREROLL_S
        if self._has_times and seek_s > _PREROLL_S:
            with self._opened() as container:
                self._downmix.decide(self._checked(_frames(container)))
            with self._opened() as container:
                frames = _frames(container, seek_s=self._origin_s + seek_s)
                next(frames, None)  # Opus cuts the first frame after a seek and changes its time stamp
                first = next(frames, None)
                position = -1 if first is None or first.pts is None else self._position(first)
                if 0 < position <= start_samples:
                    yield from self._blocks(itertools.chain([first], frames), position, start_samples)
                    return
        with self._opened() as container:  # near the beginning, or without time stamps to seek by
            yield from self._blocks(_frames(container), 0, start_samples)

    def _position(self, frame: av.AudioFrame) -> int:
        return round((_pts_s(frame) - self._origin_s) * self.rate_hz)

    def _blocks(self, frames: Iterator[av.AudioFrame], position: int, start_samples: int) -> Iterator[Samples]:
        for block_T in self._downmix.mixed(self._checked(frames)):
            if position + len(block_T) > start_samples:
                yield block_T[max(0, start_samples - position) :]
            position += len(block_T)

    def _checked(self, frames: Iterator[av.AudioFrame]) -> Iterator[Samples]:
        for frame in frames:
            if frame.sample_rate != self.rate_hz:
                rates = f"{self.rate_hz} and {frame.sample_rate} Hz"
                raise AudioError(f"its rate must stay the same, got {rates}; encode it again with one rate")
            yield _channels(frame)

    def close(self) -> None:
        if self._is_path:
            self._file.close()


def _frames(container: av.container.InputContainer, *, seek_s: float | None = None) -> Iterator[av.AudioFrame]:
    """Audio frames to the end or the first damage, from before ``seek_s`` on if the file's index allows it."""
    stream = _track(container)
    try:
        if seek_s is not None:
            container.seek(int(seek_s / stream.time_base), stream=stream)
        yield from (frame for frame in container.decode(stream) if frame.samples)
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise


def _promised_samples(container: av.container.InputContainer, rate_hz: int) -> int | None:
    """The audio track's length according to the header; None if the header does not state it."""
    stream = _track(container)
    if container.format.name in _UNTIMED:
        return None
    if stream.duration and stream.duration > 0:
        return round(float(stream.duration * stream.time_base) * rate_hz)
    if container.duration and len(container.streams) == 1:
        return round(float(container.duration) / float(av.time_base) * rate_hz)
    return None


def _pts_s(frame: av.AudioFrame) -> float:
    return float(frame.pts * frame.time_base)


def _track(container: av.container.InputContainer) -> av.audio.AudioStream:
    """The audio track that a player takes: the first one that is marked as the default, else the first."""
    tracks = container.streams.audio
    return next((track for track in tracks if track.disposition & av.stream.Disposition.default), tracks[0])


def _channels(frame: av.AudioFrame) -> Samples:
    """The samples ``[T, C]`` of a frame."""
    data = frame.to_ndarray()
    data_TC = data.T if frame.format.is_planar else data.reshape(-1, frame.layout.nb_channels)
    samples_TC: Samples = data_TC.astype(np.float32)
    if data.dtype == np.uint8:
        return (samples_TC - 128) / np.float32(128)
    return samples_TC if data.dtype.kind == "f" else samples_TC / np.float32(2 ** (8 * data.dtype.itemsize - 1))
