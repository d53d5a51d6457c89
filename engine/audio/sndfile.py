"""Audio read with libsndfile: uncompressed formats (WAV, W64, AIFF, AU, CAF and more) and old telephone codecs.

Shape legend: ``T`` samples, ``C`` channels.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import BinaryIO

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from engine.audio import headers
from engine.errors import AudioError
from engine.storage.ranges import RangeFile

Samples = NDArray[np.float32]
AudioSource = str | os.PathLike[str] | BinaryIO
"""A path, an ``s3://`` address or a seekable binary file."""
_BLOCK_SAMPLES = 8192
_SAMPLE_BYTES = {"PCM_S8": 1, "PCM_U8": 1, "ULAW": 1, "ALAW": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4}
_SAMPLE_BYTES |= {"FLOAT": 4, "DOUBLE": 8}
_OF_FFMPEG = ("VORBIS", "OPUS", "MPEG", "ALAC")


class _Sequential(sf.SoundFile):  # type: ignore[misc]
    """A SoundFile that does not seek after every read, which would be slow."""

    def seekable(self) -> bool:
        return False


class _Part(RangeFile):
    """Some bytes of a file as a file."""

    def __init__(self, file: BinaryIO, begin: int, num_bytes: int) -> None:
        super().__init__("samples", num_bytes)
        self._file, self._begin = file, begin

    def read_range(self, start: int, num_bytes: int) -> bytes:
        self._file.seek(self._begin + start)
        return self._file.read(num_bytes)


class SndfileReader:
    """Reads a file as blocks ``[T, C]``; raises ``LibsndfileError`` for formats that are left to FFmpeg.

    These are all compressed formats that FFmpeg knows: libsndfile ends them where a header or an estimate says so.
    """

    def __init__(self, source: AudioSource) -> None:
        with opened_bytes(source) as file:
            found = headers.find_samples(file)
        self._opened = ExitStack()
        self._file = _Sequential(os.fsencode(source) if isinstance(source, (str, os.PathLike)) else source)
        self._opened.callback(self._file.close)
        self.rate_hz, self.num_channels = int(self._file.samplerate), int(self._file.channels)
        self.lfe = _lfe(self._file)
        """Numbers of channels for low-frequency effects."""
        self.num_samples: int | None = int(self._file.frames)
        """Length of the file, or what its header promises if it was cut off."""
        self.seeks = self._file.subtype in _SAMPLE_BYTES
        """Blocks can start anywhere."""
        try:
            if self._file.format == "FLAC" or self._file.subtype.startswith(_OF_FFMPEG):
                raise sf.LibsndfileError(1, "a compressed format: ")
            if found is not None and found.is_corrected:
                self._correct(source, found)
        except BaseException:
            self.close()
            raise
        if found is not None and 0 < found.num_bytes < found.stated_bytes:  # libsndfile reports the actual length
            self.num_samples = round(self.num_samples * found.stated_bytes / found.num_bytes)

    def _correct(self, source: AudioSource, found: headers.SampleBytes) -> None:
        """Read the samples without the header if libsndfile believes that there are fewer."""
        frame_bytes = _SAMPLE_BYTES.get(self._file.subtype, 0) * self.num_channels
        num_samples = found.num_bytes // frame_bytes if frame_bytes else 0
        if not frame_bytes and not self.num_samples:
            raise AudioError("its header must state its length, got none for a compressed format; encode it again")
        if num_samples <= int(self._file.frames):
            return
        is_big_endian = self._file.endian == "BIG" or (self._file.endian == "FILE" and found.is_big_endian)
        part = _Part(self._opened.enter_context(opened_bytes(source)), found.begin, num_samples * frame_bytes)
        self._file = _Sequential(
            part,
            samplerate=self.rate_hz,
            channels=self.num_channels,
            format="RAW",
            subtype=self._file.subtype,
            endian="BIG" if is_big_endian else "LITTLE",
        )
        self._opened.callback(self._file.close)
        self.num_samples = num_samples

    def blocks(self, start_samples: int = 0) -> Generator[Samples, None, None]:
        """Blocks from ``start_samples`` to the end or the first damage; none if it starts after the end.

        If the reader does not seek, there is one call, from the start.
        """
        with suppress(sf.LibsndfileError):
            if self.seeks:
                self._file.seek(start_samples)
            while len(block_TC := self._file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                yield block_TC

    def close(self) -> None:
        """Close the file."""
        self._opened.close()


def _lfe(file: sf.SoundFile) -> tuple[int, ...]:
    """The number of the channel for low-frequency effects, by a WAV's channel mask."""
    mask = re.search(r"Channel Mask *: 0x([0-9A-F]+)", file.extra_info)
    speakers = int(mask[1], 16) if mask else 0
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
