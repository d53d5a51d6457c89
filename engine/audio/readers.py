"""TODO engine/audio/readers.py."""

from __future__ import annotations

import itertools
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import av
import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from engine.errors import AudioError

Samples = NDArray[np.float32]
Source = str | os.PathLike[str] | BinaryIO
_BLOCK_SAMPLES = 8192
_PREROLL_S = 0.5  # decoded and dropped before a sought segment: AAC and Opus need up to 80 ms
_OGG_TAIL_S = 60.0  # longer than any Ogg page
_RATES_HZ = (100, 1_000_000)
_UNKNOWN_BYTES = 0x7FFFF000  # from here on a length in a header stands for "I am writing into a pipe"
_UNSEEKABLE = ("GSM", "G72", "NMS")  # old codecs of telephones
_UNTIMED = frozenset({"aac", "mp3"})  # raw streams: FFmpeg guesses their length and seeks inexactly
_FORMATS = "mov,matroska,ogg,aac,mp3,flac,wav,w64,aiff,au,caf,asf,avi,flv,mpegts,mpeg,amr,ape,wv,ac3"
_CHUNKED = {(kind, b"WAVE") for kind in (b"RIFF", b"RIFX", b"RF64")} | {(b"FORM", b"AIFF"), (b"FORM", b"AIFC")}


@dataclass(frozen=True, kw_only=True)
class AudioInfo:
    """What a recording's header says; the duration of a WebM is within one codec frame (20 ms)."""

    duration_s: float
    sample_rate_hz: int
    num_channels: int


class _Sequential(sf.SoundFile):  # type: ignore[misc]
    """A SoundFile without the seek after every read, which fails in a FLAC that states no length."""

    def seekable(self) -> bool:
        return False


class _SndfileReader:
    """Reads what libsndfile knows (WAV, FLAC, Ogg, MP3, …)."""

    def __init__(self, source: Source) -> None:
        ratio = _promised_ratio(source)
        self._file = _Sequential(os.fsencode(source) if isinstance(source, (str, os.PathLike)) else source)
        self.rate_hz, self.num_channels = int(self._file.samplerate), int(self._file.channels)
        self.promised_samples: int | None = round(self._file.frames * ratio) if self._file.frames < 2**62 else None

    def _safe_start(self, start_samples: int) -> int:
        """Where to begin: a seek into an Ogg's last page misses by a block, MP3 frames borrow earlier ones' bits."""
        if self._file.subtype.startswith(_UNSEEKABLE):
            return 0
        if self._file.format not in ("OGG", "MP3"):
            return start_samples
        tail_s = _OGG_TAIL_S if self._file.format == "OGG" else 0.0
        return max(0, min(start_samples - self.rate_hz, (self.promised_samples or 0) - round(tail_s * self.rate_hz)))

    def blocks(self, start_samples: int) -> Iterator[Samples]:
        """Mono blocks from ``start_samples`` to the end or the first damage."""
        position = self._safe_start(start_samples)
        with suppress(sf.LibsndfileError):  # also a start after the end: the caller sees how much there was
            if position:
                self._file.seek(position)
            while len(block_TC := self._file.read(_BLOCK_SAMPLES, dtype="float32", always_2d=True)):
                block_T = block_TC[:, 0] if self.num_channels == 1 else block_TC.mean(axis=1, dtype=np.float32)
                if position + len(block_T) > start_samples:
                    yield block_T[max(0, start_samples - position) :]
                position += len(block_T)

    def close(self) -> None:
        self._file.close()


@contextmanager
def _bytes_of(source: Source) -> Iterator[BinaryIO]:
    """The file's bytes from the first on; a file object is left at the first."""
    file = open(source, "rb") if (owned := isinstance(source, (str, os.PathLike))) else source
    try:
        file.seek(0)
        yield file
    finally:
        file.close() if owned else file.seek(0)


def _promised_ratio(source: Source) -> float:
    """How many times its bytes of audio a WAV or AIFF promises: libsndfile takes what is there for what was meant."""
    with _bytes_of(source) as file:
        begin, stated_bytes = _audio_chunk(file)
        end = file.seek(0, os.SEEK_END)
    return stated_bytes / (end - begin) if begin < end < begin + stated_bytes < begin + _UNKNOWN_BYTES else 1.0


def _audio_chunk(file: BinaryIO) -> tuple[int, int]:
    """Where the samples of a file of chunks begin, and how many bytes of them it states; else zeros."""
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


class _AvReader:
    """Reads what FFmpeg knows (M4A, MP4, WebM, raw AAC, …), counting from the first sample decoded."""

    def __init__(self, source: Source) -> None:
        self._owned = isinstance(source, (str, os.PathLike))
        self._file: Any = Path(source).open("rb") if isinstance(source, (str, os.PathLike)) else source
        try:
            self._measure()
        except BaseException:
            self.close()
            raise

    def _measure(self) -> None:
        """Learns rate, first time stamp and how the container rounds its stamps from two frames."""
        with self._opened() as container:
            head = list(itertools.islice(_frames(container), 2))
            if not head:
                raise AudioError("none of its audio can be decoded: replace the file")
            self.rate_hz, self.num_channels = int(head[0].sample_rate), int(head[0].layout.nb_channels)
            self.promised_samples = _promised_samples(container, self.rate_hz)
            self._sought = container.format.name not in _UNTIMED and all(f.pts is not None for f in head)
        self._origin_s = _pts_s(head[0]) if self._sought else 0.0
        if self._sought and len(head) > 1:  # WebM rounds to 1 ms, each frame by as much as the second
            error_s = _pts_s(head[1]) - _pts_s(head[0]) - head[0].samples / self.rate_hz
            self._origin_s += error_s if abs(error_s) <= head[1].time_base else 0.0

    @contextmanager
    def _opened(self) -> Iterator[av.container.InputContainer]:
        """The container; the whitelist keeps playlists from opening other files or hosts."""
        self._file.seek(0)
        with av.open(
            self._file, container_options={"format_whitelist": _FORMATS}, metadata_errors="replace"
        ) as container:
            if not container.streams.audio:
                raise AudioError("it has no audio track: remove it from the corpus")
            yield container

    def blocks(self, start_samples: int) -> Iterator[Samples]:
        """Mono blocks from ``start_samples`` to the end or the first damage; holes are closed up."""
        seek_s = start_samples / self.rate_hz - _PREROLL_S
        if self._sought and seek_s > _PREROLL_S:
            with self._opened() as container:
                frames = _frames(container, seek_s=self._origin_s + seek_s)
                next(frames, None)  # Opus cuts the first frame after a seek and stamps it anew
                first = next(frames, None)
                at = -1 if first is None or first.pts is None else self._position(first)
                if 0 < at <= start_samples:
                    yield from self._from(itertools.chain([first], frames), at, start_samples)
                    return
        with self._opened() as container:  # near the beginning, or nothing to seek by
            yield from self._from(_frames(container), 0, start_samples)

    def _position(self, frame: av.AudioFrame) -> int:
        return round((_pts_s(frame) - self._origin_s) * self.rate_hz)

    def _from(self, frames: Iterator[av.AudioFrame], position: int, start_samples: int) -> Iterator[Samples]:
        for frame in frames:
            if frame.sample_rate != self.rate_hz:
                raise AudioError(f"its rate changes from {self.rate_hz} to {frame.sample_rate} Hz: re-encode it")
            if position + frame.samples > start_samples:
                yield _mono(frame)[max(0, start_samples - position) :]
            position += frame.samples

    def close(self) -> None:
        if self._owned:
            self._file.close()


def _frames(container: av.container.InputContainer, *, seek_s: float | None = None) -> Iterator[av.AudioFrame]:
    """Audio frames to the end or the first damage, from before ``seek_s`` where the index allows it."""
    stream = container.streams.audio[0]
    try:
        if seek_s is not None:
            container.seek(int(seek_s / stream.time_base), stream=stream)
        yield from (frame for frame in container.decode(stream) if frame.samples)
    except av.error.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise


def _promised_samples(container: av.container.InputContainer, rate_hz: int) -> int | None:
    """The audio track's length by the header, None where the header would only be guessing."""
    stream = container.streams.audio[0]
    if container.format.name in _UNTIMED:
        return None
    if stream.duration and stream.duration > 0:
        return round(float(stream.duration * stream.time_base) * rate_hz)
    if container.duration and len(container.streams) == 1:
        return round(float(container.duration) / float(av.time_base) * rate_hz)
    return None


def _pts_s(frame: av.AudioFrame) -> float:
    return float(frame.pts * frame.time_base)


def _mono(frame: av.AudioFrame) -> Samples:
    data = frame.to_ndarray()
    data_CT = data if frame.format.is_planar else data.reshape(-1, frame.layout.nb_channels).T
    mono_T: Samples = data_CT.mean(axis=0, dtype=np.float64).astype(np.float32)
    if data.dtype == np.uint8:
        return (mono_T - 128) / np.float32(128)
    return mono_T if data.dtype.kind == "f" else mono_T / np.float32(2 ** (8 * data.dtype.itemsize - 1))


def _num_bytes(source: Source) -> int:
    """Size of a seekable object or regular file; a FIFO is refused unopened, for it could block for ever."""
    try:
        if not isinstance(source, (str, os.PathLike)):
            num_bytes = source.seek(0, os.SEEK_END)
            source.seek(0)
            return num_bytes
        status = os.stat(source)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise AudioError(f"it cannot be opened ({error}): check the path and the manifest's root") from error
    if not stat.S_ISREG(status.st_mode):
        what = "directory" if stat.S_ISDIR(status.st_mode) else "pipe, socket or device"
        raise AudioError(f"it is a {what}: name a regular audio file")
    return status.st_size


def _reader(source: Source) -> _SndfileReader | _AvReader:
    if not _num_bytes(source):
        raise AudioError("it is empty (0 bytes): fetch it again or remove it")
    with _bytes_of(source) as file:
        text = _text(file.read(256))
    try:
        return _SndfileReader(source)
    except (sf.LibsndfileError, TypeError) as error:  # TypeError: a name that ends in .raw
        reason = getattr(error, "error_string", "raw samples")
    try:
        return _AvReader(source)
    except (AudioError, av.error.FFmpegError, OSError) as error:
        if isinstance(error, AudioError) and not text:
            raise
        theirs = f"libsndfile: {reason} FFmpeg: {getattr(error, 'strerror', error)}"
        what = f"it begins like a text, {text!r}" if text else theirs
        raise AudioError(f"it is no audio that libsndfile or FFmpeg can read ({what}): replace the file") from error


def _text(head: bytes) -> str:
    """The beginning of what is text, such as the web page that came instead of a file; else nothing."""
    words = head.decode("utf-8", "ignore").strip()
    is_text = len(words) > max(4, 0.9 * len(head.strip())) and all(c.isprintable() or c.isspace() for c in words)
    return words[:40] if is_text else ""


@contextmanager
def _local(source: Source) -> Iterator[Source]:
    """A source as the readers take it: an object of S3 is opened, and read by ranges.

    An error of the network is raised as it is, in place of what a decoder makes of it.
    """
    if not isinstance(source, str) or not source.startswith("s3://"):
        yield source
        return
    from engine.storage.files import Watched, open_binary

    with open_binary(source) as file:
        watched = Watched(file, source)
        try:
            yield cast(BinaryIO, watched)
        except AudioError as error:
            raise (watched.error or error) from error
    if watched.error is not None:
        raise watched.error


@contextmanager
def _opened(source: Source) -> Iterator[_SndfileReader | _AvReader]:
    """A reader; every AudioError raised inside names the source."""
    try:
        reader = _reader(source)
        try:
            if not _RATES_HZ[0] <= reader.rate_hz <= _RATES_HZ[1]:
                raise AudioError(f"its rate of {reader.rate_hz} Hz is outside {_RATES_HZ}: the header is damaged")
            yield reader
        finally:
            reader.close()
    except (AudioError, OSError) as error:
        why = error if isinstance(error, AudioError) else f"it cannot be read ({error}): check its permissions and disk"
        name = source if isinstance(source, (str, os.PathLike)) else getattr(source, "name", "file object")
        raise AudioError(f"{str(name)!r}: {why}") from error
