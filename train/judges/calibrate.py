"""Calibration of the quality estimator: mixtures of single-source clips, whose truth is known, separated and scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from engine.corpus.sources import read_sources
from engine.passes.separate import separate_clips
from engine.schema import SCORES, DecodedClip
from engine.scoring.estimator import SiSdrEstimator, calibrate
from engine.scoring.metrics import si_sdr_db
from engine.scoring.model_scores import Scorer
from engine.scoring.scores import Scores
from engine.separators import load
from engine.separators.batching import BatchedSeparator
from engine.storage.paths import Name
from engine.taggers import open_tagger
from train.evaluation.mixtures import EvaluationMixture, draw_mixture


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How the estimator's mixtures are made."""

    num_mixtures: int = 300
    """Mixtures of single-source clips to separate and score."""
    steps: int = 300
    """Training steps of each separator that is made for it, where the seed has learned from all single-source clips."""
    three_source_fraction: float = 0.2
    """Share of mixtures of three sources; the rest have two."""
    gain_db: float = 5.0
    """Sources have equal level over their active parts and are then moved by up to this, up or down."""
    max_s: float = 10.0
    """Only this much of each clip is used."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        for name in ("num_mixtures", "steps", "max_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")
        if not 0.0 <= self.three_source_fraction <= 1.0:
            raise ValueError(f"three_source_fraction is {self.three_source_fraction}; it is a share from 0 to 1")


def calibrate_on(
    held_out: Sequence[tuple[Scorer, pa.Table]], config: CalibrationConfig, *, about: dict[str, Any]
) -> SiSdrEstimator:
    """An estimator calibrated on stems that each separator makes of mixtures of clips that it did not learn from.

    ``held_out`` pairs what holds a separator with a table of sources (columns ``path`` and ``label``); mixtures are
    shared evenly, and those of clips that are silent or cannot be read are left out.
    """
    rows: list[Scores] = []
    truth_db: list[float] = []
    groups: list[int] = []
    for part, (scorer, sources) in enumerate(held_out):
        numbers = range(part, config.num_mixtures, len(held_out))
        mixtures = _mixtures(sources, numbers, scorer.batched.separator.sample_rate_hz, config)
        clips = [_clip(name, mixture) for name, mixture in mixtures.items()]
        separated, _ = separate_clips(clips, scorer.batched)
        for item, scores in zip(separated, scorer.scores(separated), strict=True):
            truth_ST = torch.from_numpy(_truth(mixtures[item.clip.row["clip_id"]], item.labels))
            rows += scores
            truth_db += si_sdr_db(estimate=torch.from_numpy(item.stems_ST), reference=truth_ST).tolist()
            groups += [int(item.clip.row["clip_id"])] * len(scores)
    return calibrate(pa.Table.from_pylist(rows, schema=SCORES), truth_db, groups=groups, about=about)


def calibrate_files(
    separator: Name,
    clean: Name,
    *,
    folds: Sequence[int] | None = None,
    tagger: Name | None = None,
    config: CalibrationConfig | None = None,
) -> SiSdrEstimator:
    """An estimator calibrated with one separator on single-source clips that neither it nor the tagger learned from."""
    batched = BatchedSeparator(separator=load(separator), batch_s=80.0)
    scorer = Scorer(batched=batched, tagger=open_tagger(tagger) if tagger else None, reseparate=False)
    sources = read_sources(clean, folds=folds)
    return calibrate_on([(scorer, sources)], config or CalibrationConfig(), about={"clean": str(clean)})


def _mixtures(
    sources: pa.Table, numbers: Sequence[int], sample_rate_hz: int, config: CalibrationConfig
) -> dict[str, EvaluationMixture]:
    """By name; without those of clips that are silent or cannot be read, unless that is all."""
    found: dict[str, EvaluationMixture] = {}
    for number in numbers:
        try:
            found[f"{number:06d}"] = _mixture(sources, number, sample_rate_hz, config)
        except ValueError:
            if number == numbers[-1] and not found:
                raise
    return found


def _mixture(sources: pa.Table, number: int, sample_rate_hz: int, config: CalibrationConfig) -> EvaluationMixture:
    rng = np.random.default_rng([config.seed, number])
    num_labels = len(set(sources["label"].to_pylist()))
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
    row = {"clip_id": name, "path": name, "labels": list(mixture.labels), "start_s": None, "end_s": None}
    return DecodedClip(row=row, samples_T=mixture.mix_T)


def _truth(mixture: EvaluationMixture, labels: Sequence[str]) -> np.ndarray:
    truth_ST: np.ndarray = mixture.sources_ST[[mixture.labels.index(label) for label in labels]]
    return truth_ST
