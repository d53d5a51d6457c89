"""Eight synthesised kinds of sound, for a demo without a download.

Every clip draws its source (small or large dog, wail or hi-lo siren, gravel or wood), rhythm, timbre, room and
microphone from wide ranges, so that a separator trained on few clips is tested on sounds that it has not learned.
Shapes: T samples of a clip, N of one event, K partials.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import soundfile

from engine.errors import nearest
from tune.demo.signals import (
    Array,
    Rng,
    drift,
    filtered,
    harmonics,
    in_room,
    mix_in,
    noise,
    onsets,
    ringing,
    struck,
    wide,
    wides,
)

LABELS = ("dog_bark", "siren", "rain", "clock_tick", "engine", "bird_chirp", "bell", "footsteps")


def sound(
    label: str, *, rng: np.random.Generator, sample_rate_hz: int = 16000, duration_s: float = 4.0
) -> npt.NDArray[np.float32]:
    """Draw one new single-source clip of a label.

    Returns [T] with a peak of 0.2 to 0.9 and a faint background; two clips in five sound part of the time.
    Raises ValueError for an unknown label, a rate below 16000 Hz or a clip shorter than 0.25 s.
    """
    if label not in LABELS:
        raise ValueError(f"there is no sound {label!r}; {nearest(label, LABELS)}")
    if sample_rate_hz < 16000 or duration_s < 0.25:
        got = f"{sample_rate_hz} Hz and {duration_s} s"
        raise ValueError(f"a clip must have at least 16000 Hz and 0.25 s, got {got}; raise them")
    num_samples = round(duration_s * sample_rate_hz)
    active = int(num_samples * (rng.uniform(0.35, 0.9) if rng.random() < 0.4 else 1.0))
    start = int(rng.integers(num_samples - active + 1))
    ramp = np.minimum(1.0, np.arange(active) / (sample_rate_hz * wide(rng, 0.003, 0.08)))
    voice = _VOICES[label](rng, sample_rate_hz, active) * ramp * ramp[::-1]
    clip_T = in_room(rng, sample_rate_hz, np.pad(voice, (start, num_samples - active - start)))
    hum_T = noise(rng, sample_rate_hz, num_samples, rng.uniform(-6.0, 0.0))
    clip_T = clip_T / np.abs(clip_T).max() + 10 ** (rng.uniform(-60.0, -45.0) / 20) * hum_T
    return np.asarray(clip_T * (wide(rng, 0.2, 0.899) / np.abs(clip_T).max()), dtype=np.float32)


def write_clips(
    folder: str | Path,
    *,
    num_per_label: int,
    fold: int,
    seed: int,
    sample_rate_hz: int = 16000,
    duration_s: float = 4.0,
) -> list[dict[str, str | int]]:
    """Write one fold as 16-bit `audio/<label>-<fold>-<i>.flac` and return its rows (path, label, fold).

    Clip i depends on (seed, fold, label, i) alone, so more clips leave the earlier ones as they are.
    """
    (Path(folder) / "audio").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, str | int]] = []
    for label_index, i in np.ndindex(len(LABELS), num_per_label):
        label, rng = LABELS[label_index], np.random.default_rng([seed, fold, label_index, i])
        clip_T = sound(label, rng=rng, sample_rate_hz=sample_rate_hz, duration_s=duration_s)
        path = f"audio/{label}-{fold}-{i}.flac"
        soundfile.write(Path(folder) / path, clip_T, sample_rate_hz, subtype="PCM_16")
        rows.append({"path": path, "label": label, "fold": fold})
    return rows


def write_corpus(
    folder: str | Path,
    *,
    num_per_label: dict[int, int],
    seed: int,
    sample_rate_hz: int = 16000,
    duration_s: float = 4.0,
) -> Path:
    """Write folds (fold → clips per label) and `clips.csv` (relative path, label, fold); return the table."""
    write = partial(write_clips, folder, seed=seed, sample_rate_hz=sample_rate_hz, duration_s=duration_s)
    rows = [row for fold, num in sorted(num_per_label.items()) for row in write(num_per_label=num, fold=fold)]
    lines = ["path,label,fold", *(f"{row['path']},{row['label']},{row['fold']}" for row in rows)]
    (table := Path(folder) / "clips.csv").write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return table


# The eight sources: (rng, rate in Hz, T) → [T] of any level.


def _dog_bark(rng: Rng, rate_hz: int, num_samples: int) -> Array:
    """Barks or volleys of a large, middling or small dog: voiced bursts and breath through formants."""
    low_hz, high_hz, throat = ((100, 230, 0.7), (230, 450, 1.0), (450, 1100, 1.6))[rng.integers(3)]
    pitch_hz, bark_s = wide(rng, low_hz, high_hz), wide(rng, 0.07, 0.25) / throat**0.7
    bend, breath, growl = rng.uniform(-0.3, 0.7), wide(rng, 0.03, 0.7), rng.uniform(0.0, 0.8)
    gain_K = np.arange(1, 41) ** -rng.uniform(0.3, 1.6)
    growl_hz, attack, gap_s = wide(rng, 20, 90), wide(rng, 0.1, 0.8), bark_s * rng.uniform(1.1, 2.5)
    volley_s = gap_s * np.arange(rng.integers(1, 5))
    starts_s = onsets(rng, num_samples / rate_hz, volley_s[-1] + gap_s + wide(rng, 0.3, 1.8), 0.2)
    out_T = np.zeros(num_samples)
    for time_s in (starts_s[:, None] + volley_s).ravel():
        length_s = bark_s * rng.uniform(0.8, 1.3)
        u_N = np.linspace(0, 1, int(length_s * rate_hz))
        hz_N = pitch_hz * rng.uniform(0.88, 1.14) * (1 + bend * np.sin(np.pi * u_N**0.6) - 0.3 * u_N)
        throb_N = 1 + growl * np.sin(2 * np.pi * growl_hz * length_s * u_N)
        bark_N = harmonics(hz_N, rate_hz, gain_K) * throb_N
        bark_N += breath * rng.standard_normal(len(u_N)) * np.abs(bark_N).max()
        mix_in(out_T, rate_hz, time_s, bark_N * u_N**attack * (1 - u_N) ** 1.3 * rng.uniform(0.5, 1.0))
    vowel_hz = throat * np.array([550, 1250, 2600]) * wides(rng, 0.75, 1.35, 3)
    return filtered(out_T, rate_hz, zip(vowel_hz, throat * np.array([300, 400, 800]), strict=True))


def _siren(rng: Rng, rate_hz: int, num_samples: int) -> Array:
    """A slow wail, a fast yelp or a two-tone hi-lo, with its horn's timbre and a little Doppler."""
    kind = rng.integers(3)
    turn_s = wide(rng, *((2.0, 5.0), (0.18, 0.5), (0.7, 2.0))[kind])
    ratio = rng.uniform(1.18, 1.5) if kind == 2 else rng.uniform(1.5, 2.7)
    u_T = (np.arange(num_samples) / rate_hz / turn_s + rng.uniform()) % 1
    rise, low_hz = rng.uniform(0.15, 0.85), wide(rng, 320, 950)
    glide_T = np.minimum(u_T / rise, (1 - u_T) / (1 - rise)) ** wide(rng, 0.6, 1.5)
    jump_T = 0.5 + 0.5 * np.tanh(wide(rng, 4, 30) * np.sin(2 * np.pi * u_T))
    hz_T = low_hz * ratio ** (jump_T if kind == 2 else glide_T) * drift(rng, num_samples, 3, 0.03)
    gain_K = np.arange(1, 15) ** -rng.uniform(0.4, 2.2)
    gain_K[1::2] *= rng.choice([0.05, 1.0])  # a square wave, or not
    horn = [(wide(rng, 500, 3200), wide(rng, 400, 3000)) for _ in range(2)]
    return filtered(harmonics(hz_T, rate_hz, gain_K) * drift(rng, num_samples, 5, 0.35), rate_hz, horn)


def _rain(rng: Rng, rate_hz: int, num_samples: int) -> Array:
    """A dense bed, from drizzle's hiss to a downpour's roar, and droplets that ring on leaf, tin or water."""
    span_s, num_peaks = num_samples / rate_hz, int(rng.integers(1, 4))
    surface = zip(wides(rng, 300, 6500, num_peaks), wides(rng, 600, 5000, num_peaks), strict=True)
    rain_T = noise(rng, rate_hz, num_samples, rng.uniform(-0.5, 3.0), surface) * wide(rng, 0.02, 2.0)
    low_hz, decay_s, per_s = wide(rng, 500, 3000), wide(rng, 0.0008, 0.007), wide(rng, 2, 50)
    drops_T = np.zeros(num_samples)
    for drop_hz in low_hz * wides(rng, 1, 3, 7):
        times_s = rng.uniform(0, span_s, 1 + rng.poisson(per_s * span_s))
        ring_N = ringing(rate_hz, drop_hz * np.ones(1), decay_s * wides(rng, 0.5, 2, 1), np.ones(1))
        drops_T += struck(num_samples, rate_hz, times_s, wides(rng, 0.1, 1.0, len(times_s)), ring_N)
    return rain_T * drift(rng, num_samples, 7, 0.25) + drops_T * drift(rng, num_samples, 6, 0.3)


def _clock_tick(rng: Rng, rate_hz: int, num_samples: int) -> Array:
    """A watch, a wall clock or a long-case clock: even clicks, tick and tock with their own resonances."""
    kind = rng.integers(3)
    low_hz, high_hz = ((2500, 7000), (1200, 5500), (350, 2500))[kind]
    period_s = wide(rng, *((0.15, 0.3), (0.3, 0.75), (0.6, 1.1))[kind])
    times_s, decay_s = onsets(rng, num_samples / rate_hz, period_s, 0.004), wide(rng, 0.002, 0.02)
    lame_s = period_s * rng.uniform(0.0, 0.12)  # a clock out of beat
    out_T = np.zeros(num_samples)
    for side in range(2):
        num = int(rng.integers(2, 6))
        hz_K, gain_K = wides(rng, low_hz, high_hz, num), wides(rng, 0.2, 1.0, num)
        click_N = ringing(rate_hz, hz_K, decay_s * wides(rng, 0.4, 2.0, num), gain_K)
        scrape_N = rng.uniform() * noise(rng, rate_hz, len(click_N), 2.0)
        click_N += scrape_N * np.exp(-np.arange(len(click_N)) / (0.0015 * rate_hz))
        beat_s = times_s[side::2] + side * lame_s
        gains = rng.uniform(0.4, 1.0) * rng.uniform(0.8, 1.0, len(beat_s))
        out_T += struck(num_samples, rate_hz, beat_s, gains, click_N)
    return out_T


def _engine(rng: Rng, rate_hz: int, num_samples: int) -> Array:
    """A diesel, a car or a small motor: uneven low harmonics and noise that pulses with the firing."""
    low_hz, high_hz, tilt_db = ((11, 28, -4.0), (25, 70, -3.0), (70, 190, -1.0))[rng.integers(3)]
    revs, cylinders = rng.choice([0.02, rng.uniform(0.02, 0.5)]), int(rng.integers(1, 5))  # steady or revved
    hz_T = wide(rng, low_hz, high_hz) * drift(rng, num_samples, int(rng.integers(3, 9)), revs)
    hz_T *= drift(rng, num_samples, num_samples * 12 // rate_hz, 0.01)
    number_K = np.arange(1, 61)
    gain_K = wides(rng, 0.15, 1.0, 60) * number_K ** -rng.uniform(0.2, 1.2)
    gain_K[number_K % cylinders != 0] *= wide(rng, 0.03, 0.7)
    exhaust = [(wide(rng, 70, 700), wide(rng, 80, 500)), (wide(rng, 500, 2500), 900.0)]
    tone_T = filtered(harmonics(hz_T, rate_hz, gain_K), rate_hz, exhaust)
    hiss_T = noise(rng, rate_hz, num_samples, tilt_db + rng.uniform(-2, 2), exhaust) * wide(rng, 0.1, 1.5)
    firing_T = cylinders * np.cumsum(hz_T) * (2 * np.pi / rate_hz) + rng.uniform(0, 6)
    hiss_T *= (0.5 + 0.5 * np.cos(firing_T)) ** wide(rng, 0.3, 8.0)
    tone_T /= np.sqrt(np.mean(tone_T**2))
    return (tone_T + hiss_T) * drift(rng, num_samples, 6, 0.15)


def _syllable(rng: Rng, rate_hz: int, centre_hz: float, length_s: float) -> Array:
    """One whistle of 1650 to 6600 Hz: a random glide and arch, with or without a fast trill."""
    u_N = np.linspace(0, 1, int(length_s * rate_hz))
    octaves_N = np.log2(centre_hz / 3300) + rng.uniform(-0.4, 0.4) + rng.uniform(-0.7, 0.7) * (u_N - 0.5)
    octaves_N += rng.uniform(-0.6, 0.6) * np.sin(np.pi * u_N)
    if rng.random() < 0.4:
        octaves_N += rng.uniform(0.05, 0.3) * np.sin(2 * np.pi * wide(rng, 18, 70) * length_s * u_N)
    voice_N = harmonics(3300 * 2 ** np.tanh(octaves_N), rate_hz, [1.0, *wides(rng, 0.005, 0.25, 2)])
    return np.asarray(voice_N * np.sin(np.pi * u_N ** wide(rng, 0.5, 1.6)) ** wide(rng, 0.4, 2.0))


def _bird_chirp(rng: Rng, rate_hz: int, num_samples: int) -> Array:
    """A repeated motif of one to five syllables: chatter, trill or slow whistles."""
    centre_hz, note_s, num = wide(rng, 2000, 5500), wide(rng, 0.03, 0.3), int(rng.integers(1, 6))
    notes = [_syllable(rng, rate_hz, centre_hz, note_s * rng.uniform(0.5, 1.5)) for _ in range(num)]
    levels, rest_s = rng.uniform(0.3, 1.0, num), note_s * wide(rng, 0.1, 1.0)
    lengths_s = np.array([len(note_N) / rate_hz + rest_s for note_N in notes])
    offsets_s, period_s = np.cumsum(lengths_s) - lengths_s, lengths_s.sum() + wide(rng, 0.02, 1.2)
    out_T = np.zeros(num_samples)
    for start_s in onsets(rng, num_samples / rate_hz, period_s, 0.1):
        for note_N, level, time_s in zip(notes, levels, start_s + offsets_s, strict=True):
            mix_in(out_T, rate_hz, time_s, level * rng.uniform(0.5, 1.0) * note_N)
    return out_T


def _bell(rng: Rng, rate_hz: int, num_samples: int) -> Array:
    """A church bell, a bar chime or a bicycle's rattle: inharmonic partials that each decay at their own rate."""
    kind, church = rng.integers(3), (0.5, 1.0, 1.2, 1.5, 2.0, 2.5, 2.66, 3.0, 4.0, 5.3)
    ratio_K = np.array((church, (1.0, 2.76, 5.4, 8.93, 13.3), (1.0, 1.58, 2.24, 2.92, 3.6, 4.6))[kind])
    ratio_K = ratio_K * wides(rng, 0.96, 1.04, len(ratio_K))
    hz_K = ratio_K * wide(rng, *((180, 800), (350, 1900), (900, 2600))[kind])
    ring_s = wide(rng, *((0.5, 2.5), (0.3, 1.6), (0.08, 0.5))[kind])
    decay_s_K = ring_s * ratio_K ** -rng.uniform(0.3, 1.2) * wides(rng, 0.6, 1.5, len(hz_K))
    gain_K = wides(rng, 0.15, 1.0, len(hz_K)) * ratio_K ** -rng.uniform(-0.3, 0.9)
    split_K = hz_K + rng.uniform(0.2, 5.0, len(hz_K))  # no bell is perfectly round: partials beat
    tone_N = ringing(rate_hz, hz_K, decay_s_K, gain_K)
    tone_N += rng.uniform(0.0, 0.8) * ringing(rate_hz, split_K, decay_s_K, gain_K)
    period_s = wide(rng, 0.05, 0.12) if kind == 2 and rng.random() < 0.7 else wide(rng, 0.5, 3.5)
    times_s = onsets(rng, num_samples / rate_hz, period_s, 0.08)
    return struck(num_samples, rate_hz, times_s, rng.uniform(0.4, 1.0, len(times_s)), tone_N)


def _footsteps(rng: Rng, rate_hz: int, num_samples: int) -> Array:
    """A stroll to a run on wood, stone, gravel or grass: a thud at each step, then a scuff of the ground."""
    ground = rng.integers(4)
    knock_hz = wide(rng, *((120, 500), (200, 1500), (60, 180), (50, 140))[ground])
    scuff = wide(rng, *((0.03, 0.3), (0.05, 0.5), (0.4, 2.0), (0.2, 1.0))[ground])
    scuff_s, scuff_hz, lag_s = wide(rng, 0.02, 0.15), wide(rng, 500, 4500), rng.uniform(0.0, 0.08)
    pebbles = wide(rng, 0.005, 0.05) if ground == 2 else 1.0  # fraction of samples that one hits
    hz_K, limp = knock_hz * np.array([1.0, 1.7, 2.9]) * wides(rng, 0.8, 1.2, 3), rng.uniform(0.85, 1.18)
    decay_s_K, gain_K = np.full(3, wide(rng, 0.008, 0.04)), np.array([1.0, *rng.uniform(0.05, 0.6, 2)])
    out_T = np.zeros(num_samples)
    for i, time_s in enumerate(onsets(rng, num_samples / rate_hz, wide(rng, 0.24, 0.95), 0.06)):
        foot = limp ** (i % 2) * rng.uniform(0.93, 1.07)
        mix_in(out_T, rate_hz, time_s, rng.uniform(0.6, 1) * ringing(rate_hz, hz_K * foot, decay_s_K, gain_K))
        u_N = np.linspace(0, 1, int(scuff_s * rng.uniform(0.7, 1.4) * rate_hz))
        hit_N = (rng.random(len(u_N)) < pebbles) * rng.standard_normal(len(u_N)) / np.sqrt(pebbles)
        hit_N = filtered(hit_N * u_N**0.4 * (1 - u_N) ** 2, rate_hz, [(scuff_hz * foot, scuff_hz)])
        mix_in(out_T, rate_hz, time_s + lag_s, scuff * rng.uniform(0.4, 1.2) * hit_N)
    return out_T


_SOURCES = (_dog_bark, _siren, _rain, _clock_tick, _engine, _bird_chirp, _bell, _footsteps)
_VOICES: dict[str, Callable[[Rng, int, int], Array]] = dict(zip(LABELS, _SOURCES, strict=True))
