"""Activity and level of samples ``[T]``."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.audio.sndfile import Samples

_WINDOW_S = 0.1
_FLOOR_DB = -40.0


def _window_starts(num_samples: int, sample_rate_hz: int, window_s: float) -> NDArray[np.int64]:
    return np.arange(0, num_samples, max(1, round(window_s * sample_rate_hz)))


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
