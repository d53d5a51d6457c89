"""Seeded mixtures of single-source clips, and what a separator makes of them.

Three figures are called SDR in papers, and each has its name here: ``sdr_db`` is the plain signal-to-noise ratio
(AudioSep), ``bss_sdr_db`` BSS-eval's with its 512-tap filter (CLAPSep), ``si_sdr_db`` the scale-invariant one (Le Roux
et al. 2019). ``sdri_db``, ``bss_sdri_db`` and ``si_sdri_db`` are their gains over the unprocessed mixture.
``false_extraction_db`` is the level, relative to the mixture, of what comes out when the query names a sound that is
not in it: silence is -100 dB, the mixture itself 0 dB.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import soxr
import torch
from torch import Tensor

from engine.schema import plain_label
from engine.scoring.metrics import bss_sdr_db, level_db, si_sdr_db, snr_db
from engine.separators import Separator
from train.evaluation.mixtures import EvaluationMixture

_RESAMPLES = 1000
_CONFIDENCE = (2.5, 97.5)  # percentiles
_DRAWS_AT_ONCE = 2_000_000  # of the bootstrap: bounds its memory

_Row = tuple[int, str, dict[str, float]]  # number of the mixture, label, scores of the stem


class SeparationSystem(Protocol):
    """What :func:`evaluate` asks for stems; sees the truth only so that oracles can be measured alike."""

    def __call__(self, mixture: EvaluationMixture) -> Tensor:
        """Stems ``[S, T]`` in the order of the mixture's labels."""


class SeparatorSystem:
    """A separator as an estimator: it is given the mixture and the labels, nothing else.

    Mixtures at ``sample_rate_hz`` (default: the separator's) are resampled for it, and its stems back again.
    """

    def __init__(self, separator: Separator, *, sample_rate_hz: int | None = None) -> None:
        self._separator = separator
        self._sample_rate_hz = sample_rate_hz or separator.sample_rate_hz

    def __call__(self, mixture: EvaluationMixture) -> Tensor:
        return self.separate(mixture.mix_T, mixture.labels)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels that the separator knows."""
        return self._separator.labels

    def separate(self, mix_T: np.ndarray, queries: Sequence[str]) -> Tensor:
        """Stems ``[S, T]`` of a mixture, one a query, on the CPU; ValueError for a query it does not take."""
        inside_hz, outside_hz = self._separator.sample_rate_hz, self._sample_rate_hz
        mixed_T = mix_T if inside_hz == outside_hz else soxr.resample(mix_T, outside_hz, inside_hz, quality="HQ")
        mix_ST = torch.from_numpy(mixed_T).expand(len(queries), -1)
        stems_ST = self._separator.separate(mix_ST, list(queries)).float().cpu()
        if inside_hz == outside_hz:
            return stems_ST
        back_TS = soxr.resample(stems_ST.numpy().T, inside_hz, outside_hz, quality="HQ")[: len(mix_T)]
        fitted_TS = np.pad(back_TS, ((0, len(mix_T) - len(back_TS)), (0, 0)))
        return torch.from_numpy(np.ascontiguousarray(fitted_TS.T))


def estimator(separator: Separator) -> SeparatorSystem:
    """A separator as an estimator of mixtures at its own rate."""
    return SeparatorSystem(separator)


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What became of one mixture."""

    labels: tuple[str, ...]
    stems: tuple[dict[str, float], ...]
    """The scores of the stem of each label."""
    absent: tuple[str, float] | None
    """A label asked for that is not in the mixture and the level of what came, in dB; None: none could be asked."""


def evaluate(
    estimate: SeparationSystem, mixtures: Iterable[EvaluationMixture], *, quick: bool = False, seed: int = 0
) -> dict[str, Any]:
    """The report of :func:`summarise` on mixtures; ``quick`` leaves out BSS-eval SDR and queries for absent sounds.

    Each mixture is asked for one absent label, drawn by ``seed`` among those that the separator knows. An oracle,
    which answers from the truth, cannot be asked. Raises ValueError where there are no mixtures.
    """
    scored = [
        score_mixture(estimate, mixture, number=number, quick=quick, seed=seed)
        for number, mixture in enumerate(mixtures)
    ]
    return summarise(scored)


def score_mixture(
    estimate: SeparationSystem, mixture: EvaluationMixture, *, number: int = 0, quick: bool = False, seed: int = 0
) -> Scored:
    """The scores of one mixture, whose ``number`` and ``seed`` alone decide which absent label is asked for."""
    stems_ST = estimate(mixture)
    reference_ST = torch.from_numpy(mixture.sources_ST[: len(mixture.labels)])
    mix_ST = torch.from_numpy(mixture.mix_T).expand_as(reference_ST)
    absent = None
    if isinstance(estimate, SeparatorSystem) and not quick:
        absent = _false_extraction(estimate, mixture, np.random.default_rng([seed, number]))
    stems = _stem_scores(stems_ST, reference_ST, mix_ST, quick=quick)
    return Scored(labels=mixture.labels, stems=tuple(stems), absent=absent)


def _stem_scores(stems_ST: Tensor, reference_ST: Tensor, mix_ST: Tensor, *, quick: bool) -> list[dict[str, float]]:
    columns: dict[str, Tensor] = {}
    metrics = {"sdr": snr_db, "si_sdr": si_sdr_db} | ({} if quick else {"bss_sdr": bss_sdr_db})
    for name, metric in metrics.items():
        columns[f"{name}_db"] = metric(estimate=stems_ST, reference=reference_ST)
        columns[f"{name}i_db"] = columns[f"{name}_db"] - metric(estimate=mix_ST, reference=reference_ST)
    return [{name: float(column[row]) for name, column in columns.items()} for row in range(len(stems_ST))]


def _false_extraction(
    estimate: SeparatorSystem, mixture: EvaluationMixture, rng: np.random.Generator
) -> tuple[str, float] | None:
    if mixture.other_labels is None:
        return None
    present = {plain_label(label) for label in (*mixture.labels, *mixture.other_labels)}
    absent = sorted(label for label in estimate.labels if plain_label(label) not in present)
    if not absent:
        return None
    label = absent[rng.integers(len(absent))]
    (stem_T,) = estimate.separate(mixture.mix_T, [label])
    return label, float(level_db(signal=stem_T, reference=torch.from_numpy(mixture.mix_T)))


def summarise(scored: Sequence[Scored], *, seed: int = 0) -> dict[str, Any]:
    """Means over all stems of all mixtures in dB, the same under ``median``, and both again for each of ``by_label``.

    ``confidence_95`` holds the bounds of each mean, by a bootstrap over mixtures; None with fewer than two of them.
    ``false_extraction_db`` is the mean over ``num_absent_queries``, None where there are none; in ``by_label`` it is
    that of the queries for the label where it was absent. Raises ValueError where nothing was scored.
    """
    rows = [(number, label, stem) for number, one in enumerate(scored) for label, stem in _pairs(one)]
    if not rows:
        raise ValueError("an evaluation has at least one mixture, there is none; give it some")
    absent = [(number, *one.absent) for number, one in enumerate(scored) if one.absent]
    report = {"num_mixtures": len(scored), **_figures(rows, absent, seed), "num_absent_queries": len(absent)}
    report["sdri_standard_error_db"] = _standard_error([stem["sdri_db"] for _, _, stem in rows])
    of_label: dict[str, list[_Row]] = {}
    for row in rows:
        of_label.setdefault(row[1], []).append(row)
    queries: dict[str, list[tuple[int, str, float]]] = {}
    for query in absent:
        queries.setdefault(plain_label(query[1]), []).append(query)
    report["by_label"] = {
        name: _figures(of_label[name], queries.get(plain_label(name), []), seed) for name in sorted(of_label)
    }
    return report


def _pairs(one: Scored) -> Iterable[tuple[str, dict[str, float]]]:
    return zip(one.labels, one.stems, strict=True)


def _figures(rows: Sequence[_Row], absent: Sequence[tuple[int, str, float]], seed: int) -> dict[str, Any]:
    """Means, medians and intervals of some stems and absent queries, each with the number of its mixture."""
    names = list(rows[0][2])
    values_NK = np.array([[stem[name] for name in names] for _, _, stem in rows])
    bounds_2K = confidence_interval(values_NK, [number for number, _, _ in rows], seed=seed)
    report: dict[str, Any] = dict(zip(names, values_NK.mean(axis=0).tolist(), strict=True))
    median: dict[str, float | None] = dict(zip(names, np.median(values_NK, axis=0).tolist(), strict=True))
    bounds = [None] * len(names) if bounds_2K is None else bounds_2K.T.tolist()
    confidence = dict(zip(names, bounds, strict=True))
    levels_N = np.array([level for *_, level in absent])
    bounds_2 = confidence_interval(levels_N, [number for number, *_ in absent], seed=seed)
    name = "false_extraction_db"
    report[name] = float(levels_N.mean()) if absent else None
    median[name] = float(np.median(levels_N)) if absent else None
    confidence[name] = None if bounds_2 is None else bounds_2.tolist()
    return report | {"num_stems": len(rows), "median": median, "confidence_95": confidence}


def confidence_interval(values_N: np.ndarray, mixture_N: Sequence[int], *, seed: int = 0) -> np.ndarray | None:
    """Bounds ``[2]`` of the mean, 95 %, by the percentile bootstrap (Efron 1979); of ``[N, K]`` values ``[2, K]``.

    What is drawn again are mixtures, with all their values: those of one mixture depend on each other. None with
    fewer than two mixtures.
    """
    place_N = np.unique(np.asarray(mixture_N, np.int64), return_inverse=True)[1]
    num = int(place_N.max(initial=-1)) + 1
    if num < 2:
        return None
    counts_M, sums_MK = np.bincount(place_N), np.zeros((num, *values_N.shape[1:]))
    np.add.at(sums_MK, place_N, values_N)
    rng, means = np.random.default_rng(seed), []
    step = max(1, _DRAWS_AT_ONCE // num)
    for first in range(0, _RESAMPLES, step):
        times_RM = rng.multinomial(num, np.full(num, 1.0 / num), size=min(step, _RESAMPLES - first))
        means.append(((times_RM @ sums_MK).T / (times_RM @ counts_M)).T)
    bounds: np.ndarray = np.percentile(np.concatenate(means), _CONFIDENCE, axis=0)
    return bounds


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
