"""Open recordings: local paths, file objects and objects in S3, with the decoder that can read them.

Shape legend: ``T`` samples, ``C`` channels.
"""

from __future__ import annotations

import io
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, TypeAlias, cast

import av
import numpy as np
import soundfile as sf

from engine.audio.channels import Downmix
from engine.audio.ffmpeg import AvReader
from engine.audio.sndfile import AudioSource, Samples, SndfileReader, opened_bytes
from engine.errors import AudioError
from engine.storage.ranges import RangeFile

Reader: TypeAlias = "SndfileReader | AvReader"
_RATES_HZ = (100, 1_000_000)
_MAX_DURATION_S = 360_000.0  # of a compressed recording, which has to be decoded to its end
_MAX_OPEN = 256  # at least the files of a task: each is decoded once, to know its length, and read later
_MAX_DECIDED = 1024


class Recording:
    """A file that is being read; reads that follow one another decode each of its samples once.

    The time base of every read is that of a complete decode: uncompressed formats are sought, which is exact, and all
    others are decoded from their start. The channels are mixed as ``downmix`` has decided for an earlier recording of
    the same file; with ``all_channels``, reads return them all, and ``downmix`` decides before the first.
    """

    def __init__(
        self,
        source: AudioSource,
        *,
        max_kept: int = 0,
        on_decoded: Callable[[float], None] = lambda duration_s: None,
        downmix: Downmix | None = None,
        all_channels: bool = False,
    ) -> None:
        self._all_channels = all_channels
        self.source, self.num_bytes, self.max_kept, self._on_decoded = source, _num_bytes(source), max_kept, on_decoded
        self._blocks: Iterator[Samples] | None = None
        self._kept: deque[Samples] = deque()
        self._begin = self.end = 0
        """Positions of the first sample that is kept, and after the last."""
        self._error: AudioError | None = None
        self._reader = _reader(source, self.num_bytes)
        self.seeks = self._reader.seeks
        """Each read costs what it returns; otherwise all from the start to its end, except for what is kept."""
        self.rate_hz, self.num_channels = self._reader.rate_hz, self._reader.num_channels
        self.downmix = downmix or Downmix(rate_hz=self.rate_hz, num_channels=self.num_channels, lfe=self._reader.lfe)
        """How the channels are mixed."""
        self.num_samples = self._reader.num_samples if self.seeks else None
        """Length: what can be decoded, and what the header promises beyond; None if the end has not been reached."""
        if not _RATES_HZ[0] <= self.rate_hz <= _RATES_HZ[1]:
            self.close()
            limits = "{} to {} Hz".format(*_RATES_HZ)
            raise AudioError(f"its rate must be {limits}, got {self.rate_hz} Hz; fetch it again")

    @property
    def num_kept(self) -> int:
        """Values in memory."""
        return (self.end - self._begin) * (self.num_channels if self._all_channels else 1)

    def measure(self) -> int:
        """The length in samples; decodes the file unless it is known."""
        while self.num_samples is None:
            self._decode_block()
            self.forget(before=self.end)
        return self.num_samples

    def read(self, first: int, stop: int) -> Samples:
        """Samples ``[T]`` or ``[T, C]`` from ``first`` to ``stop`` or the end; ``max_kept`` values stay in memory."""
        empty = np.zeros((0, self.num_channels) if self._all_channels else 0, np.float32)
        if self.seeks:
            self.downmix.decide(self._reader.blocks(0))
            blocks = self._reader.blocks(first)
            mixed = blocks if self._all_channels else map(self.downmix.mono, blocks)
            return _between(mixed, first, empty, first=first, stop=stop)
        if self._all_channels and not self.downmix.is_decided:
            self.downmix.decide(self._reader.blocks())
            self._restart()
        if first < self._begin:
            self._restart()
        while self.end < stop and self._decode_block():
            self.forget(before=first)
        return _between(self._kept, self._begin, empty, first=first, stop=stop)

    def _restart(self) -> None:
        """Decode the file again from its start."""
        self.close()
        self._reader, self._blocks, self._error = _reader(self.source, self.num_bytes), None, None
        self._begin = self.end = 0

    def has_sample(self, position: int) -> bool:
        """True if a sample can be decoded; the length must be known."""
        return next(self._reader.blocks(position), None) is not None if self.seeks else position < self.end

    def _decode_block(self) -> bool:
        """Decode some more samples; returns false at the end."""
        if self._error is not None:
            raise self._error
        if self._blocks is None:
            blocks = self._reader.blocks()
            self._blocks = blocks if self._all_channels else self.downmix.mixed(blocks)
        try:
            block_T = next(self._blocks, None)
            if self.end > _MAX_DURATION_S * self.rate_hz:
                raise AudioError(f"it must last at most {_MAX_DURATION_S / 3600:g} h, got a longer one; split it")
        except AudioError as error:
            self._error = error
            raise
        if block_T is None:
            self.num_samples = max(self.end, self._reader.num_samples or 0)
            return False
        self._kept.append(block_T)
        self.end += len(block_T)
        self._on_decoded(len(block_T) / self.rate_hz)
        return True

    def forget(self, *, before: int) -> None:
        """Drop the oldest samples, but none from ``before`` on, until ``max_kept`` values stay."""
        while self._kept and self.num_kept > self.max_kept and self._begin + len(self._kept[0]) <= before:
            self._begin += len(self._kept.popleft())

    def close(self) -> None:
        """Close the file and forget its samples."""
        self._reader.close()
        self._kept.clear()


def _between(blocks: Iterable[Samples], position: int, empty: Samples, *, first: int, stop: int) -> Samples:
    """The samples from ``first`` to ``stop`` of blocks that begin at ``position``; ``empty`` if there are none."""
    parts = [empty]
    for block_T in blocks:
        if position >= stop:
            break
        parts.append(block_T[max(0, first - position) : stop - position])
        position += len(block_T)
    return np.concatenate(parts)


class Recordings:
    """Recordings that stay open from one request to the next, with ``max_kept`` decoded samples in memory at the most.

    A file that has been replaced is another recording. Without ``max_kept``, none stays open.
    """

    def __init__(self, *, max_kept: int = 0, on_decoded: Callable[[float], None] = lambda duration_s: None) -> None:
        self._max_kept, self._on_decoded = max_kept, on_decoded
        self._kept: dict[object, Recording] = {}
        """By name, version and whether all channels are read, the last used one at the end."""
        self._downmixes: dict[object, Downmix] = {}

    @contextmanager
    def open(self, source: AudioSource, *, all_channels: bool = False) -> Iterator[Recording]:
        """Open a recording, or take the one that is open. Every AudioError raised inside names the source.

        An error of the network is raised unchanged, in place of the decoder's error that follows from it.
        """
        local, version = _local(source)
        recording = self._kept.pop((version, all_channels), None)
        is_usable = False
        try:
            with _named(local):
                if recording is None:
                    recording = Recording(
                        local,
                        max_kept=self._max_kept,
                        on_decoded=self._on_decoded,
                        downmix=self._downmixes.get(version),
                        all_channels=all_channels,
                    )
                try:
                    yield recording
                    is_usable = True
                except AudioError:
                    is_usable = True
                    raise
        finally:
            used = local if recording is None else recording.source
            lost = used.error if isinstance(used, WatchedFile) else None
            if recording is not None:
                self._keep(version if is_usable and lost is None else None, recording, all_channels)
            if lost is not None:
                raise lost

    def _keep(self, version: object, recording: Recording, all_channels: bool) -> None:
        """Keep a recording of a version for the next request, and close what is too much."""
        if version is not None and self._max_kept and recording.downmix.is_decided:
            self._downmixes[version] = recording.downmix
            if len(self._downmixes) > _MAX_DECIDED:
                del self._downmixes[next(iter(self._downmixes))]
        if version is None or not self._max_kept or recording.seeks:
            recording.close()
            return
        recording.forget(before=recording.end)
        self._kept[version, all_channels] = recording
        while len(self._kept) > _MAX_OPEN or (
            len(self._kept) > 1 and sum(one.num_kept for one in self._kept.values()) > self._max_kept
        ):
            self._kept.pop(next(iter(self._kept))).close()


@contextmanager
def _named(source: AudioSource) -> Iterator[None]:
    """Name the source in errors that blame it."""
    try:
        yield
    except (AudioError, OSError) as error:
        is_audio = isinstance(error, AudioError)
        why = error if is_audio else f"cannot read it ({error}); check its permissions and the disk"
        name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "file object")
        raise AudioError(f"{str(name)!r}: {why}") from error


def _local(source: AudioSource) -> tuple[AudioSource, object]:
    """A path or file for the decoders, and the version of what is there; None if that cannot be known."""
    if isinstance(source, str) and source.startswith("s3://"):
        from engine.storage.files import open_binary

        file = cast(Any, open_binary(source))  # a buffer over an object that has an ETag
        return cast(BinaryIO, WatchedFile(file, source)), (source, file.raw.etag)
    if not isinstance(source, (str, os.PathLike)):
        return source, None
    try:
        status = os.stat(source)
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return source, None
    return source, (os.fspath(source), status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


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
