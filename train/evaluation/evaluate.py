"""Evaluation of a separator, or of an oracle, on mixtures with known sources."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import numpy as np
import soxr
import torch
from torch import Tensor

from engine.schema import plain_label
from engine.scoring.metrics import bss_sdr_db, level_db, si_sdr_db, snr_db
from engine.separators import Separator
from train.evaluation.figures import Evaluation, Scored, StemScores, summarise
from train.evaluation.mixtures import EvaluationMixture


class SeparationSystem(Protocol):
    """Anything that :func:`evaluate` can measure; it is given the true sources so that oracles can be measured too."""

    def __call__(self, mixture: EvaluationMixture) -> Tensor:
        """Stems ``[S, T]`` in the order of the mixture's labels."""


class SeparatorSystem:
    """A separator as a separation system: it sees the mixture and the labels, nothing else.

    Mixtures at ``sample_rate_hz`` (default: the separator's) are resampled for the separator, and its stems back.
    """

    def __init__(self, separator: Separator, *, sample_rate_hz: int | None = None) -> None:
        self._separator = separator
        self._sample_rate_hz = sample_rate_hz or separator.sample_rate_hz

    def __call__(self, mixture: EvaluationMixture) -> Tensor:
        return self.separate(mixture.mix_T, mixture.labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels that the separator knows."""
        return self._separator.labels

    def separate(self, mix_T: np.ndarray, queries: Sequence[str]) -> Tensor:
        """Stems ``[S, T]`` of a mixture, one for each query, on the CPU; raises ``ValueError`` for an unknown query."""
        inside_hz, outside_hz = self._separator.sample_rate_hz, self._sample_rate_hz
        mixed_T = mix_T if inside_hz == outside_hz else soxr.resample(mix_T, outside_hz, inside_hz, quality="HQ")
        mix_ST = torch.from_numpy(mixed_T).expand(len(queries), -1)
        stems_ST = self._separator.separate(mix_ST, list(queries)).float().cpu()
        if inside_hz == outside_hz:
            return stems_ST
        back_TS = soxr.resample(stems_ST.numpy().T, inside_hz, outside_hz, quality="HQ")[: len(mix_T)]
        fitted_TS = np.pad(back_TS, ((0, len(mix_T) - len(back_TS)), (0, 0)))
        return torch.from_numpy(np.ascontiguousarray(fitted_TS.T))


def evaluate(
    system: SeparationSystem, mixtures: Iterable[EvaluationMixture], *, quick: bool = False, seed: int = 0
) -> Evaluation:
    """Figures of a system on mixtures; ``quick`` leaves out BSS-eval SDR and queries for absent sounds.

    For each mixture a separator also gets one absent label as a query, drawn with ``seed`` from those that it knows; an
    oracle, which answers from the true sources, gets none. Raises ``ValueError`` if there are no mixtures.
    """
    scored = [
        score_mixture(system, mixture, number=number, quick=quick, seed=seed) for number, mixture in enumerate(mixtures)
    ]
    return summarise(scored)


def score_mixture(
    system: SeparationSystem, mixture: EvaluationMixture, *, number: int = 0, quick: bool = False, seed: int = 0
) -> Scored:
    """Scores of one mixture; its ``number`` and ``seed`` decide which absent label is the extra query."""
    stems_ST = system(mixture)
    reference_ST = torch.from_numpy(mixture.sources_ST[: len(mixture.labels)])
    mix_ST = torch.from_numpy(mixture.mix_T).expand_as(reference_ST)
    absent = None
    if isinstance(system, SeparatorSystem) and not quick:
        absent = _false_extraction(system, mixture, np.random.default_rng([seed, number]))
    stems = _stem_scores(stems_ST, reference_ST, mix_ST, quick=quick)
    return Scored(labels=mixture.labels, stems=tuple(stems), absent=absent)


def _stem_scores(stems_ST: Tensor, reference_ST: Tensor, mix_ST: Tensor, *, quick: bool) -> list[StemScores]:
    columns: dict[str, Tensor] = {}
    metrics = {"sdr": snr_db, "si_sdr": si_sdr_db} | ({} if quick else {"bss_sdr": bss_sdr_db})
    for name, metric in metrics.items():
        columns[f"{name}_db"] = metric(estimate=stems_ST, reference=reference_ST)
        columns[f"{name}i_db"] = columns[f"{name}_db"] - metric(estimate=mix_ST, reference=reference_ST)
    return [{name: float(column[row]) for name, column in columns.items()} for row in range(len(stems_ST))]


def _false_extraction(
    system: SeparatorSystem, mixture: EvaluationMixture, rng: np.random.Generator
) -> tuple[str, float] | None:
    """A drawn label that is not in the mixture, and the level of its stem; None if there is no such label."""
    if mixture.other_labels is None:
        return None
    present = {plain_label(label) for label in (*mixture.labels, *mixture.other_labels)}
    absent = sorted(label for label in system.labels if plain_label(label) not in present)
    if not absent:
        return None
    label = absent[rng.integers(len(absent))]
    (stem_T,) = system.separate(mixture.mix_T, [label])
    return label, float(level_db(signal=stem_T, reference=torch.from_numpy(mixture.mix_T)))
