"""Audio of the sampled clips for the page: Opus and small spectrograms, as many clips as fit the budget.

Shape suffixes: T samples, F bins, N frames.
"""

from __future__ import annotations

import base64
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from engine.audio.writer import encode_opus
from engine.cli.tables import Table
from engine.passes.shards import read_clip
from engine.schema import FailureRow
from tune.report.collect import PassFacts, RunFacts
from tune.report.parts import number_limits, score_text
from tune.report.sample import SampledClip, draw, verdict_text
from tune.report.stems import StemRow
from tune.report.truth import Truth

MOST_CLIPS = 60
_MOST_S = 30.0  # of a clip, from its begin
_MOST_FAILED = 12  # clips without audio
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
class FailedLabel:
    """A label of a clip that has no stem."""

    label: str
    error: str


@dataclass(frozen=True, kw_only=True)
class Version:
    """The stems of a clip in one pass, of this run or of one that it is compared with."""

    letter: str
    name: str
    iteration: int | None
    fingerprint: str
    stems: Sequence[PlayedStem]
    failed: Sequence[FailedLabel]


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


@dataclass(frozen=True, kw_only=True)
class _Side:
    """A pass whose stems are played."""

    letter: str
    name: str
    of: PassFacts
    limits: _Limits
    rows: Mapping[str, Sequence[StemRow]]
    """The stems of the sampled clips that it has, by clip."""
    truth: Truth | None


def played_clips(
    facts: RunFacts, *, max_mb: float, other: RunFacts | None = None, truth: Truth | None = None
) -> list[PlayedClip]:
    """The sample of the last pass in at most ``max_mb`` megabytes, each clip also as another pass has it.

    That is the first pass of the run, or the last one of an ``other`` run. With ``truth``, stems have a true SI-SDR.
    """
    if not facts.passes or max_mb <= 0:
        return []
    before = facts.passes[:-1][:1] if other is None else other.passes[-1:]
    sampled = draw(facts.passes[-1], most=MOST_CLIPS)
    sides = [
        _Side(
            letter=letter,
            name=one.name if other is None else f"{run}, {one.name}",
            of=one,
            limits=number_limits(one),
            rows=one.stems.of_clips([clip.clip_id for clip in sampled]),
            truth=truth,
        )
        for letter, run, one in (
            *(("A", "the other", one) for one in before),
            ("B", "this run", facts.passes[-1]),
        )
    ]
    found, room = [], max_mb * 1e6
    for number, clip in enumerate(sampled):
        played = _played(f"c{number}", clip, sides)
        if played is None:
            continue
        room -= sum(len(sound.opus) + len(sound.picture) for sound in _sounds(played))
        if room < 0:
            break
        found.append(played)
    return found


def failed_clips(one: PassFacts) -> Table:
    """Examples of the clips that failed as a whole, of which there is no audio."""
    rows = [[row["path"], error_text(row)] for row in one.failed if row["label"] is None]
    title = "Clips that failed as a whole: there is no audio of them"
    return Table(title=title, columns=["clip", "failure"], rows=rows[:_MOST_FAILED])


def error_text(row: FailureRow) -> str:
    """The step and the error of a failure."""
    return f"{row['step']}: {row['error_class']}: {row['message']}"


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


def _played(key: str, clip: SampledClip, sides: Sequence[_Side]) -> PlayedClip | None:
    """A clip of the sample with its stems; null if its shard in the last pass cannot be read."""
    last = sides[-1]
    signals = [_read(side.of, side.rows.get(clip.clip_id, [])) for side in sides]
    mixture_T, found, rate_hz = signals[-1]
    if not found:
        return None
    for number, (mix_T, _, hz) in enumerate(signals):
        if hz == rate_hz and not np.array_equal(mix_T, mixture_T):  # another corpus with files of the same names
            signals[number] = mix_T, {}, hz
    gain = common_gain([mixture_T, *(stem_T for _, stems, _ in signals for stem_T in stems.values())])
    top = strongest(gain * mixture_T, rate_hz)
    versions = []
    for side, (_, stems, hz) in zip(sides, signals, strict=True):
        reasons = clip.reasons if side is last else {}
        played = [
            PlayedStem(
                label=row["label"],
                sound=played_sound(f"{key}{side.letter}{number}", gain * stems[row["label"]], hz, top),
                verdict=verdict_text(row, is_judged=side.of.stems.is_judged),
                is_kept=row["rejected_by"] is None,
                reason=reasons.get(row["label"], ""),
                scores=[*_true_score(side, row, stems[row["label"]]), *_scores(row, side.limits)],
            )
            for number, row in enumerate(side.rows.get(clip.clip_id, []))
            if row["label"] in stems
        ]
        if played:
            versions.append(
                Version(
                    letter=side.letter,
                    name=side.name,
                    iteration=side.of.number,
                    fingerprint=side.of.summary["fingerprint"],
                    stems=played,
                    failed=[
                        FailedLabel(label=row["label"], error=error_text(row))
                        for row in side.of.failed
                        if row["clip_id"] == clip.clip_id and row["label"] is not None
                    ],
                )
            )
    return PlayedClip(
        clip_id=clip.clip_id,
        path=clip.path,
        duration_s=len(mixture_T) / rate_hz,
        is_cut=len(mixture_T) < last.rows[clip.clip_id][0]["num_samples"],
        mixture=played_sound(f"{key}m", gain * mixture_T, rate_hz, top),
        versions=versions,
    )


def _read(one: PassFacts, rows: Sequence[StemRow]) -> tuple[np.ndarray, dict[str, np.ndarray], int]:
    """The first seconds of a clip's mixture and stems, and their rate; no stems if there are none to be read."""
    found = None
    if rows:
        shard, first, num_stems = rows[0]["shard"], rows[0]["first_row"], rows[0]["num_stems"]
        read = functools.partial(read_clip, one.folder / "stems", shard, first_row=first, num_stems=num_stems)
        found = one.left_out.read(shard.removesuffix(".parquet"), read)
    if found is None:
        return np.zeros(0, np.float32), {}, 1
    (mixture_T, stems), rate_hz = found, rows[0]["sample_rate_hz"]
    most = round(_MOST_S * rate_hz)
    return mixture_T[:most], {label: stem_T[:most] for label, stem_T in stems.items()}, rate_hz


def _true_score(side: _Side, row: StemRow, stem_T: np.ndarray) -> list[Score]:
    value = side.truth.si_sdr_db(row, stem_T) if side.truth is not None else None
    return [Score(name="true SI-SDR", value=f"{value:.1f} dB")] if value is not None else []


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
