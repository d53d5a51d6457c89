"""Activity and level of samples ``[T]``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from engine.audio.sndfile import Samples

_WINDOW_S = 0.1
_FLOOR_DB = -40.0
_EDGE_S = 0.01
_WINDOWS_AT_ONCE = 10
SILENCE_DBFS = -90.0
"""A clip is silent if no window of 0.1 s has more than this, RMS: the last bit of 16 has -96 with dither."""


def _window_starts(num_samples: int, sample_rate_hz: int, window_s: float) -> NDArray[np.int64]:
    return np.arange(0, num_samples, max(1, round(window_s * sample_rate_hz)))


def window_energies(samples_T: Samples, *, sample_rate_hz: int) -> NDArray[np.float64]:
    """Energy of each window of 0.1 s around its mean, so that a constant offset has none."""
    starts = _window_starts(len(samples_T), sample_rate_hz, _WINDOW_S)
    if not len(starts):
        return np.zeros(0)
    lengths = np.diff(starts, append=len(samples_T))
    means = np.add.reduceat(samples_T, starts, dtype=np.float64) / lengths
    energies: NDArray[np.float64] = np.add.reduceat(np.square(samples_T - np.repeat(means, lengths)), starts)
    return energies


def is_silent(samples_T: Samples, *, sample_rate_hz: int) -> bool:
    """True for digital silence, a constant offset, and what stays below ``SILENCE_DBFS``.

    The first and last 10 ms do not count: a constant offset rings there if it was resampled.
    """
    edge = round(_EDGE_S * sample_rate_hz)
    samples_T = samples_T[edge : len(samples_T) - edge] if len(samples_T) > 4 * edge else samples_T
    size = _WINDOWS_AT_ONCE * max(1, round(_WINDOW_S * sample_rate_hz))
    return not any(  # mostly, the first windows decide
        _has_sound(samples_T[first : first + size], sample_rate_hz) for first in range(0, len(samples_T), size)
    )


def _has_sound(samples_T: Samples, sample_rate_hz: int) -> bool:
    starts = _window_starts(len(samples_T), sample_rate_hz, _WINDOW_S)
    powers = window_energies(samples_T, sample_rate_hz=sample_rate_hz) / np.diff(starts, append=len(samples_T))
    return not powers.max(initial=0.0) < 10 ** (SILENCE_DBFS / 10)


def active_mask(samples_T: Samples, *, sample_rate_hz: int, window_s: float = _WINDOW_S) -> NDArray[np.bool_]:
    """True for each window whose mean power is within 40 dB of the loudest window's; the last may be a partial one."""
    starts = _window_starts(len(samples_T), sample_rate_hz, window_s)
    if not len(starts):
        return np.zeros(0, np.bool_)
    power = np.add.reduceat(np.square(samples_T, dtype=np.float64), starts)
    power /= np.diff(starts, append=len(samples_T))
    mask: NDArray[np.bool_] = (power > 0) & (power >= power.max() * 10 ** (_FLOOR_DB / 10))
    return mask


def active_rms(samples_T: Samples, *, sample_rate_hz: int) -> float:
    """RMS over the active windows of 0.1 s; 0.0 for silence."""
    starts = _window_starts(len(samples_T), sample_rate_hz, _WINDOW_S)
    mask = active_mask(samples_T, sample_rate_hz=sample_rate_hz)
    active_T = np.repeat(mask, np.diff(starts, append=len(samples_T)))
    return float(np.sqrt(np.mean(np.square(samples_T[active_T], dtype=np.float64)))) if mask.any() else 0.0
