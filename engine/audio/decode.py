"""Decode and resample audio to mono float32, in bounded memory even if a header lies.

Shape legend: ``T`` samples, ``C`` channels. Times are in seconds from a recording's first sample.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import soxr

from engine.audio.recordings import Recording, Recordings
from engine.audio.sndfile import AudioSource, Samples
from engine.errors import AudioError

MAX_DURATION_S = 600.0
"""Longest segment that is decoded at once."""
_MIN_DECODED_FRACTION = 0.95  # a damaged segment with less is refused
_MAX_PEAK = 2.0**40  # FLAC could not store a stem with a greater one
_FILTER_SAMPLES = 400  # reach of soxr's filter to each side, at the lower rate
_MIN_BITS_PER_S = 8000  # with fewer, the end that the header promises is checked
_NO_SAMPLES = "cannot decode any of its samples (it has none, or they are damaged); fetch it again or remove it"


@dataclass(frozen=True, kw_only=True)
class AudioInfo:
    """Length and format of a recording."""

    duration_s: float
    """Duration of what can be decoded, and of what the header promises beyond if the file was cut off."""
    sample_rate_hz: int
    num_channels: int


@dataclass(frozen=True, kw_only=True)
class ChannelBlock:
    """Samples of all channels of a recording, at its own rate."""

    samples_TC: Samples
    sample_rate_hz: int
    mono_channels: tuple[int, ...]
    """Numbers of the channels whose mean is the recording mixed to mono."""

    @property
    def mono_T(self) -> Samples:
        """The block mixed to mono, as :func:`decode` mixes the recording."""
        if len(self.mono_channels) == 1:
            return self.samples_TC[:, self.mono_channels[0]]
        mono_T: Samples = self.samples_TC[:, list(self.mono_channels)].mean(axis=1, dtype=np.float32)
        return mono_T


def probe(source: AudioSource, *, recordings: Recordings | None = None) -> AudioInfo:
    """Duration, rate and channels; only an uncompressed format is not decoded, because the headers of others may lie.

    With ``recordings``, a file that was opened there before is not decoded again. Raises AudioError for a missing or
    empty file, a directory or special file, and a file without audio; also if the header promises far more time than
    the bytes can hold and nothing can be decoded near the promised end.
    """
    with (recordings or Recordings()).open(source) as recording:
        num_samples = recording.measure()
        _check_promise(recording, num_samples)
        return AudioInfo(
            duration_s=num_samples / recording.rate_hz,
            sample_rate_hz=recording.rate_hz,
            num_channels=recording.num_channels,
        )


def _check_promise(recording: Recording, num_samples: int) -> None:
    if not num_samples:
        raise AudioError(_NO_SAMPLES)
    duration_s, begin = num_samples / recording.rate_hz, int(_MIN_DECODED_FRACTION * num_samples)
    num_bytes = recording.num_bytes
    if 8 * num_bytes < _MIN_BITS_PER_S * duration_s and not recording.has_sample(begin):
        cause = f"it is damaged: its header promises {duration_s:.3f} s in {num_bytes} bytes"
        raise AudioError(f"cannot decode its end ({cause}); fetch it again")


def decode(
    source: AudioSource,
    *,
    sample_rate_hz: int,
    start_s: float = 0.0,
    duration_s: float | None = None,
    max_duration_s: float = MAX_DURATION_S,
    recordings: Recordings | None = None,
) -> Samples:
    """One segment ``[T]``, mixed to mono and resampled; the same samples as in a decode of the complete file.

    It ends at the end of the file. Of a damaged segment, 95 % of what the header promises are enough. With
    ``recordings``, the decoding of a file that was opened there before continues.

    Raises AudioError for unusable files and segments, and for segments longer than ``max_duration_s``.
    """
    with (recordings or Recordings()).open(source) as recording:
        _check_segment(start_s, duration_s, max_duration_s, sample_rate_hz)
        rate_hz = recording.rate_hz
        lead, first = _aligned(start_s, rate_hz, sample_rate_hz)
        end_s = start_s + (max_duration_s if duration_s is None else duration_s)
        margin = math.ceil(_FILTER_SAMPLES * max(1.0, rate_hz / sample_rate_hz))
        mono_T = recording.read(first, stop=math.ceil(end_s * rate_hz) + margin)
        _check_values(mono_T)
        _check_complete(recording, first + len(mono_T), start_s, end_s, is_open=duration_s is None)
    if rate_hz != sample_rate_hz:
        mono_T = soxr.resample(mono_T, rate_hz, sample_rate_hz, quality="HQ")
    begin = round(start_s * sample_rate_hz) - lead
    return np.ascontiguousarray(mono_T[begin : begin + round((end_s - start_s) * sample_rate_hz)])


def decode_channels(
    source: AudioSource, *, first: int, most_values: int, recordings: Recordings | None = None
) -> ChannelBlock:
    """Samples of all channels from sample ``first`` on, ``most_values`` at most; none after the end.

    With ``recordings``, the decoding of a file that was opened there before continues. Raises AudioError for unusable
    files, and at the end of those of which less than 95 % of what the header promises can be decoded.
    """
    with (recordings or Recordings()).open(source, all_channels=True) as recording:
        stop = first + max(1, most_values // recording.num_channels)
        samples_TC = recording.read(first, stop)
        _check_values(samples_TC)
        if (end := first + len(samples_TC)) < stop:
            end_s = max(end, recording.num_samples or 0) / recording.rate_hz
            _check_complete(recording, end, 0.0, end_s, is_open=False)
        return ChannelBlock(
            samples_TC=samples_TC, sample_rate_hz=recording.rate_hz, mono_channels=recording.downmix.used
        )


def _check_segment(start_s: float, duration_s: float | None, max_duration_s: float, sample_rate_hz: int) -> None:
    if not 0 <= start_s < math.inf:
        raise AudioError(f"start_s of a segment must be finite and at least 0, got {start_s}; correct start_s")
    if duration_s is not None and not 0.5 / sample_rate_hz < duration_s < math.inf:
        raise AudioError(f"a segment must end after its start, got a length of {duration_s} s; correct end_s")
    if duration_s is not None and duration_s > max_duration_s:
        raise AudioError(f"a segment must last at most {max_duration_s} s, got {duration_s} s; cut it")


def _aligned(start_s: float, rate_hz: int, sample_rate_hz: int) -> tuple[int, int]:
    """The last output sample and source sample at one time that is at least the filter's reach before ``start_s``.

    Any other start would shift the segment by a fraction of a sample relative to a decode of the complete file.
    """
    common_hz = math.gcd(rate_hz, sample_rate_hz)
    reach_s = _FILTER_SAMPLES / min(rate_hz, sample_rate_hz) if rate_hz != sample_rate_hz else 0.0
    period = max(0, math.floor((start_s - reach_s) * common_hz))
    return period * (sample_rate_hz // common_hz), period * (rate_hz // common_hz)


def _check_values(mono_T: Samples) -> None:
    peak = float(max(mono_T.max(initial=0.0), -mono_T.min(initial=0.0)))  # faster than abs; NaN stays NaN
    if not math.isfinite(peak):
        raise AudioError("its samples must be finite, got NaN or infinite ones; repair or remove it")
    if peak >= _MAX_PEAK:
        raise AudioError(f"its samples must be below 2**40 (full scale is 1), got {peak:.3g}; repair or remove it")


def _check_complete(recording: Recording, end: int, start_s: float, end_s: float, *, is_open: bool) -> None:
    """Compare the last decoded sample of the source with the segment and the promised length."""
    rate_hz, promised = recording.rate_hz, recording.num_samples
    if end == 0 and not promised:
        raise AudioError(_NO_SAMPLES)
    if max(end, promised or 0) <= round(start_s * rate_hz):
        duration_s = (promised or end) / rate_hz
        raise AudioError(f"start_s must be before the end at {duration_s:.3f} s, got {start_s} s; correct start_s")
    if is_open and end > round(end_s * rate_hz):
        raise AudioError(f"it must end by {end_s} s, got a longer one; cut it, or give end_s")
    wanted = min(end_s * rate_hz, promised or end) - start_s * rate_hz
    decoded = end - start_s * rate_hz
    if decoded <= 0 or decoded < _MIN_DECODED_FRACTION * wanted:
        decoded_s, wanted_s = max(0.0, decoded) / rate_hz, wanted / rate_hz
        cause = f"it is damaged: {decoded_s:.3f} of {wanted_s:.3f} s can be decoded"
        raise AudioError(f"cannot use it ({cause}); fetch it again")
