"""Audio for storage: 24-bit FLAC of samples divided by a power of two, so that no stem is too loud or too quiet.

The exponent is our own because FLAC stores integers only: libsndfile would clip loud stems and round quiet ones to few
steps.

Shape legend: ``T`` samples; ``...`` any leading dimensions, or none.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
import soundfile as sf
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.audio.sndfile import Samples

_FLAC_MAX_RATE_HZ = 655_350
_FLAC_EXPONENTS = (-24, 40)
_UNFIT = 127  # exponent of samples that cannot be stored


class Steps(NamedTuple):
    """Signals as they are stored, on the device of the samples."""

    integers: Tensor
    """24-bit steps ``[..., T]`` in the upper bits of int32, as libsndfile takes them."""
    exponents: Tensor
    """Of each signal ``[...]``, int32: a step is ``2**(exponent - 23)``."""
    rounded: Tensor
    """Samples ``[..., T]`` (float32) that :func:`decode_flac24` will return."""


def flac24_steps(samples: Tensor, *, min_exponent: int = _FLAC_EXPONENTS[0]) -> Steps:
    """Signals ``[..., T]`` as integers, with the smallest exponents (-24 to 40) that fit their peaks; does not wait."""
    samples = samples.float()
    if samples.shape[-1]:
        peak = torch.maximum(samples.amax(-1), -samples.amin(-1))
    else:
        peak = samples.new_zeros(samples.shape[:-1])
    exponents = torch.frexp(peak).exponent.clamp(min=min_exponent).where(peak > 0, 0)
    exponents = exponents.where(peak < 2.0 ** _FLAC_EXPONENTS[1], _UNFIT)
    steps = (samples * _power_of_two(23 - exponents)[..., None]).round_()
    steps.clamp_(1 - 2**23, 2**23 - 1)  # symmetric: -2**23 would need exponent + 1
    rounded = steps * _power_of_two(exponents - 23)[..., None]
    return Steps(steps.int().bitwise_left_shift_(8), exponents, rounded)


def _power_of_two(exponents: Tensor) -> Tensor:
    """Exactly 2**exponent, from its bits."""
    return ((exponents.int() + 127) << 23).view(torch.float32)


def encode_steps(integers_T: NDArray[np.int32], exponent: int, *, sample_rate_hz: int) -> bytes:
    """The FLAC of one signal's :class:`Steps`; no samples give no bytes.

    Raises ValueError above 655,350 Hz, for NaN or infinity and for peaks of 2**40 or more.
    """
    if not 1 <= sample_rate_hz <= _FLAC_MAX_RATE_HZ:
        raise ValueError(f"a rate for FLAC must be 1 to {_FLAC_MAX_RATE_HZ} Hz, got {sample_rate_hz}; resample first")
    if exponent == _UNFIT:
        raise ValueError("samples must be finite and below 2**40, got others; check the separator")
    if not len(integers_T):
        return b""
    buffer = io.BytesIO()
    sf.write(buffer, integers_T, sample_rate_hz, format="FLAC", subtype="PCM_24")
    return buffer.getvalue()


def encode_flac24(
    samples_T: Samples, *, sample_rate_hz: int, min_exponent: int = _FLAC_EXPONENTS[0]
) -> tuple[bytes, int]:
    """Encode ``samples_T / 2**exponent`` with the smallest exponent (-24 to 40) that fits the peak; return both.

    The error is at most ``2**(exponent - 24)``; encoding decoded samples again is exact. No samples give no bytes.
    With ``min_exponent=0``, any program reads the samples as they are from the bytes, unless their peak is above 1.

    Raises ValueError as :func:`encode_steps` does.
    """
    steps = flac24_steps(torch.from_numpy(np.array(samples_T, np.float32)), min_exponent=min_exponent)
    exponent = int(steps.exponents)
    return encode_steps(steps.integers.numpy(), exponent, sample_rate_hz=sample_rate_hz), exponent


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
