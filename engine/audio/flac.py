"""Audio for storage: 24-bit FLAC of samples divided by a power of two, so that no stem is too loud or too quiet.

The exponent is our own because FLAC stores integers only: libsndfile would clip loud stems and round quiet ones to few
steps.

Shape legend: ``T`` samples.
"""

from __future__ import annotations

import io
import math

import numpy as np
import soundfile as sf

from engine.audio.sndfile import Samples

_FLAC_MAX_RATE_HZ = 655_350
_FLAC_EXPONENTS = (-24, 40)


def encode_flac24(
    samples_T: Samples, *, sample_rate_hz: int, min_exponent: int = _FLAC_EXPONENTS[0]
) -> tuple[bytes, int]:
    """Encode ``samples_T / 2**exponent`` with the smallest exponent (-24 to 40) that fits the peak; return both.

    The error is at most ``2**(exponent - 24)``; encoding decoded samples again is exact. No samples give no bytes.
    With ``min_exponent=0``, any program reads the samples as they are from the bytes, unless their peak is above 1.

    Raises ValueError above 655,350 Hz, for NaN or infinity and for peaks of 2**40 or more.
    """
    if not 1 <= sample_rate_hz <= _FLAC_MAX_RATE_HZ:
        raise ValueError(f"a rate for FLAC must be 1 to {_FLAC_MAX_RATE_HZ} Hz, got {sample_rate_hz}; resample first")
    if not len(samples_T):
        return b"", 0
    steps_T, exponent = _steps(samples_T, min_exponent)
    buffer, integers_T = io.BytesIO(), steps_T.astype(np.int32)
    integers_T <<= 8
    sf.write(buffer, integers_T, sample_rate_hz, format="FLAC", subtype="PCM_24")
    return buffer.getvalue(), exponent


def decode_flac24(data: bytes, exponent: int) -> Samples:
    """Decode samples ``[T]`` from :func:`encode_flac24`: 24-bit steps times ``2**(exponent - 23)``, exactly.

    Raises ``ValueError`` for data that :func:`encode_flac24` has not made.
    """
    if not data:
        return np.zeros(0, np.float32)
    try:
        steps_T, _ = sf.read(io.BytesIO(data), dtype="int32")
    except sf.LibsndfileError as error:
        raise ValueError(f"cannot decode stored FLAC ({error}); make the shard again") from error
    samples_T: Samples = (steps_T >> 8).astype(np.float32) * np.float32(2.0 ** (exponent - 23))
    return samples_T


def round_flac24(samples_T: Samples) -> Samples:
    """Round samples as :func:`encode_flac24` and :func:`decode_flac24` do, without the coding."""
    steps_T, exponent = _steps(samples_T)
    return steps_T * np.float32(2.0 ** (exponent - 23))


def _steps(samples_T: Samples, min_exponent: int = _FLAC_EXPONENTS[0]) -> tuple[Samples, int]:
    """Samples as 24-bit integers and their exponent; scaling by a power of two is exact."""
    samples_T = np.asarray(samples_T, np.float32)
    peak = float(np.max(np.abs(samples_T), initial=0.0))
    if not peak < 2.0 ** _FLAC_EXPONENTS[1]:
        raise ValueError(f"samples must be finite and below 2**40, got a peak of {peak}; check the separator")
    exponent = max(math.frexp(peak)[1], min_exponent) if peak else 0
    steps_T = samples_T * np.float32(2.0 ** (23 - exponent))
    np.rint(steps_T, out=steps_T)
    return np.clip(steps_T, 1 - 2**23, 2**23 - 1, out=steps_T), exponent  # symmetric: -2**23 would need exponent + 1
