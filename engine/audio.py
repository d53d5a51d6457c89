"""Decode, resample and store audio: mono float32 in and out, in bounded memory whatever a header says.

Shape legend: ``T`` samples, ``C`` channels. Times are seconds from a recording's first audio sample.
"""

from __future__ import annotations

import itertools
import math
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
import soxr
from numpy.typing import NDArray

Samples = NDArray[np.float32]
Source = str | os.PathLike[str] | BinaryIO

MAX_DURATION_S = 600.0  # of a segment that is decoded at once
MIN_DECODED_FRACTION = 0.95  # of a truncated segment, to be worth keeping
_MAX_PEAK = 2.0**40  # above it a stem of it could not be stored
_BLOCK_SAMPLES = 8192
_PADDING_SAMPLES = 4096  # an encoder's last frame may run this far past the stated length
_FILTER_SAMPLES = 400  # reach of soxr's filter to each side, at the lower rate
_PREROLL_S = 0.5  # decoded and dropped before a sought segment: AAC and Opus need up to 80 ms
_OGG_TAIL_S = 60.0  # longer than any Ogg page
_RATES_HZ = (100, 1_000_000)
_LEAST_BITS_PER_S = 8000  # a header that promises more time than its bytes hold at this rate is looked into
_UNKNOWN_BYTES = 0x7FFFF000  # from here on a length in a header stands for "I am writing into a pipe"
_UNSEEKABLE = ("GSM", "G72", "NMS")  # old codecs of telephones
_UNTIMED = frozenset({"aac", "mp3"})  # raw streams: FFmpeg guesses their length and seeks inexactly
_FORMATS = "mov,matroska,ogg,aac,mp3,flac,wav,w64,aiff,au,caf,asf,avi,flv,mpegts,mpeg,amr,ape,wv,ac3"
_CHUNKED = {(kind, b"WAVE") for kind in (b"RIFF", b"RIFX", b"RF64")} | {(b"FORM", b"AIFF"), (b"FORM", b"AIFC")}


_NO_SAMPLES = "it has no samples that can be decoded: fetch it again or remove it"


class AudioError(ValueError):
    """A file or segment that cannot be used: the message says why and what to do."""


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
    from engine.storage import Watched, open_binary  # Arrow is loaded where an address of S3 is used

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


def probe(source: Source) -> AudioInfo:
    """Duration, rate and channels from the header; only a format that states no length is decoded.

    Raises AudioError for what is missing, empty, a directory or special file, no audio, or of no length, and
    where the header promises far more than the bytes can hold and nothing can be decoded near the promised end.
    """
    with _local(source) as local, _opened(local) as reader:
        num_samples = reader.promised_samples or sum(map(len, reader.blocks(0)))
        _check_promise(reader, num_samples, _num_bytes(local))
        return AudioInfo(
            duration_s=num_samples / reader.rate_hz,
            sample_rate_hz=reader.rate_hz,
            num_channels=reader.num_channels,
        )


def _check_promise(reader: _SndfileReader | _AvReader, num_samples: int, num_bytes: int) -> None:
    if not num_samples:
        raise AudioError(_NO_SAMPLES)
    duration_s, begin = num_samples / reader.rate_hz, int(MIN_DECODED_FRACTION * num_samples)
    if 8 * num_bytes < _LEAST_BITS_PER_S * duration_s and next(reader.blocks(begin), None) is None:
        claim = f"its header promises {duration_s:.3f} s in {num_bytes} bytes"
        raise AudioError(f"it is damaged: {claim}, the end of which cannot be decoded; fetch it again")


def decode(
    source: Source,
    *,
    sample_rate_hz: int,
    start_s: float = 0.0,
    duration_s: float | None = None,
    max_duration_s: float = MAX_DURATION_S,
) -> Samples:
    """One segment ``[T]``: mean over channels, resampled, the same samples that the whole decode has there.

    The file's end limits the segment. A damaged file counts if it gives 95 % of what its header promises.

    Raises AudioError for unusable files and segments, and for segments over ``max_duration_s``.
    """
    with _local(source) as local, _opened(local) as reader:
        _check_segment(start_s, duration_s, max_duration_s, sample_rate_hz)
        lead, first = _aligned(start_s, reader.rate_hz, sample_rate_hz)
        end_s = start_s + (max_duration_s if duration_s is None else duration_s)
        margin = math.ceil(_FILTER_SAMPLES * max(1.0, reader.rate_hz / sample_rate_hz))
        mono_T = _collected(reader, first, stop=math.ceil(end_s * reader.rate_hz) + margin)
        _check_complete(reader, first + len(mono_T), start_s, end_s, is_open=duration_s is None)
    if reader.rate_hz != sample_rate_hz:
        mono_T = soxr.resample(mono_T, reader.rate_hz, sample_rate_hz, quality="HQ")
    begin = round(start_s * sample_rate_hz) - lead
    return np.ascontiguousarray(mono_T[begin : begin + round((end_s - start_s) * sample_rate_hz)])


def _check_segment(start_s: float, duration_s: float | None, max_duration_s: float, sample_rate_hz: int) -> None:
    if not 0 <= start_s < math.inf:
        raise AudioError(f"a segment starts at 0 s or later, not at {start_s} s: correct start_s")
    if duration_s is not None and not 0.5 / sample_rate_hz < duration_s < math.inf:
        raise AudioError(f"a segment ends after its start, not {duration_s} s later: correct end_s")
    if duration_s is not None and duration_s > max_duration_s:
        raise AudioError(f"{duration_s} s exceed {max_duration_s} s: cut it or raise max_duration_s")


def _aligned(start_s: float, rate_hz: int, sample_rate_hz: int) -> tuple[int, int]:
    """Where both sample grids meet at least a filter's reach before ``start_s``: (output, source) sample.

    Starting elsewhere would shift the segment by a fraction of a sample against the whole decode.
    """
    common_hz = math.gcd(rate_hz, sample_rate_hz)
    reach_s = _FILTER_SAMPLES / min(rate_hz, sample_rate_hz) if rate_hz != sample_rate_hz else 0.0
    period = max(0, math.floor((start_s - reach_s) * common_hz))
    return period * (sample_rate_hz // common_hz), period * (rate_hz // common_hz)


def _collected(reader: _SndfileReader | _AvReader, first: int, *, stop: int) -> Samples:
    """Samples ``first`` to ``stop``, without the padding after the promised end."""
    blocks, have = [np.zeros(0, np.float32)], first
    for block_T in reader.blocks(first):
        blocks.append(block_T[: stop - have])
        have += len(blocks[-1])
        if have >= stop:
            break
    mono_T = np.concatenate(blocks)
    excess = have - (reader.promised_samples or have)
    mono_T = mono_T[: len(mono_T) - excess] if 0 < excess <= _PADDING_SAMPLES else mono_T
    if not np.isfinite(mono_T).all():
        raise AudioError("it has NaN or infinite samples: repair or remove it")
    if (peak := float(np.abs(mono_T).max(initial=0.0))) >= _MAX_PEAK:
        raise AudioError(f"its samples reach {peak:.3g}, full scale is 1: repair or remove it")
    return mono_T


def _check_complete(
    reader: _SndfileReader | _AvReader, have: int, start_s: float, end_s: float, *, is_open: bool
) -> None:
    """Compares the decoded end, a sample of the source, with what was asked and promised."""
    rate_hz, promised = reader.rate_hz, reader.promised_samples
    if have == 0 and not promised:
        raise AudioError(_NO_SAMPLES)
    if max(have, promised or 0) <= round(start_s * rate_hz):
        end = (promised or have) / rate_hz
        raise AudioError(f"the segment starts at {start_s} s, after the end at {end:.3f} s: correct start_s")
    if is_open and have > round(end_s * rate_hz):
        raise AudioError(f"it goes on beyond {end_s} s: cut it, or raise max_duration_s")
    asked = min(end_s * rate_hz, promised or have) - start_s * rate_hz
    got = have - start_s * rate_hz
    if got <= 0 or got < MIN_DECODED_FRACTION * asked:
        got_s, asked_s = max(0.0, got) / rate_hz, asked / rate_hz
        raise AudioError(f"it is damaged: {got_s:.3f} of {asked_s:.3f} s can be decoded; fetch it again")


def _window_starts(num_samples: int, sample_rate_hz: int, window_s: float) -> NDArray[np.int64]:
    return np.arange(0, num_samples, max(1, round(window_s * sample_rate_hz)))


def active_mask(
    samples_T: Samples, *, sample_rate_hz: int, window_s: float = 0.1, floor_db: float = -40.0
) -> NDArray[np.bool_]:
    """Which windows, a last partial one included, have a mean power within ``floor_db`` of the loudest's."""
    starts = _window_starts(len(samples_T), sample_rate_hz, window_s)
    if not len(starts):
        return np.zeros(0, np.bool_)
    power = np.add.reduceat(np.square(samples_T, dtype=np.float64), starts)
    power /= np.diff(starts, append=len(samples_T))
    mask: NDArray[np.bool_] = (power > 0) & (power >= power.max() * 10 ** (floor_db / 10))
    return mask


def active_rms(samples_T: Samples, *, sample_rate_hz: int) -> float:
    """RMS over the active 0.1 s windows, 0.0 for silence."""
    starts = _window_starts(len(samples_T), sample_rate_hz, 0.1)
    mask = active_mask(samples_T, sample_rate_hz=sample_rate_hz)
    active_T = np.repeat(mask, np.diff(starts, append=len(samples_T)))
    return float(np.sqrt(np.mean(np.square(samples_T[active_T], dtype=np.float64)))) if mask.any() else 0.0


def write_wav(path: str | os.PathLike[str], samples_T: Samples, *, sample_rate_hz: int) -> None:
    """Float32 mono WAV, written aside and renamed; equal samples give equal bytes (no PEAK time stamp)."""
    data = np.ascontiguousarray(samples_T, dtype="<f4").tobytes()
    head = struct.pack("<4sI4s4sIHHIIHH", b"RIFF", 50 + len(data), b"WAVE", b"fmt ", 18, 3, 1, sample_rate_hz,
                       4 * sample_rate_hz, 4, 32)  # fmt: skip
    head += struct.pack("<H4sII4sI", 0, b"fact", 4, len(data) // 4, b"data", len(data))
    target = Path(path)
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(head + data)
        aside.replace(target)
    finally:
        aside.unlink(missing_ok=True)
