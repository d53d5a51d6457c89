"""Calibration of presence models on mixtures of single-source clips, whose labels are known.

Shape suffixes: S stems, T samples, L labels of the tagger.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torchaudio
from torch import Tensor

from engine.audio.loading import loaded
from engine.corpus.sources import SourceClips
from engine.passes.separate import separate_clips
from engine.schema import ClipRow, DecodedClip, SeparatedClip
from engine.scoring.metrics import active_fraction, level_db
from engine.separators.batching import BatchedSeparator
from engine.storage.factories import in_32_bits
from engine.taggers import Tagger, find_label
from engine.taggers.presence import CLIP, EVIDENCE, REST, STEM, Pairs, Presence, StemEvidence, fit_presence
from engine.taggers.windows import tag_windows
from train.evaluation.mixtures import EvaluationMixture, draw_mixture
from train.judges.calibrate import CalibrationConfig

_NUM_SOURCES, _CHANCES = (1, 2, 3), (0.2, 0.6, 0.2)
_MOST_QUERIED = 4  # labels of a mixture with the strongest tags; one more is drawn from the others


@dataclass(frozen=True, kw_only=True)
class PresenceJudge:
    """A tagger, and a separator if there is one, with single-source clips that neither learned from."""

    tagger: Tagger
    clean: SourceClips
    separator: BatchedSeparator | None = None


def calibrate_presence(
    judges: Sequence[PresenceJudge],
    config: CalibrationConfig,
    *,
    tagger: str,
    about: Mapping[str, str | int | float | None],
) -> Presence:
    """A presence model for the tagger with a fingerprint, calibrated on mixtures that are divided among judges.

    Judges with separators also calibrate the evidence of stems and residuals. Raises ``ValueError`` for too few clips,
    and if a judge's tagger knows none of its clips' labels.
    """
    kinds = EVIDENCE if all(judge.separator is not None for judge in judges) else (CLIP,)
    pairs = {kind: Pairs() for kind in kinds}
    for position, judge in enumerate(judges):
        numbers = range(position, config.num_mixtures, len(judges))
        with in_32_bits(), torch.inference_mode():
            _add_pairs(pairs, judge, _drawn(judge, numbers, config))
    return fit_presence(pairs, tagger=tagger, about=about)


def _drawn(judge: PresenceJudge, numbers: Sequence[int], config: CalibrationConfig) -> dict[int, EvaluationMixture]:
    """Mixtures by number, without those that cannot be made; raises the last error if none can."""
    rate_hz = (judge.separator.separator if judge.separator is not None else judge.tagger).sample_rate_hz
    draws = [functools.partial(_draw, judge.clean, number, rate_hz, config) for number in numbers]
    made: dict[int, EvaluationMixture] = {}
    for number, mixture in zip(numbers, loaded(draws), strict=True):
        if not isinstance(mixture, Exception):
            made[number] = mixture
        elif not isinstance(mixture, ValueError) or (number == numbers[-1] and not made):
            raise mixture
    return made


def _draw(clean: SourceClips, number: int, sample_rate_hz: int, config: CalibrationConfig) -> EvaluationMixture:
    rng = np.random.default_rng([config.seed, 1, number])
    num_sources = min(int(rng.choice(_NUM_SOURCES, p=_CHANCES)), len(set(clean.labels)))
    return draw_mixture(
        clean,
        num_sources=num_sources,
        sample_rate_hz=sample_rate_hz,
        rng=rng,
        max_s=config.max_s,
        gain_db=config.gain_db,
    )


def _add_pairs(pairs: Mapping[str, Pairs], judge: PresenceJudge, mixtures: Mapping[int, EvaluationMixture]) -> None:
    """Add the pairs of mixtures with the evidence that a judge gives."""
    known = sorted(set(judge.clean.labels))
    positions = {label: find_label(label, judge.tagger.labels) for label in known}
    places = {label: position for label, position in positions.items() if position is not None}
    if not places:
        raise ValueError(
            f"a tagger must know labels of the clips that it is calibrated on, got none of {known[:5]}; give clips of "
            "its labels, or map labels to its classes in a file, as docs/extending.md shows"
        )
    rate_hz = (judge.separator.separator if judge.separator is not None else judge.tagger).sample_rate_hz
    signals = [torch.from_numpy(mixture.mix_T) for mixture in mixtures.values()]
    tags = [one.strongest() for one in tag_windows(judge.tagger, signals, sample_rate_hz=rate_hz)]
    for (number, mixture), tags_L in zip(mixtures.items(), tags, strict=True):
        for label, place in places.items():
            pairs[CLIP].add(number, label, [tags_L[place]], present=label in mixture.labels)
    if judge.separator is None:
        return
    clips = [
        _queried(number, mixture.mix_T, tags_L, places)
        for (number, mixture), tags_L in zip(mixtures.items(), tags, strict=True)
    ]
    separated, _ = separate_clips(clips, judge.separator)
    tags_of = dict(zip(mixtures, tags, strict=True))
    residuals = [item.mixture_T - item.stems_ST.sum(0) for item in separated]
    rests = tag_windows(judge.tagger, residuals, sample_rate_hz=rate_hz)
    for item, rest in zip(separated, rests, strict=True):
        number = int(item.clip.row["clip_id"])
        truth, tags_L = set(mixtures[number].labels), tags_of[number]
        for label, values in _stem_evidence(item, judge.tagger, tags_L, places, rate_hz):
            pairs[STEM].add(number, label, values, present=label in truth)
        for label, place in places.items():
            if label not in item.labels:
                pairs[REST].add(number, label, [tags_L[place], rest.strongest()[place]], present=label in truth)


def _queried(number: int, mix_T: np.ndarray, tags_L: np.ndarray, places: Mapping[str, int]) -> DecodedClip:
    """A mixture as a clip that is queried for its likeliest labels and one other, whether they sound or not.

    Only what is known of a clip without labels decides: if the truth did, then among the queried labels a strong tag
    would be the sign of an absent one.
    """
    rng = np.random.default_rng([2, number])
    ordered = sorted(places, key=lambda label: -tags_L[places[label]])
    num_likely = int(rng.integers(1, _MOST_QUERIED + 1))
    others = ordered[num_likely:]
    labels = ordered[:num_likely] + ([others[int(rng.integers(len(others)))]] if others else [])
    row: ClipRow = {"clip_id": str(number), "path": str(number), "labels": labels, "start_s": None, "end_s": None}
    row["num_tentative"] = int(bool(others))  # as in a pass, no other query names what is only tried
    return DecodedClip(row=row, samples_T=mix_T)


def _stem_evidence(
    item: SeparatedClip, tagger: Tagger, tags_L: np.ndarray, places: Mapping[str, int], sample_rate_hz: int
) -> Iterator[tuple[str, list[float]]]:
    """Every label of a clip with the evidence of its stem."""
    stems_ST: Tensor = item.stems_ST
    own_ST = torchaudio.functional.resample(stems_ST, sample_rate_hz, tagger.sample_rate_hz)
    stem_tags_SL = tagger.tag(own_ST).cpu().numpy()
    evidence = StemEvidence(
        clip_tags_L=tags_L,
        stem_tags_SL=stem_tags_SL,
        stem_level_db_S=level_db(signal=stems_ST, reference=item.mixture_T[None]).cpu().numpy(),
        active_fraction_S=active_fraction(stems_ST, sample_rate_hz=sample_rate_hz).cpu().numpy(),
    )
    for stem, label in enumerate(item.labels):
        yield label, evidence.values(stem, places[label])
