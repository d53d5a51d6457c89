"""Open recordings: local paths, file objects and objects in S3, with the decoder that can read them."""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, TypeAlias, cast

import av
import soundfile as sf

from engine.audio.ffmpeg import AvReader
from engine.audio.sndfile import AudioSource, SndfileReader, opened_bytes
from engine.errors import AudioError
from engine.storage.ranges import RangeFile

Reader: TypeAlias = "SndfileReader | AvReader"
_RATES_HZ = (100, 1_000_000)


@contextmanager
def open_audio(source: AudioSource) -> Iterator[tuple[Reader, int]]:
    """Open a recording: its reader and its size in bytes. Every AudioError raised inside names the source."""
    with _local(source) as local:
        try:
            num_bytes = _num_bytes(local)
            reader = _reader(local, num_bytes)
            try:
                if not _RATES_HZ[0] <= reader.rate_hz <= _RATES_HZ[1]:
                    limits = "{} to {} Hz".format(*_RATES_HZ)
                    raise AudioError(f"its rate must be {limits}, got {reader.rate_hz} Hz; fetch it again")
                yield reader, num_bytes
            finally:
                reader.close()
        except (AudioError, OSError) as error:
            is_audio = isinstance(error, AudioError)
            why = error if is_audio else f"cannot read it ({error}); check its permissions and the disk"
            name = local if isinstance(local, (str, os.PathLike)) else getattr(local, "name", "file object")
            raise AudioError(f"{str(name)!r}: {why}") from error


@contextmanager
def _local(source: AudioSource) -> Iterator[AudioSource]:
    """Open an object in S3 for the decoders; other sources are returned as they are.

    An error of the network is raised unchanged, in place of the decoder's error that follows from it.
    """
    if not isinstance(source, str) or not source.startswith("s3://"):
        yield source
        return
    from engine.storage.files import open_binary

    with open_binary(source) as file:
        watched = WatchedFile(file, source)
        try:
            yield cast(BinaryIO, watched)
        except AudioError as error:
            raise (watched.error or error) from error
    if watched.error is not None:
        raise watched.error


class WatchedFile(RangeFile):
    """A file that keeps the first error of a read, which libsndfile takes for the end of the file.

    It seeks only before it reads: asking for the size does not empty the buffer of ``file``.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        super().__init__(name, file.seek(0, io.SEEK_END))
        self._file = file
        self.error: Exception | None = None
        """The first error of a read."""

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        try:
            return super().seek(offset, whence)
        except OSError:  # decoders of damaged files seek before the start
            return super().seek(0)

    def read_range(self, start: int, num_bytes: int) -> bytes:
        try:
            self._file.seek(start)
            return self._file.read(num_bytes)
        except Exception as error:
            self.error = self.error or error
            raise


def _reader(source: AudioSource, num_bytes: int) -> Reader:
    """A reader of libsndfile if it knows the format, else of FFmpeg."""
    if not num_bytes:
        raise AudioError("it must be an audio file, got an empty file (0 bytes); fetch it again or remove it")
    with opened_bytes(source) as file:
        is_text = _is_text(file.read(256))
    try:
        return SndfileReader(source)
    except (sf.LibsndfileError, TypeError) as error:  # TypeError: a name that ends in .raw
        reason = getattr(error, "error_string", "raw samples")
    try:
        return AvReader(source)
    except (AudioError, av.error.FFmpegError, OSError) as error:
        if isinstance(error, AudioError) and not is_text:
            raise
        cause = f"libsndfile: {reason} FFmpeg: {getattr(error, 'strerror', error)}"
        cause = "it begins like a text, such as a web page or an error message" if is_text else cause
        raise AudioError(f"cannot decode it with libsndfile or FFmpeg ({cause}); replace the file") from error


def _is_text(head: bytes) -> bool:
    """True for the beginning of a text; it is not shown, because a list may name a file that is none of its own."""
    text = head.decode("utf-8", "ignore").strip()
    return len(text) > max(4, 0.9 * len(head.strip())) and all(c.isprintable() or c.isspace() for c in text)


def _num_bytes(source: AudioSource) -> int:
    """The size of a file object or regular file; a pipe is not opened, which could block for ever."""
    try:
        if not isinstance(source, (str, os.PathLike)):
            num_bytes = source.seek(0, os.SEEK_END)
            source.seek(0)
            return num_bytes
        status = os.stat(source)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise AudioError(f"cannot open it ({error}); check the path and the folder of the audio") from error
    if not stat.S_ISREG(status.st_mode):
        kind = "directory" if stat.S_ISDIR(status.st_mode) else "pipe, socket or device"
        raise AudioError(f"it must be a regular file, got a {kind}; give the path of an audio file")
    return status.st_size
