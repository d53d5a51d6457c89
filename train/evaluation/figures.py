"""Figures of an evaluation: means, medians and bootstrap intervals over the stems of all mixtures.

Three quantities are called SDR in papers, and each has its name here: ``sdr_db`` is the plain signal-to-noise ratio
(AudioSep), ``bss_sdr_db`` BSS-eval's with its 512-tap filter (CLAPSep), ``si_sdr_db`` the scale-invariant one (Le Roux
et al. 2019). ``sdri_db``, ``bss_sdri_db`` and ``si_sdri_db`` are their gains over the unprocessed mixture.
``false_extraction_db`` is the level, relative to the mixture, of the stem of a query whose sound is not in the mixture:
silence is -100 dB, the mixture itself 0 dB. ``capi_sdri_db`` is DCASE's class-aware, permutation-invariant SDRi
(``class_aware.py``), where a mixture may have two sources of one label.

Shape legend: N stems, K figures, M mixtures, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
from typing_extensions import TypedDict

from engine.schema import plain_label

_RESAMPLES = 1000
_CONFIDENCE = (2.5, 97.5)  # percentiles
_DRAWS_AT_ONCE = 2_000_000  # bounds the memory of the bootstrap
_T = TypeVar("_T")

StemScores = dict[str, float]
"""Scores of one stem in dB, by name."""
_Row = tuple[int, str, StemScores]  # number of the mixture, label, scores of the stem
_Absent = tuple[int, str, float]  # number of the mixture, absent label, level of its stem
_Numbered = tuple[int, float]  # number of the mixture, value


class Figures(TypedDict, total=False):
    """Figures of some stems; a score that was not taken has no key."""

    sdr_db: float
    sdri_db: float
    bss_sdr_db: float
    bss_sdri_db: float
    si_sdr_db: float
    si_sdri_db: float
    false_extraction_db: float | None
    """Mean over queries for absent sounds; None without any."""
    capi_sdri_db: float | None
    """Mean over mixtures of the class-aware SDRi; a missed source and a false positive count with 0."""
    same_label_sdri_db: float | None
    """``sdri_db`` of the stems whose label has several sources, against the sum of these; None without any."""
    num_stems: int
    median: dict[str, float | None]
    """Median of each figure."""
    confidence_95: dict[str, list[float] | None]
    """Bounds of each mean, by a bootstrap over mixtures; None with fewer than two mixtures."""
    num_same_label: int
    """Stems whose label has several sources; this and the next two are there if ``capi_sdri_db`` is."""
    num_missed_sources: int
    """Sources without an estimate (false negatives)."""
    num_false_positives: int
    """Queries for absent sounds whose stem is not silent."""


class Evaluation(Figures, total=False):
    """Figures of all stems of an evaluation, and of the stems of each label."""

    num_mixtures: int
    num_absent_queries: int
    sdri_standard_error_db: float
    """Standard error of ``sdri_db`` over stems."""
    by_label: dict[str, Figures]
    """``false_extraction_db`` is of the queries for the label in mixtures without it."""


@dataclass(frozen=True, kw_only=True)
class LabelMatch:
    """The sources of one label in one mixture, matched to the stems that are estimates of them."""

    label: str
    sdri_db: tuple[float, ...]
    """Improvement over the mixture of each source that has an estimate."""
    num_missed: int
    """Sources without an estimate."""
    num_false: int
    """Estimates without a source."""
    sum_sdri_db: float | None
    """SDRi of the label's stem against the sum of its sources; None with fewer than two."""


_Match = tuple[int, LabelMatch]  # number of the mixture, match


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Scores of one mixture."""

    labels: tuple[str, ...]
    """The queries."""
    stems: tuple[StemScores, ...]
    """Scores of the stem of each query."""
    absent: tuple[str, float] | None
    """A query for a sound that is not in the mixture and the level of its stem in dB; None: there was no such query."""
    class_aware: tuple[LabelMatch, ...] | None = None
    """Matches of all queries, the one for an absent sound included; None: not scored class-aware."""


def summarise(scored: Sequence[Scored], *, seed: int = 0) -> Evaluation:
    """Figures over all stems of all mixtures, and for each label; ``seed`` draws the bootstrap.

    Raises ``ValueError`` if there are no mixtures.
    """
    rows = [(number, label, stem) for number, one in enumerate(scored) for label, stem in _stems_of(one)]
    if not rows:
        raise ValueError("an evaluation must have at least one mixture, got none; give it some")
    absent = [(number, *one.absent) for number, one in enumerate(scored) if one.absent]
    matches = [(number, match) for number, one in enumerate(scored) for match in one.class_aware or ()]
    of_label = _by_label((row[1], row) for row in rows)
    queries = _by_label((plain_label(query[1]), query) for query in absent)
    matches_of = _by_label((plain_label(match.label), (number, match)) for number, match in matches)

    def figures(rows: Sequence[_Row], absent: Sequence[_Absent], matches: Sequence[_Match]) -> Figures:
        further = {"false_extraction_db": [(number, level_db) for number, _, level_db in absent]}
        if not matches_of:
            return _figures(rows, further, seed)
        values, counts = _class_aware(matches)
        return cast(Figures, {**_figures(rows, further | values, seed), **counts})

    return {
        "num_mixtures": len(scored),
        **figures(rows, absent, matches),
        "num_absent_queries": len(absent),
        "sdri_standard_error_db": _standard_error([stem["sdri_db"] for _, _, stem in rows]),
        "by_label": {
            name: figures(of_label[name], queries.get(plain_label(name), []), matches_of.get(plain_label(name), []))
            for name in sorted(of_label)
        },
    }


def _stems_of(one: Scored) -> Iterable[tuple[str, StemScores]]:
    return zip(one.labels, one.stems, strict=True)


def _by_label(named: Iterable[tuple[str, _T]]) -> dict[str, list[_T]]:
    found: dict[str, list[_T]] = {}
    for name, one in named:
        found.setdefault(name, []).append(one)
    return found


def _class_aware(matches: Sequence[_Match]) -> tuple[dict[str, list[_Numbered]], dict[str, int]]:
    """Values of the class-aware figures, and the counts that are reported with them."""
    of_mixture: dict[int, list[float]] = {}
    for number, match in matches:
        of_mixture.setdefault(number, []).extend([*match.sdri_db, *[0.0] * (match.num_missed + match.num_false)])
    several = [(number, match.sum_sdri_db) for number, match in matches if match.sum_sdri_db is not None]
    values = {
        "capi_sdri_db": [(number, float(np.mean(some))) for number, some in of_mixture.items() if some],
        "same_label_sdri_db": several,
    }
    counts = {
        "num_same_label": len(several),
        "num_missed_sources": sum(match.num_missed for _, match in matches),
        "num_false_positives": sum(match.num_false for _, match in matches),
    }
    return values, counts


def _figures(rows: Sequence[_Row], further: Mapping[str, Sequence[_Numbered]], seed: int) -> Figures:
    """Figures of the scores of stems, and of ``further`` values."""
    names = list(rows[0][2])
    values_NK = np.array([[stem[name] for name in names] for _, _, stem in rows])
    bounds_2K = confidence_interval(values_NK, [number for number, _, _ in rows], seed=seed)
    means: dict[str, float | None] = dict(zip(names, values_NK.mean(axis=0).tolist(), strict=True))
    median: dict[str, float | None] = dict(zip(names, np.median(values_NK, axis=0).tolist(), strict=True))
    bounds = [None] * len(names) if bounds_2K is None else bounds_2K.T.tolist()
    confidence: dict[str, list[float] | None] = dict(zip(names, bounds, strict=True))
    for name, numbered in further.items():
        values_N = np.array([value for _, value in numbered])
        bounds_2 = confidence_interval(values_N, [number for number, _ in numbered], seed=seed)
        means[name] = float(values_N.mean()) if numbered else None
        median[name] = float(np.median(values_N)) if numbered else None
        confidence[name] = None if bounds_2 is None else bounds_2.tolist()
    return cast(Figures, means | {"num_stems": len(rows), "median": median, "confidence_95": confidence})


def confidence_interval(values_N: np.ndarray, mixture_N: Sequence[int], *, seed: int = 0) -> np.ndarray | None:
    """95 % bounds ``[2]`` of the mean, by the percentile bootstrap (Efron 1979); ``[2, K]`` for values ``[N, K]``.

    Mixtures are resampled with all their values, because the values of one mixture depend on each other. None for
    fewer than two mixtures.
    """
    position_N = np.unique(np.asarray(mixture_N, np.int64), return_inverse=True)[1]
    num = int(position_N.max(initial=-1)) + 1
    if num < 2:
        return None
    counts_M, sums_MK = np.bincount(position_N), np.zeros((num, *values_N.shape[1:]))
    np.add.at(sums_MK, position_N, values_N)
    rng, means = np.random.default_rng(seed), []
    step = max(1, _DRAWS_AT_ONCE // num)
    for first in range(0, _RESAMPLES, step):
        times_RM = rng.multinomial(num, np.full(num, 1.0 / num), size=min(step, _RESAMPLES - first))
        means.append(((times_RM @ sums_MK).T / (times_RM @ counts_M)).T)
    bounds: np.ndarray = np.percentile(np.concatenate(means), _CONFIDENCE, axis=0)
    return bounds


def _standard_error(values: Sequence[float]) -> float:
    return float(np.std(values, ddof=1) / np.sqrt(len(values))) if len(values) > 1 else 0.0
