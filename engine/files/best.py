"""Best of several: the separator and the wordings whose stems of a recording an estimator prefers.

The choice is made once for a recording, on windows that are spread over it, so that the others are not separated from
all of it.

Shape legend: ``T`` samples, ``Q`` stems.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from engine.audio.decoder import shared_decoder
from engine.audio.sndfile import Samples
from engine.files.averages import WINDOW_S, ScoreAverages
from engine.files.targets import OneQuery, StemQuery, excluding
from engine.files.windows import stems_of
from engine.scoring.estimator import SiSdrEstimator
from engine.separators import Separator
from engine.separators.batching import BatchedSeparator, SeparationRequest

_NUM_WINDOWS = 12


def choose_best(
    source: str,
    separators: Sequence[Separator],
    targets: Sequence[StemQuery],
    estimator: SiSdrEstimator,
    *,
    complete: bool,
    device: str,
) -> tuple[Separator, list[OneQuery]]:
    """The separator and, for each target, the query with the highest estimated SI-SDR.

    Stems are scored together with those of the other targets' first queries; the separator is that with the highest
    mean over the targets. ``complete``: queries exclude these, where the separator uses that.
    """
    found = [_best_queries(source, separator, targets, estimator, complete, device) for separator in separators]
    number = int(np.argmax([mean_db for mean_db, _ in found]))
    return separators[number], found[number][1]


def _best_queries(
    source: str,
    separator: Separator,
    targets: Sequence[StemQuery],
    estimator: SiSdrEstimator,
    complete: bool,
    device: str,
) -> tuple[float, list[OneQuery]]:
    """The mean of the estimates of a separator's best queries, and these queries."""
    batched = BatchedSeparator(separator=separator, batch_s=WINDOW_S, device=device)
    queries = [query for target in targets for query in target.alternatives]
    if complete and getattr(separator, "uses_unwanted", False):
        queries = [
            excluding(query, [other.alternatives[0] for other in targets if other is not target])
            for target in targets
            for query in target.alternatives
        ]
    first = np.cumsum([0, *(len(target.alternatives) for target in targets)])
    sums = {
        (number, other): ScoreAverages(len(targets), sample_rate_hz=separator.sample_rate_hz, estimator=estimator)
        for number, target in enumerate(targets)
        for other in range(len(target.alternatives))
    }
    for mix_T in _windows(source, separator.sample_rate_hz):
        samples_T = torch.from_numpy(mix_T)
        stems_QT = stems_of(batched, [SeparationRequest(samples_T=samples_T, query=query) for query in queries])
        for (number, other), averages in sums.items():
            rows = list(first[:-1])
            rows[number] += other
            averages.push(mix_T, stems_QT[rows])
    estimates = {key: averages.scores()[key[0]]["estimated_si_sdr_db"] for key, averages in sums.items()}
    best = [
        max(range(len(target.alternatives)), key=lambda other: _known(estimates[number, other]))
        for number, target in enumerate(targets)
    ]
    mean_db = float(np.mean([_known(estimates[number, other]) for number, other in enumerate(best)]))
    return mean_db, [target.alternatives[other] for target, other in zip(targets, best, strict=True)]


def _known(value: float | None) -> float:
    return -100.0 if value is None else value


def _windows(source: str, sample_rate_hz: int) -> list[Samples]:
    """Windows of a recording mixed to mono, evenly spread."""
    decoder = shared_decoder()
    duration_s = decoder.probe(source).duration_s
    num_windows = max(1, min(_NUM_WINDOWS, int(duration_s / WINDOW_S)))
    starts_s = np.linspace(0.0, max(0.0, duration_s - WINDOW_S), num_windows)
    length_s = min(WINDOW_S, duration_s)
    return [
        decoder.decode(source, sample_rate_hz=sample_rate_hz, start_s=float(start_s), duration_s=length_s)
        for start_s in starts_s
    ]
