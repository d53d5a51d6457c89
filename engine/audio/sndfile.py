"""Audio read with libsndfile (WAV, FLAC, Ogg, MP3 and more).

Shape legend: ``T`` samples, ``C`` channels.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import BinaryIO

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from engine.audio.channels import Downmix

Samples = NDArray[np.float32]
AudioSource = str | os.PathLike[str] | BinaryIO
"""A path, an ``s3://`` address or a seekable binary file."""
_BLOCK_SAMPLES = 8192
_OGG_TAIL_S = 60.0  # longer than any Ogg page
_UNKNOWN_BYTES = 0x7FFFF000  # programs that write into a pipe put this length or a greater one into the header
_UNSEEKABLE = ("GSM", "G72", "NMS")  # old telephone codecs
_CHUNKED = {(kind, b"WAVE") for kind in (b"RIFF", b"RIFX", b"RF64")} | {(b"FORM", b"AIFF"), (b"FORM", b"AIFC")}


class _Sequential(sf.SoundFile):  # type: ignore[misc]
    """A SoundFile that does not seek after every read: seeking fails in a FLAC without a length."""

    def seekable(self) -> bool:
        return False


class SndfileReader:
    """Reads a file as mono blocks; raises ``LibsndfileError`` if libsndfile does not know the format."""

    def __init__(self, source: AudioSource) -> None:
        ratio = _promised_ratio(source)
        self._file = _Sequential(os.fsencode(source) if isinstance(source, (str, os.PathLike)) else source)
        self.rate_hz, self.num_channels = int(self._file.samplerate), int(self._file.channels)
        self.promised_samples: int | None = round(self._file.frames * ratio) if self._file.frames < 2**62 else None
        """Length according to the header; None if it states none."""
        self._downmix = Downmix(rate_hz=self.rate_hz, num_channels=self.num_channels, lfe=_lfe(self._file))

    def _safe_start(self, start_samples: int) -> int:
        """The sample to seek to: in Ogg before the last page, where a seek is inexact; in MP3 a second earlier.

        MP3 frames use bits of earlier frames.
        """
        if self._file.subtype.startswith(_UNSEEKABLE):
            return 0
        if self._file.format not in ("OGG", "MP3"):
            return start_samples
        tail_s = _OGG_TAIL_S if self._file.format == "OGG" else 0.0
        return max(0, min(start_samples - self.rate_hz, (self.promised_samples or 0) - round(tail_s * self.rate_hz)))

    def blocks(self, start_samples: int) -> Iterator[Samples]:
        """Mono blocks from ``start_samples`` to the end or the first damage; none if it starts after the end."""
        if position := self._safe_start(start_samples):
            self._downmix.decide(self._blocks_TC(0))
        for block_T in self._downmix.mixed(self._blocks_TC(position)):
            if position + len(block_T) > start_samples:
                yield block_T[max(0, start_samples - position) :]
            position += len(block_T)

    def _blocks_TC(self, position: int) -> Iterator[Samples]:
        with suppress(sf.LibsndfileError):
            if position:
                self._file.seek(position)
            while len(block_TC := self._file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                yield block_TC

    def close(self) -> None:
        self._file.close()


def _lfe(file: sf.SoundFile) -> tuple[int, ...]:
    """The number of the channel for low-frequency effects: of FLAC by its definition, else by a WAV's channel mask."""
    mask = re.search(r"Channel Mask *: 0x([0-9A-F]+)", file.extra_info)
    speakers = int(mask[1], 16) if mask else 0x3F if file.format == "FLAC" and file.channels >= 6 else 0
    return ((speakers & 0x7).bit_count(),) if speakers & 0x8 else ()


@contextmanager
def opened_bytes(source: AudioSource) -> Iterator[BinaryIO]:
    """Open a source at its first byte; a file object is set back to it afterwards."""
    file = open(source, "rb") if (is_path := isinstance(source, (str, os.PathLike))) else source
    try:
        file.seek(0)
        yield file
    finally:
        file.close() if is_path else file.seek(0)


def _promised_ratio(source: AudioSource) -> float:
    """The length in the header of a WAV or AIFF, relative to its actual length; 1.0 for other files.

    libsndfile reports the actual length of a truncated file.
    """
    with opened_bytes(source) as file:
        begin, stated_bytes = _audio_chunk(file)
        end = file.seek(0, os.SEEK_END)
    return stated_bytes / (end - begin) if begin < end < begin + stated_bytes < begin + _UNKNOWN_BYTES else 1.0


def _audio_chunk(file: BinaryIO) -> tuple[int, int]:
    """The position of the samples in a WAV or AIFF and their number of bytes according to it; else two zeros."""
    head, stated_bytes, position = file.read(12), None, 12
    if (head[:4], head[8:]) not in _CHUNKED:
        return 0, 0
    layout = struct.Struct(">4sI" if head[:4] in (b"FORM", b"RIFX") else "<4sI")
    for _ in range(1000):
        file.seek(position)
        fields = file.read(24)
        if len(fields) < layout.size:
            break
        name, num_bytes = layout.unpack_from(fields)
        position += layout.size
        if name in (b"data", b"SSND"):
            return position, num_bytes if stated_bytes is None else stated_bytes
        if name == b"ds64" and len(fields) == 24:
            (stated_bytes,) = struct.unpack("<16xQ", fields)
        position += num_bytes + num_bytes % 2
    return 0, 0
