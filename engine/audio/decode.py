"""Decode, resample and store audio: mono float32 in and out, in bounded memory whatever a header says.

Shape legend: ``T`` samples, ``C`` channels. Times are seconds from a recording's first audio sample.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import numpy as np
import soxr

from engine.audio.readers import AudioInfo, Samples, Source, _AvReader, _local, _num_bytes, _opened, _SndfileReader
from engine.errors import AudioError

MAX_DURATION_S = 600.0  # of a segment that is decoded at once
MIN_DECODED_FRACTION = 0.95  # of a truncated segment, to be worth keeping
_MAX_PEAK = 2.0**40  # above it a stem of it could not be stored
_PADDING_SAMPLES = 4096  # an encoder's last frame may run this far past the stated length
_FILTER_SAMPLES = 400  # reach of soxr's filter to each side, at the lower rate
_LEAST_BITS_PER_S = 8000  # a header that promises more time than its bytes hold at this rate is looked into


_NO_SAMPLES = "it has no samples that can be decoded: fetch it again or remove it"


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
