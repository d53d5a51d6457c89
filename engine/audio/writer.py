"""Audio files that are written block by block: float32 WAV of any length, also to a pipe, and 24-bit FLAC; and Opus.

WAV is our own because libsndfile cannot write to a pipe, and neither turns a WAV of more than 4 GiB into RF64 (EBU Tech
3306) when its length is known at last, which Python's soundfile cannot request.

Shape legend: ``T`` samples, ``C`` channels.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import BinaryIO, Literal

import av
import numpy as np
import soundfile as sf

from engine.audio.sndfile import Samples
from engine.errors import AudioError

FileFormat = Literal["wav", "flac"]
_UNKNOWN = 0xFFFFFFFF  # in a field of 32 bits; its value is elsewhere, or was not known in time
_FLOAT_FORMAT, _SAMPLE_BYTES = 3, 4
_FLAC_CHANNELS, _FLAC_RATE_HZ = 8, 655_350


class WavWriter:
    """Writes float32 WAV; the header is corrected at the end unless the file is a pipe, which then states no length."""

    num_clipped = 0
    """Samples that the format cannot store."""

    def __init__(self, file: BinaryIO, *, sample_rate_hz: int, num_channels: int, comment: str = "") -> None:
        self._file, self._is_pipe, self._num_samples = file, not file.seekable(), 0
        frame_bytes = _SAMPLE_BYTES * num_channels
        text = comment.encode() + b"\0" * (2 - len(comment.encode()) % 2)
        layout = (_FLOAT_FORMAT, num_channels, sample_rate_hz, sample_rate_hz * frame_bytes, frame_bytes, 32, 0)
        info = b"INFO" + _chunk(b"ICMT", text)
        self._middle = _chunk(b"fmt ", struct.pack("<HHIIHHH", *layout)) + _chunk(b"LIST", info)
        self._frame_bytes = frame_bytes
        file.write(self._header(None))

    def write(self, samples_TC: Samples) -> None:
        """Append samples."""
        self._file.write(np.ascontiguousarray(samples_TC, "<f4").data)
        self._num_samples += len(samples_TC)

    def close(self) -> None:
        """State the length and close the file, but not a pipe."""
        if self._is_pipe:
            self._file.flush()
            return
        self._file.seek(0)
        self._file.write(self._header(self._num_samples))
        self._file.close()

    def _header(self, num_samples: int | None) -> bytes:
        """All bytes before the samples, of the same number in each case."""
        data_bytes = (num_samples or 0) * self._frame_bytes
        fixed = 4 + 36 + len(self._middle) + 12 + 8  # WAVE, the room for ds64, the chunks in the middle, fact, data
        riff_bytes = fixed + data_bytes
        is_long = riff_bytes > _UNKNOWN
        sizes = struct.pack("<QQQI", riff_bytes, data_bytes, num_samples or 0, 0)
        is_unknown = is_long or num_samples is None
        riff, fact, data = (_UNKNOWN if is_unknown else size for size in (riff_bytes, num_samples, data_bytes))
        return b"".join(
            [
                struct.pack("<4sI4s", b"RF64" if is_long else b"RIFF", riff, b"WAVE"),
                _chunk(b"ds64" if is_long else b"JUNK", sizes),
                self._middle,
                _chunk(b"fact", struct.pack("<I", fact)),
                struct.pack("<4sI", b"data", data),
            ]
        )


class FlacWriter:
    """Writes 24-bit FLAC; samples beyond full scale are clipped and counted."""

    def __init__(self, path: Path, *, sample_rate_hz: int, num_channels: int, comment: str = "") -> None:
        if num_channels > _FLAC_CHANNELS or sample_rate_hz > _FLAC_RATE_HZ:
            raise AudioError(
                f"audio for FLAC must have at most {_FLAC_CHANNELS} channels and {_FLAC_RATE_HZ} Hz, got "
                f"{num_channels} and {sample_rate_hz} Hz; write WAV (--format wav)"
            )
        self._file = sf.SoundFile(path, "w", sample_rate_hz, num_channels, "PCM_24", format="FLAC")
        self._file.comment = comment
        self.num_clipped = 0
        """Samples that the format cannot store."""

    def write(self, samples_TC: Samples) -> None:
        """Append samples."""
        self.num_clipped += int(np.count_nonzero(np.abs(samples_TC) > 1.0))
        self._file.write(samples_TC)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


AudioWriter = WavWriter | FlacWriter
"""A file that is being written."""


def open_writer(
    path: Path, file_format: FileFormat, *, sample_rate_hz: int, num_channels: int, comment: str
) -> AudioWriter:
    """Open a new file, with a comment in its first 4 KiB. Raises AudioError if the format cannot store the audio."""
    if file_format == "flac":
        return FlacWriter(path, sample_rate_hz=sample_rate_hz, num_channels=num_channels, comment=comment)
    return WavWriter(open(path, "wb"), sample_rate_hz=sample_rate_hz, num_channels=num_channels, comment=comment)


def encode_opus(samples_T: Samples, *, sample_rate_hz: int, bits_per_s: int = 64_000) -> bytes:
    """Mono samples as Opus in WebM, which browsers play; for listening, as Opus is lossy.

    It is the same for the same samples. Samples beyond full scale are clipped.
    """
    data, frame = io.BytesIO(), av.AudioFrame.from_ndarray(samples_T[None].astype(np.float32), "flt", "mono")
    frame.sample_rate = sample_rate_hz
    with av.open(data, "w", format="webm", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libopus", rate=48_000, layout="mono")
        stream.bit_rate = bits_per_s
        for some in (frame, None):
            container.mux(stream.encode(some))
    return data.getvalue()


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack("<4sI", name, len(data)) + data
