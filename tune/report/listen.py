"""Audio of the sampled clips for the page: Opus and small spectrograms, as many clips as fit the budget.

Shape suffixes: T samples, F bins, N frames.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.audio.writer import encode_opus
from engine.passes.shards import read_clip
from tune.report.collect import PassFacts, RunFacts
from tune.report.parts import number_limits, score_text
from tune.report.sample import SampledClip, draw, verdict_text
from tune.report.stems import StemRow

MOST_CLIPS = 60
_MOST_S = 30.0  # of a clip, from its begin
_PEAK = 0.9  # of the loudest signal of a clip; all its signals have one gain
_MOST_GAIN = 100.0
BANDS, COLUMNS = 64, 240
_FRAME_S, _LOWEST_HZ, _RANGE_DB = 0.064, 50.0, 75.0
_MEL_HZ = 700.0
_Limits = Mapping[str, tuple[str, float]]  # rule and limit by score


@dataclass(frozen=True, kw_only=True)
class Score:
    """A score of a stem next to its limit."""

    name: str
    value: str
    limit: str = ""
    passes: bool = True


@dataclass(frozen=True, kw_only=True)
class PlayedSound:
    """A signal to play, in base64: audio, and spectrogram as ``BANDS`` by ``COLUMNS`` bytes, the lowest band first."""

    key: str
    opus: str
    picture: str


@dataclass(frozen=True, kw_only=True)
class PlayedStem:
    """A stem with its verdict and scores."""

    label: str
    sound: PlayedSound
    verdict: str
    is_kept: bool
    reason: str
    """The reason for which the stem is in the sample; empty for a stem that comes along."""
    scores: Sequence[Score]


@dataclass(frozen=True, kw_only=True)
class Version:
    """The stems of a clip in one pass."""

    letter: str
    name: str
    iteration: int | None
    fingerprint: str
    stems: Sequence[PlayedStem]


@dataclass(frozen=True, kw_only=True)
class PlayedClip:
    """A clip with its mixture and its stems in one pass or two."""

    clip_id: str
    path: str
    duration_s: float
    is_cut: bool
    """Only its first seconds are here."""
    mixture: PlayedSound
    versions: Sequence[Version]


def played_clips(facts: RunFacts, *, max_mb: float) -> list[PlayedClip]:
    """The sample of the last pass, each clip also as the first pass has it, in at most ``max_mb`` megabytes."""
    if not facts.passes or max_mb <= 0:
        return []
    passes = [facts.passes[0], facts.passes[-1]] if len(facts.passes) > 1 else [facts.passes[-1]]
    sampled = draw(passes[-1], most=MOST_CLIPS)
    rows = [one.stems.of_clips([clip.clip_id for clip in sampled]) for one in passes]
    limits = [number_limits(one) for one in passes]
    found, room = [], max_mb * 1e6
    for number, clip in enumerate(sampled):
        played = _played(f"c{number}", clip, passes, limits, [some.get(clip.clip_id, []) for some in rows])
        room -= sum(len(sound.opus) + len(sound.picture) for sound in _sounds(played))
        if room < 0:
            break
        found.append(played)
    return found


def _sounds(clip: PlayedClip) -> Iterator[PlayedSound]:
    yield clip.mixture
    yield from (stem.sound for version in clip.versions for stem in version.stems)


def sounds(clips: Sequence[PlayedClip]) -> dict[str, dict[str, str]]:
    """Audio and pictures of all clips by the keys of their sounds."""
    found = [sound for clip in clips for sound in _sounds(clip)]
    return {"opus": {one.key: one.opus for one in found}, "pictures": {one.key: one.picture for one in found}}


def judged_stems(clips: Sequence[PlayedClip]) -> dict[str, dict[str, object]]:
    """The identity of every stem by its key, exactly as it is stored: the columns of the verdicts' CSV."""
    return {
        stem.sound.key: {
            "pass": version.fingerprint,
            "iteration": "" if version.iteration is None else version.iteration,
            "clip_id": clip.clip_id,
            "path": clip.path,
            "label": stem.label,
            "outcome": stem.verdict,
        }
        for clip in clips
        for version in clip.versions
        for stem in version.stems
    }


def _played(
    key: str,
    clip: SampledClip,
    passes: Sequence[PassFacts],
    limits: Sequence[_Limits],
    rows: Sequence[Sequence[StemRow]],
) -> PlayedClip:
    signals = [_read(one, some) for one, some in zip(passes, rows, strict=True)]
    mixture_T, _, rate_hz = signals[-1]
    gain = common_gain(one_T for mix_T, stems, _ in signals for one_T in (mix_T, *stems.values()))
    top = strongest(gain * mixture_T, rate_hz)
    versions = []
    for letter, one, rules, some, (_, stems, hz) in zip(
        "AB"[-len(passes) :], passes, limits, rows, signals, strict=True
    ):
        reasons = clip.reasons if one is passes[-1] else {}
        if some:
            played = [
                PlayedStem(
                    label=row["label"],
                    sound=played_sound(f"{key}{letter}{number}", gain * stems[row["label"]], hz, top),
                    verdict=verdict_text(row, is_judged=one.stems.is_judged),
                    is_kept=row["rejected_by"] is None,
                    reason=reasons.get(row["label"], ""),
                    scores=list(_scores(row, rules)),
                )
                for number, row in enumerate(some)
                if row["label"] in stems
            ]
            versions.append(
                Version(
                    letter=letter,
                    name=one.name,
                    iteration=one.number,
                    fingerprint=one.summary["fingerprint"],
                    stems=played,
                )
            )
    return PlayedClip(
        clip_id=clip.clip_id,
        path=clip.path,
        duration_s=len(mixture_T) / rate_hz,
        is_cut=len(mixture_T) < rows[-1][0]["num_samples"],
        mixture=played_sound(f"{key}m", gain * mixture_T, rate_hz, top),
        versions=versions,
    )


def _read(one: PassFacts, rows: Sequence[StemRow]) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    """The first seconds of a clip's mixture and stems, and their rate."""
    if not rows:
        return np.zeros(0, np.float32), {}, 1
    first = rows[0]
    mixture_T, stems = read_clip(
        one.folder / "stems", first["shard"], first_row=first["first_row"], num_stems=first["num_stems"]
    )
    rate_hz = first["sample_rate_hz"]
    most = round(_MOST_S * rate_hz)
    return mixture_T[:most], {label: stem_T[:most] for label, stem_T in stems.items()}, rate_hz


def _scores(row: StemRow, limits: _Limits) -> Iterator[Score]:
    """The scores that have a limit; without limits, all that are defined."""
    for name, value in row["scores"].items():
        if value is None or (limits and name not in limits) or (not limits and name == "estimated_error_db"):
            continue
        text, unit = score_text(name)
        rule, limit = limits.get(name, ("", 0.0))
        is_min = rule.startswith("min_")
        yield Score(
            name=text,
            value=f"{value:.1f}{unit}" if unit else f"{value:.3f}",
            limit=f"{'≥' if is_min else '≤'} {limit:g}" if rule else "",
            passes=not rule or (value >= limit if is_min else value <= limit),
        )


def common_gain(signals: Iterable[np.ndarray]) -> float:
    """The gain with which the loudest of some signals has a peak of 0.9."""
    loudest = max((float(np.abs(one_T).max(initial=0.0)) for one_T in signals), default=0.0)
    return min(_MOST_GAIN, _PEAK / loudest) if loudest else 1.0


def strongest(samples_T: np.ndarray, rate_hz: int) -> float:
    """The strongest power in the spectrogram of a signal."""
    return float(_power(samples_T, rate_hz).max(initial=1e-12))


def played_sound(key: str, samples_T: np.ndarray, rate_hz: int, top: float) -> PlayedSound:
    """A signal to play; the levels in its spectrogram are relative to ``top``."""
    opus = encode_opus(np.clip(samples_T, -1.0, 1.0), sample_rate_hz=rate_hz)
    level_FN = 10.0 * np.log10(_power(samples_T, rate_hz) / top + 1e-12) / _RANGE_DB + 1.0
    bytes_FN = np.round(255.0 * np.clip(level_FN, 0.0, 1.0)).astype(np.uint8)
    return PlayedSound(key=key, opus=_base64(opus), picture=_base64(bytes_FN.tobytes()))


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _power(samples_T: np.ndarray, rate_hz: int) -> np.ndarray:
    """The strongest power in each of ``BANDS`` mel bands at ``COLUMNS`` times."""
    size = 2 ** max(5, round(np.log2(_FRAME_S * rate_hz)))
    padded_T = np.pad(samples_T, (size // 2, size))
    starts = np.linspace(0, len(samples_T), COLUMNS, endpoint=False).astype(int)
    frames_NT = np.stack([padded_T[start : start + size] for start in starts]) * np.hanning(size)
    power_FN = (np.abs(np.fft.rfft(frames_NT, axis=1)) ** 2).T
    mels = np.linspace(np.log1p(_LOWEST_HZ / _MEL_HZ), np.log1p(rate_hz / 2 / _MEL_HZ), BANDS + 1)
    bins = np.clip((_MEL_HZ * np.expm1(mels) * size / rate_hz).astype(int), 0, len(power_FN) - 1)
    found: np.ndarray = np.maximum.reduceat(power_FN, bins[:-1], axis=0)
    return found
