"""Audio read with FFmpeg, through PyAV (MP3, M4A, MP4, Ogg, FLAC, WebM, raw AAC and more).

Shape legend: ``T`` samples, ``C`` channels.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import BinaryIO

import av
import numpy as np

from engine.audio.sndfile import AudioSource, Samples, opened_bytes
from engine.errors import AudioError

_PADDING_SAMPLES = 4096  # an encoder's last frames may exceed the length in the header by this much
_ROUNDING_S = 0.5  # lengths in headers may be greater by this much; in WMA they include a lead
_BLOCK_SAMPLES = 16384
_MAX_LOST_FRACTION = 0.05  # of the bytes, in places that cannot be decoded
_MIN_LOST_BYTES = 2048
_MAX_TAG_BYTES = 1 << 20
_TAGS = (b"ID3", b"APETAGEX", b"METADATA_BLOCK_PICTURE", b"fLaC", b"vorbis")
_UNTIMED = frozenset({"aac", "ac3", "eac3", "amr", "mpegts", "mpeg", "avi"})  # a guess, or blocks with gaps
_GAPLESS = frozenset({"mp3", "flac", "wav", "aiff", "au", "caf", "w64", "ape", "wv"})  # time stamps are counted samples
_SPLIT = "split it, or encode it again"
_FORMATS = "mov,matroska,ogg,aac,mp3,flac,wav,w64,aiff,au,caf,asf,avi,flv,mpegts,mpeg,amr,ape,wv,ac3,eac3"


class AvReader:
    """Reads a file once, from its start, as blocks ``[T, C]``: a sample's position is the number of samples before it.

    No container states positions that can be relied on: time stamps have gaps, are rounded to milliseconds, or start
    anywhere, and decoders depend on what they decoded before. Raises AudioError and FFmpegError.
    """

    seeks = False
    """Blocks can start anywhere."""

    def __init__(self, source: AudioSource) -> None:
        self._source = source
        self._num_bytes, head = _first_bytes(source)
        self._mp3_samples = _mp3_samples(head)
        self.rate_hz = self.num_channels = 0
        self.lfe: tuple[int, ...] = ()
        """Numbers of channels for low-frequency effects."""
        self.num_samples: int | None = None
        """Length of the file: what can be decoded, and what its header promises beyond; known after the last block."""
        self._blocks = self._decoded()
        next(self._blocks)  # the first block is empty: it comes when the rate is known

    @contextmanager
    def _opened(self) -> Iterator[av.container.InputContainer]:
        """Open the container; the whitelist of formats keeps playlists from opening other files or hosts."""
        options = {"format_whitelist": _FORMATS}
        with (
            opened_bytes(self._source) as file,
            av.open(file, container_options=options, metadata_errors="replace") as container,
        ):
            if not container.streams.audio:
                raise AudioError("it must have an audio track, got none; remove it from the corpus")
            yield container

    def blocks(self, start_samples: int = 0) -> Generator[Samples, None, None]:
        """Blocks of the complete file; gaps between frames are skipped, as FFmpeg's command skips them.

        Raises AudioError where the rate or the number of channels changes, and if over 5 % cannot be decoded.
        """
        assert not start_samples
        return self._blocks

    def _decoded(self) -> Generator[Samples, None, None]:
        num_samples, first_s, end_s, last_TC = 0, math.inf, 0.0, np.zeros((0, 1), np.float32)
        with self._opened() as container:
            for frames in self._batches(container):
                yield last_TC
                last_TC = _samples(frames)
                num_samples += len(last_TC)
                if frames[0].pts is not None and frames[-1].pts is not None:
                    first_s = min(first_s, _pts_s(frames[0]))
                    end_s = _pts_s(frames[-1]) + frames[-1].samples / self.rate_hz
            name, promised = container.format.name, self._promised_samples(container)
        if not num_samples:
            raise AudioError("cannot decode any of its audio (FFmpeg finds no frame); replace the file")
        if not name.startswith("mov"):  # others may state when the audio ends, not how long it is
            first_s = min(first_s, 0.0)
        covered = num_samples if name in _GAPLESS else max(num_samples, round((end_s - first_s) * self.rate_hz))
        missing = 0 if promised is None else promised - covered
        if name.startswith("mov") and 0 < -missing <= min(_PADDING_SAMPLES, len(last_TC)):
            last_TC = last_TC[:missing]  # the edit list states the last sample; FFmpeg gives all of the last frame
            num_samples += missing
        self.num_samples = num_samples + (missing if missing > _ROUNDING_S * self.rate_hz else 0)
        yield last_TC

    def _batches(self, container: av.container.InputContainer) -> Iterator[list[av.AudioFrame]]:
        """Frames of one sample format, some at a time: much faster than one by one."""
        frames: list[av.AudioFrame] = []
        size = 0
        for frame in self._frames(container):
            kind = (int(frame.sample_rate), int(frame.layout.nb_channels))
            if not self.rate_hz:
                self.rate_hz, self.num_channels = kind
                names = [channel.name for channel in frame.layout.channels]
                self.lfe = tuple(number for number, name in enumerate(names) if name.startswith("LFE"))
            if kind != (self.rate_hz, self.num_channels):
                kinds = f"{self.rate_hz} Hz with {self.num_channels} and {kind[0]} Hz with {kind[1]}"
                raise AudioError(f"its rate and number of channels must stay the same, got {kinds}; {_SPLIT}")
            if size >= _BLOCK_SAMPLES or (frames and frame.format.name != frames[0].format.name):
                yield frames
                frames, size = [], 0
            frames.append(frame)
            size += frame.samples
        if frames:
            yield frames

    def _frames(self, container: av.container.InputContainer) -> Iterator[av.AudioFrame]:
        """Audio frames to the end; what cannot be decoded is left out, as FFmpeg's command leaves it out."""
        stream = _track(container)
        is_in_order = len(container.streams) == 1 and not container.format.name.startswith(("mov", "avi"))
        lost = good = begin = end = 0
        for packet in _packets(container, stream):
            if is_in_order and packet.pos is not None and packet.pos != begin:
                lost += self._lost_bytes(end, packet.pos) if good else 0
                begin = end = packet.pos
            end += packet.size
            try:
                frames = packet.decode()
            except av.error.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                lost += packet.size if _is_audio(bytes(packet)) else 0
                continue
            good += packet.size
            yield from (frame for frame in frames if frame.samples)
        if container.format.name == "aac":  # without positions, but all of the file is packets
            lost = max(0, self._num_bytes - good)
        if good and lost > _MAX_LOST_FRACTION * (good + lost) + _MIN_LOST_BYTES:
            cause = f"it is damaged: {lost} of {good + lost} bytes cannot be decoded"
            raise AudioError(f"cannot use it ({cause}); fetch it again")

    def _lost_bytes(self, begin: int, end: int) -> int:
        """The bytes between two packets that may have been audio; the container's own bytes are fewer."""
        if end - begin < _MIN_LOST_BYTES:
            return 0
        if isinstance(self._source, (str, os.PathLike)):
            with opened_bytes(self._source) as file:
                data = _read(file, begin, min(end - begin, _MAX_TAG_BYTES))
        else:
            data = _read(self._source, begin, min(end - begin, _MAX_TAG_BYTES))
        return end - begin if _is_audio(data) else 0

    def _promised_samples(self, container: av.container.InputContainer) -> int | None:
        """The audio track's length according to the header; None if the header does not state it."""
        stream, name = _track(container), container.format.name
        if name == "mp3":
            return self._mp3_samples
        if name in _UNTIMED:
            return None
        if stream.duration and stream.duration > 0:
            return round(float(stream.duration * stream.time_base) * self.rate_hz)
        if container.duration and len(container.streams) == 1:
            return round(float(container.duration) / float(av.time_base) * self.rate_hz)
        return None

    def close(self) -> None:
        """Close the file."""
        self._blocks.close()


def _packets(container: av.container.InputContainer, stream: av.audio.AudioStream) -> Iterator[av.Packet]:
    """Packets to the end, or to where the container is damaged."""
    try:
        yield from container.demux(stream)
    except av.error.PatchWelcomeError as error:  # of a chained Ogg
        raise AudioError(f"its rate and number of channels must stay the same, got another stream; {_SPLIT}") from error
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise


def _first_bytes(source: AudioSource) -> tuple[int, bytes]:
    """The number of bytes after the tags at a file's beginning, and the first 512 of them."""
    with opened_bytes(source) as file:
        begin = 0
        while (head := file.read(10))[:3] == b"ID3":
            begin += 10 + sum((byte & 127) << shift for byte, shift in zip(head[6:], (21, 14, 7, 0), strict=False))
            file.seek(begin)
        return file.seek(0, os.SEEK_END) - begin, head + _read(file, begin + len(head), 512)


def _mp3_samples(head: bytes) -> int | None:
    """The length that the first frame of an MP3 states; FFmpeg guesses if it does not like it, or there is none."""
    for name, offset in ((b"Xing", 8), (b"Info", 8), (b"VBRI", 14)):
        at = head.find(name)
        if at >= 0 and (name == b"VBRI" or head[at + 7] & 1):
            is_mpeg_1 = head[1] & 0x18 == 0x18
            num_frames = int.from_bytes(head[at + offset : at + offset + 4], "big")
            has_encoder = name != b"VBRI" and head[at + 120 : at + 124].isalnum()  # LAME, or Lavc of FFmpeg
            delay, padding = divmod(int.from_bytes(head[at + 141 : at + 144], "big"), 4096) if has_encoder else (0, 0)
            return num_frames * (1152 if is_mpeg_1 else 576) - delay - padding
    return None


def _read(file: BinaryIO, begin: int, num_bytes: int) -> bytes:
    """Some bytes of a file that FFmpeg reads too."""
    position = file.tell()
    file.seek(begin)
    data = file.read(num_bytes)
    file.seek(position)
    return data


def _is_audio(data: bytes) -> bool:
    """False for bytes with a tag or a picture, as they stand between files that were joined."""
    return not any(name in data for name in _TAGS)


def _track(container: av.container.InputContainer) -> av.audio.AudioStream:
    """The audio track that a player takes: the first one that is marked as the default, else the first."""
    tracks = container.streams.audio
    return next((track for track in tracks if track.disposition & av.stream.Disposition.default), tracks[0])


def _pts_s(frame: av.AudioFrame) -> float:
    return float(frame.pts * frame.time_base)


def _samples(frames: list[av.AudioFrame]) -> Samples:
    """The samples ``[T, C]`` of frames of one format."""
    data = np.concatenate([frame.to_ndarray() for frame in frames], axis=1)
    data_TC = data.T if frames[0].format.is_planar else data.reshape(-1, frames[0].layout.nb_channels)
    samples_TC: Samples = data_TC.astype(np.float32, copy=False)
    if data.dtype == np.uint8:
        return (samples_TC - 128) / np.float32(128)
    return samples_TC if data.dtype.kind == "f" else samples_TC / np.float32(2 ** (8 * data.dtype.itemsize - 1))
