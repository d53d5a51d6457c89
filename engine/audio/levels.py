"""TODO engine/audio/levels.py."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.audio.readers import Samples


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
