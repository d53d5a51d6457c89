"""Building blocks of synthesised sounds: random curves, coloured noise, harmonics, ringing, rhythms and rooms.

Shapes: T samples of a clip, N of one event, K partials, I blocks of B samples, F frequency bins.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Rng = np.random.Generator
Peaks = Iterable[tuple[float, float]]
"""Resonances: centre and width in Hz."""


def wide(rng: Rng, low: float, high: float) -> float:
    """One log-uniform draw."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def wides(rng: Rng, low: float, high: float, num: int) -> Array:
    """Several log-uniform draws."""
    return np.exp(rng.uniform(np.log(low), np.log(high), num))


def drift(rng: Rng, num_samples: int, num_knots: int, depth: float) -> Array:
    """A slow random curve [T] around 1, log-normal with the given depth."""
    knots = rng.normal(0.0, depth, max(2, num_knots))
    return np.exp(np.interp(np.linspace(0, len(knots) - 1, num_samples), np.arange(len(knots)), knots))


def filtered(x_T: Array, rate_hz: int, peaks: Peaks = (), tilt_db: float = 0.0) -> Array:
    """Weigh a spectrum by resonances over a −26 dB floor, and by a tilt in dB per octave."""
    hz_F = np.fft.rfftfreq(len(x_T), 1 / rate_hz)
    gain_F = (np.clip(hz_F, 60, None) / 1000) ** (tilt_db / 6.02) * np.clip(hz_F / 40, 0, 1)
    curves = [1 / (1 + ((hz_F - centre_hz) / (width_hz / 2)) ** 2) for centre_hz, width_hz in peaks]
    gain_F *= 0.05 + np.sum(curves, axis=0) if curves else 1.0
    return np.fft.irfft(np.fft.rfft(x_T) * gain_F, len(x_T))


def noise(rng: Rng, rate_hz: int, num: int, tilt_db: float, peaks: Peaks = ()) -> Array:
    """Coloured noise of unit RMS."""
    x = filtered(rng.standard_normal(num), rate_hz, peaks, tilt_db)
    return np.asarray(x / (np.sqrt(np.mean(x**2)) + 1e-12))


def _convolved(x_T: Array, response_N: Array) -> Array:
    """Causal convolution, cut to the length of ``x_T``."""
    size = 1 << (len(x_T) + len(response_N) - 2).bit_length()
    return np.fft.irfft(np.fft.rfft(x_T, size) * np.fft.rfft(response_N, size), size)[: len(x_T)]


def in_room(rng: Rng, rate_hz: int, dry_T: Array) -> Array:
    """Reverberate and colour: outdoors to hall, dull to bright microphone."""
    t60_s, wet = wide(rng, 0.06, 0.9), wide(rng, 0.02, 0.6)
    time_s = np.arange(int(t60_s * rate_hz)) / rate_hz
    tail = noise(rng, rate_hz, len(time_s), rng.uniform(-5.0, -1.0)) * np.exp(-6.9 * time_s / t60_s)
    response = wet * tail / np.linalg.norm(tail)
    response[0] += 1.0
    return filtered(_convolved(dry_T, response), rate_hz, tilt_db=rng.uniform(-2.0, 2.0))


def harmonics(hz_T: Array, rate_hz: int, gain_K: npt.ArrayLike) -> Array:
    """Sines at 1 to K times a moving pitch, faded out before Nyquist: one product per partial, no sine."""
    phase_T = np.cumsum(hz_T) * (2 * np.pi / rate_hz)
    twice_cos, last, now = 2 * np.cos(phase_T), np.zeros_like(phase_T), np.sin(phase_T)
    total, nearness_T = np.zeros_like(phase_T), hz_T * (20 / rate_hz)
    for k, gain in enumerate(np.asarray(gain_K)[: int(9.6 / nearness_T.min())], start=1):
        total += gain * now * np.clip(9.6 - k * nearness_T, 0, 1)
        last, now = now, twice_cos * now - last
    return total


def ringing(rate_hz: int, hz_K: Array, decay_s_K: Array, gain_K: Array) -> Array:
    """Sum of damped sines [N], the response of a struck object; each block is the previous one, rotated and damped."""
    num, block = int(min(6 * decay_s_K.max(), 6.0) * rate_hz) + 1, 256
    step_K1 = ((2j * np.pi * hz_K - 1 / decay_s_K) / rate_hz)[:, None]
    gain_K1 = np.where(hz_K < 0.47 * rate_hz, gain_K, 0.0)[:, None]
    coarse_KI = gain_K1 * np.exp(step_K1 * np.arange(0, num, block))
    return np.asarray((coarse_KI.T @ np.exp(step_K1 * np.arange(block))).imag.ravel()[:num])


def onsets(rng: Rng, span_s: float, period_s: float, jitter: float) -> Array:
    """Times of repeated events, at least one; ``jitter`` is the standard deviation of the period's logarithm."""
    gaps = period_s * np.exp(rng.normal(0.0, jitter, int(span_s / period_s * 1.5) + 3))
    times_s = rng.uniform(0.0, min(period_s, 0.3 * span_s)) + np.cumsum(gaps) - gaps[0]
    return np.asarray(times_s[times_s < max(span_s - 0.05, times_s[0] + 1e-9)])


def struck(num_samples: int, rate_hz: int, times_s: Array, gains: Array, response_N: Array) -> Array:
    """The same response at every time [T]; times after the end strike at the end."""
    hits_T = np.zeros(num_samples)
    np.add.at(hits_T, np.minimum(times_s * rate_hz, num_samples - 1).astype(int), gains)
    return _convolved(hits_T, response_N)


def mix_in(out_T: Array, rate_hz: int, time_s: float, event_N: Array) -> None:
    """Add an event to a clip, cut at the end of the clip."""
    room_T = out_T[int(time_s * rate_hz) :][: len(event_N)]
    room_T += event_N[: len(room_T)]
