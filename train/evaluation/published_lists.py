"""Evaluation on a published mixture list, with the figures that its paper reports."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Required, TypedDict, cast

import numpy as np

from engine.audio.loading import loaded
from engine.separators import Separator
from train.evaluation.evaluate import SeparationSystem, SeparatorSystem, score_mixtures
from train.evaluation.figures import Evaluation, Scored, summarise
from train.evaluation.list_audio import SAMPLE_RATE_HZ, load_mixture, locate
from train.evaluation.list_formats import ListRow, MixtureList
from train.evaluation.mixtures import EvaluationMixture

_LOGGER = logging.getLogger(__name__)

_NUM_SHOWN = 10
_RESAMPLES = 1000
_LOG_EVERY_ROWS = 500


class PaperFigures(TypedDict, total=False):
    """Figures of a list, averaged as its paper averages; a figure that the paper does not report has no key."""

    rule: Required[str]
    """``mean``, ``mean of class means`` or ``mean of class medians``."""
    sdri_db: float
    si_sdr_db: float
    bss_sdri_db: float
    si_sdri_db: float
    confidence_95: Required[dict[str, list[float] | None]]
    """Bounds of each, by a bootstrap over the rows of each class; None with one row in each class."""


class FailedRow(TypedDict):
    """A row of a list without figures."""

    row: int
    """Number of the row; 1 is the first after the header."""
    query: str
    reason: str
    """``missing audio``, ``unusable row``, ``unusable audio`` or ``refused by the separator``."""
    message: str


class ListEvaluation(Evaluation):
    """Evaluation on a list; ``num_mixtures`` and ``num_failed`` add up to ``num_rows``."""

    list: str
    """Name of the list's file."""
    format: str
    sample_rate_hz: int
    paper: PaperFigures
    num_rows: int
    num_mixed_here: int
    """Mixtures made from clips because the published mixture is missing."""
    num_failed: int
    num_failed_by_reason: dict[str, int]
    failures: list[FailedRow]
    """The first of them."""


def evaluate_list(
    separator: Separator | SeparationSystem, mixtures: MixtureList, folder: Path, *, seed: int = 0
) -> ListEvaluation:
    """Figures of a separator, or of an oracle, on a list whose audio is in ``folder``.

    Raises ``ValueError`` if all rows fail.
    """
    if not folder.is_dir():
        raise ValueError(
            f"the audio of a mixture list must be in a folder that exists, got {str(folder)!r}; check the path"
        )
    system = (
        SeparatorSystem(separator, sample_rate_hz=SAMPLE_RATE_HZ) if isinstance(separator, Separator) else separator
    )
    rows, scored = _Rows(mixtures=mixtures, folder=folder), list[Scored]()
    for number, one in score_mixtures(system, rows.loaded(), seed=seed):
        if isinstance(one, ValueError):
            rows.fail(number, _FailedRowError(one, reason="refused by the separator"))
        elif isinstance(one, Exception):
            raise one
        else:
            scored.append(one)
    failures = [rows.failures[number] for number in sorted(rows.failures)]
    if not scored:
        first = failures[0]["message"]
        raise ValueError(
            f"cannot evaluate {mixtures.name} (all {len(failures)} rows failed, the first with: {first}); give the "
            "folder with the audio of the list"
        )
    return {
        **summarise(scored, seed=seed),
        "list": mixtures.name,
        "format": mixtures.format,
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "paper": paper_figures(mixtures, scored, seed=seed),
        "num_rows": len(mixtures.rows),
        "num_mixed_here": len(rows.mixed_here - rows.failures.keys()),
        "num_failed": len(failures),
        "num_failed_by_reason": dict(Counter(failure["reason"] for failure in failures)),
        "failures": failures[:_NUM_SHOWN],
    }


class _FailedRowError(ValueError):
    """A row without figures; its text is the message."""

    def __init__(self, error: Exception, *, reason: str) -> None:
        super().__init__(str(error))
        self.reason = reason


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of a list, and what became of those that are evaluated."""

    mixtures: MixtureList
    folder: Path
    failures: dict[int, FailedRow] = field(default_factory=dict)
    mixed_here: set[int] = field(default_factory=set)

    def fail(self, number: int, error: _FailedRowError) -> None:
        """Record a row without figures."""
        query = self.mixtures.rows[number].query
        self.failures[number] = {"row": number + 1, "query": query, "reason": error.reason, "message": str(error)}

    def loaded(self) -> Iterator[tuple[int, EvaluationMixture]]:
        """The mixtures of all rows that have one, with their numbers."""
        rows = self.mixtures.rows
        for number, one in enumerate(loaded([functools.partial(_load_row, row, self.folder) for row in rows])):
            if isinstance(one, _FailedRowError):
                self.fail(number, one)
            elif isinstance(one, Exception):
                raise one
            else:
                mixture, is_published = one
                if rows[number].published is not None and not is_published:
                    self.mixed_here.add(number)
                yield number, mixture
            if (number + 1) % _LOG_EVERY_ROWS == 0:
                _LOGGER.info(f"{number + 1} of {len(rows)} rows, {len(self.failures)} of them failed")


def _load_row(row: ListRow, folder: Path) -> tuple[EvaluationMixture, bool]:
    """The mixture of a row, and whether it is the published one."""
    try:
        audio = locate(row, folder)
    except FileNotFoundError as error:
        raise _FailedRowError(error, reason="missing audio") from error
    except (OSError, ValueError) as error:  # OSError: a name that is too long
        raise _FailedRowError(error, reason="unusable row") from error
    try:
        return load_mixture(row, audio), audio.is_published
    except (OSError, ValueError) as error:
        raise _FailedRowError(error, reason="unusable audio") from error


def paper_figures(mixtures: MixtureList, scored: Sequence[Scored], *, seed: int = 0) -> PaperFigures:
    """Figures of a list, averaged by its ``rule``."""
    of_query: dict[str, list[list[float]]] = {}
    for one in scored:
        for label, stem in zip(one.labels, one.stems, strict=True):
            of_query.setdefault(label, []).append([stem[name] for name in mixtures.metrics])
    groups = [np.array(rows) for rows in of_query.values()]
    if mixtures.rule == "mean":
        groups = [np.concatenate(groups)]
    middle = np.median if mixtures.rule == "mean of class medians" else np.mean
    figures_K = np.mean([middle(group_NK, axis=0) for group_NK in groups], axis=0)
    rng, drawn_RK = np.random.default_rng(seed), np.zeros((_RESAMPLES, len(mixtures.metrics)))
    for group_NK in groups:
        for draws in np.array_split(np.arange(_RESAMPLES), -(-len(group_NK) // 1000)):  # bounds the memory
            again_RN = rng.integers(len(group_NK), size=(len(draws), len(group_NK)))
            drawn_RK[draws] += middle(group_NK[again_RN], axis=1) / len(groups)
    bounds = np.percentile(drawn_RK, (2.5, 97.5), axis=0).T.tolist()
    can_vary = max(map(len, groups)) > 1
    figures = {
        "rule": mixtures.rule,
        **dict(zip(mixtures.metrics, figures_K.tolist(), strict=True)),
        "confidence_95": dict(zip(mixtures.metrics, bounds if can_vary else [None] * len(bounds), strict=True)),
    }
    return cast(PaperFigures, figures)
