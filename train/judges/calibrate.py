"""Calibration of the SI-SDR estimator on separated mixtures of single-source clips, whose true stems are known."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from engine.audio.loading import loaded
from engine.corpus.sources import SourceClips
from engine.passes.separate import separate_clips
from engine.schema import SCORES, ClipRow, DecodedClip
from engine.scoring.estimator import JudgedStems, SiSdrEstimator, fit_estimator
from engine.scoring.metrics import si_sdr_db
from engine.scoring.model_scores import Scorer
from engine.scoring.scores import Scores
from engine.separators import Separator
from engine.separators.batching import BatchedSeparator
from engine.settings import Count, Fraction, NonNegative, Positive, Seed, config
from engine.storage.factories import device_of, in_32_bits
from engine.taggers import Tagger
from train.evaluation.mixtures import EvaluationMixture, draw_mixture


@config
class CalibrationConfig:
    """Mixtures on which the estimator is calibrated."""

    num_mixtures: Count = 300
    """Mixtures of single-source clips to separate and score."""
    steps: Count = 300
    """Training steps of each separator made for the calibration, if the seed learned from all single-source clips."""
    three_source_fraction: Fraction = 0.2
    """Fraction of mixtures with three sources; the others have two."""
    gain_db: NonNegative = 5.0
    """Sources are brought to equal level over their active parts and then moved up or down by at most this."""
    max_s: Positive = 10.0
    """Only this much of each clip is used, in seconds."""
    seed: Seed = 0
    """Seed of the draws."""


def calibrate(
    separator: Separator,
    clean: SourceClips,
    *,
    tagger: Tagger | None = None,
    config: CalibrationConfig | None = None,
    judged: JudgedStems | None = None,
) -> SiSdrEstimator:
    """An estimator calibrated on one separator, with clips that neither it nor the tagger learned from.

    ``judged`` are stems with verdicts of a listener (:func:`train.judges.verdicts.read_verdicts`), as further evidence.
    """
    batched = BatchedSeparator(separator=separator, device=device_of(separator))
    scorer = Scorer(batched=batched, tagger=tagger, reseparate=False)
    return calibrate_on([(scorer, clean)], config or CalibrationConfig(), about={"clean": clean.root}, judged=judged)


def calibrate_on(
    held_out: Sequence[tuple[Scorer, SourceClips]],
    config: CalibrationConfig,
    *,
    about: Mapping[str, Any],
    judged: JudgedStems | None = None,
) -> SiSdrEstimator:
    """An estimator calibrated on stems of several separators, each with clips that it did not learn from.

    The mixtures are divided evenly among the separators; those with a clip that is silent or unreadable are left out.
    """
    rows: list[Scores] = []
    truth_db: list[float] = []
    groups: list[int] = []
    for position, (scorer, sources) in enumerate(held_out):
        numbers = range(position, config.num_mixtures, len(held_out))
        mixtures = _draw_mixtures(sources, numbers, scorer.batched.separator.sample_rate_hz, config)
        clips = [_clip(name, mixture) for name, mixture in mixtures.items()]
        with in_32_bits():
            separated, _ = separate_clips(clips, scorer.batched)
            scored = scorer.scores(separated)
        for item, scores in zip(separated, scored, strict=True):
            truth_ST = torch.from_numpy(_truth(mixtures[item.clip.row["clip_id"]], item.labels))
            rows += scores
            truth_db += si_sdr_db(estimate=item.stems_ST, reference=truth_ST.to(item.stems_ST.device)).tolist()
            groups += [int(item.clip.row["clip_id"])] * len(scores)
    table = pa.Table.from_pylist(rows, schema=SCORES)
    return fit_estimator(table, truth_db, groups=groups, about=dict(about), judged=judged)


def _draw_mixtures(
    sources: SourceClips, numbers: Sequence[int], sample_rate_hz: int, config: CalibrationConfig
) -> dict[str, EvaluationMixture]:
    """Mixtures by name, without those that cannot be made; raises the last error if none can."""
    made: dict[str, EvaluationMixture] = {}
    draws = [functools.partial(_draw_mixture, sources, number, sample_rate_hz, config) for number in numbers]
    for number, mixture in zip(numbers, loaded(draws), strict=True):
        if not isinstance(mixture, Exception):
            made[f"{number:06d}"] = mixture
        elif not isinstance(mixture, ValueError) or (number == numbers[-1] and not made):
            raise mixture
    return made


def _draw_mixture(
    sources: SourceClips, number: int, sample_rate_hz: int, config: CalibrationConfig
) -> EvaluationMixture:
    rng = np.random.default_rng([config.seed, number])
    num_labels = len(set(sources.labels))
    num_sources = 3 if num_labels > 2 and rng.random() < config.three_source_fraction else 2
    return draw_mixture(
        sources,
        num_sources=num_sources,
        sample_rate_hz=sample_rate_hz,
        rng=rng,
        max_s=config.max_s,
        gain_db=config.gain_db,
    )


def _clip(name: str, mixture: EvaluationMixture) -> DecodedClip:
    row: ClipRow = {"clip_id": name, "path": name, "labels": list(mixture.labels), "start_s": None, "end_s": None}
    return DecodedClip(row=row, samples_T=mixture.mix_T)


def _truth(mixture: EvaluationMixture, labels: Sequence[str]) -> np.ndarray:
    """True stems ``[S, T]`` of some labels."""
    truth_ST: np.ndarray = mixture.sources_ST[[mixture.labels.index(label) for label in labels]]
    return truth_ST
