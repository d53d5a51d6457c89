"""Seeded mixtures of single-source clips, and what a separator makes of them.

Three figures are called SDR in papers. Here ``sdr_db`` is the plain signal-to-noise ratio (AudioSep's), ``si_sdr_db``
the scale-invariant one (Le Roux et al. 2019); ``sdri_db`` and ``si_sdri_db`` are their gains over the unprocessed
mixture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from engine.audio import active_rms, decode
from engine.corpus import read_sources
from engine.metrics import si_sdr_db, snr_db
from engine.separators import Separator

_LEVEL = 0.1  # active RMS of every source, full scale 1


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Which mixtures a separator is judged on."""

    clips: str
    """CSV ``path,label[,fold]`` of single-source clips, or a folder of folders by label."""
    folds: tuple[int, ...] | None = None
    """Folds to draw from; null: all."""
    num_mixtures: int = 300
    """Mixtures to draw; every source in each is asked for once."""
    num_sources: int = 2
    """Sources of different labels in a mixture."""
    max_s: float = 10.0
    """Only this much of each clip is used."""
    seed: int = 0
    """Of the draw."""

    def __post_init__(self) -> None:
        if self.num_mixtures < 1 or self.num_sources < 1:
            raise ValueError("num_mixtures and num_sources are at least 1")


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Sources of different labels at equal level over their active parts; the mixture is their sum."""

    labels: tuple[str, ...]
    clips: tuple[str, ...]
    sources_ST: np.ndarray

    @property
    def mix_T(self) -> np.ndarray:
        total: np.ndarray = self.sources_ST.sum(axis=0, dtype=np.float32)
        return total


def draw_mixture(
    sources: pa.Table,
    *,
    num_sources: int,
    sample_rate_hz: int,
    rng: np.random.Generator,
    max_s: float = 10.0,
    gain_db: float = 0.0,
) -> Mixture:
    """One mixture of clips of different labels, at equal level but for a drawn gain of up to ``gain_db`` up or down.

    The shorter clips are padded at a random place.
    """
    by_label: dict[str, list[str]] = {}
    for row in sources.to_pylist():
        by_label.setdefault(row["label"], []).append(row["path"])
    if len(by_label) < num_sources:
        raise ValueError(f"mixtures of {num_sources} sources need as many labels, the clips have {sorted(by_label)}")
    labels = [sorted(by_label)[i] for i in rng.permutation(len(by_label))[:num_sources]]
    paths = [by_label[label][rng.integers(len(by_label[label]))] for label in labels]
    sounds = [_levelled(path, sample_rate_hz, max_s) for path in paths]
    sources_ST = np.zeros((num_sources, max(len(sound) for sound in sounds)), np.float32)
    for row, sound in enumerate(sounds):
        first = int(rng.integers(sources_ST.shape[1] - len(sound) + 1))
        sources_ST[row, first : first + len(sound)] = sound * 10.0 ** (rng.uniform(-gain_db, gain_db) / 20.0)
    return Mixture(labels=tuple(labels), clips=tuple(paths), sources_ST=sources_ST)


def _levelled(path: str, sample_rate_hz: int, max_s: float) -> np.ndarray:
    samples_T = decode(path, sample_rate_hz=sample_rate_hz, duration_s=max_s)
    level = active_rms(samples_T, sample_rate_hz=sample_rate_hz)
    if level == 0.0:
        raise ValueError(f"{path} is silent; take it out of the list of single-source clips")
    scaled: np.ndarray = samples_T * (_LEVEL / level)
    return scaled


def draw_mixtures(config: ValidationConfig, *, sample_rate_hz: int) -> list[Mixture]:
    """The mixtures of a config: the same for the same seed and clips."""
    sources = read_sources(config.clips, folds=config.folds)
    return [
        draw_mixture(
            sources,
            num_sources=config.num_sources,
            sample_rate_hz=sample_rate_hz,
            rng=np.random.default_rng([config.seed, number]),
            max_s=config.max_s,
        )
        for number in range(config.num_mixtures)
    ]


class Estimator(Protocol):
    """What :func:`evaluate` asks for stems; sees the truth only so that oracles can be measured alike."""

    def __call__(self, mixture: Mixture) -> Tensor:
        """Stems ``[S, T]`` in the order of the mixture's labels."""


def estimator(separator: Separator) -> Estimator:
    """A separator as an estimator: it is given the mixture and the labels, nothing else."""

    def separate(mixture: Mixture) -> Tensor:
        mix_ST = torch.from_numpy(mixture.mix_T).expand(len(mixture.labels), -1)
        return separator.separate(mix_ST, list(mixture.labels)).float().cpu()

    return separate


def evaluate(estimate: Estimator, mixtures: Sequence[Mixture]) -> dict[str, Any]:
    """Means over all stems of all mixtures, overall and ``by_label``, in dB, with the standard error of the mean."""
    labels: list[str] = []
    scores: list[dict[str, float]] = []
    for mixture in mixtures:
        stems_ST = estimate(mixture)
        reference_ST = torch.from_numpy(mixture.sources_ST)
        mix_ST = torch.from_numpy(mixture.mix_T).expand_as(reference_ST)
        labels.extend(mixture.labels)
        scores.extend(_stem_scores(stems_ST, reference_ST, mix_ST))
    report = {"num_mixtures": len(mixtures), "num_stems": len(scores), **_means(scores)}
    report["sdri_standard_error_db"] = _standard_error([score["sdri_db"] for score in scores])
    report["by_label"] = {
        label: _means([score for score, name in zip(scores, labels, strict=True) if name == label])
        | {"num_stems": labels.count(label)}
        for label in sorted(set(labels))
    }
    return report


def _stem_scores(stems_ST: Tensor, reference_ST: Tensor, mix_ST: Tensor) -> list[dict[str, float]]:
    sdr_S = snr_db(estimate=stems_ST, reference=reference_ST)
    si_sdr_S = si_sdr_db(estimate=stems_ST, reference=reference_ST)
    columns = {
        "sdr_db": sdr_S,
        "si_sdr_db": si_sdr_S,
        "sdri_db": sdr_S - snr_db(estimate=mix_ST, reference=reference_ST),
        "si_sdri_db": si_sdr_S - si_sdr_db(estimate=mix_ST, reference=reference_ST),
    }
    return [{name: float(column[row]) for name, column in columns.items()} for row in range(len(stems_ST))]


def _means(scores: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {name: float(np.mean([score[name] for score in scores])) for name in scores[0]}


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
