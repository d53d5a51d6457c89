"""Evaluation of a separator, or of an oracle, on mixtures with known sources.

Many mixtures are separated and scored at once, on the separator's device and in 32-bit floating point: never in 16,
with which figures would depend on the device.

Shape legend: G mixtures of one shape, S stems, T samples, K scores.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import soxr
import torch
from torch import Tensor

from engine.schema import plain_label
from engine.scoring.metrics import bss_sdr_db, level_db, si_sdr_db, snr_db
from engine.separators import Separator
from engine.separators.batching import BatchedSeparator, SeparationRequest
from engine.separators.queries import Query, query_for
from engine.storage.factories import device_of, in_32_bits
from train.evaluation.class_aware import match_sources
from train.evaluation.figures import Evaluation, LabelMatch, Scored, summarise
from train.evaluation.mixtures import EvaluationMixture

_SAMPLES_AT_ONCE = {"cpu": 1 << 21, "cuda": 1 << 25}  # of stems, which bounds the memory


class SeparationSystem(Protocol):
    """Anything that :func:`evaluate` can measure; it is given the true sources so that oracles can be measured too."""

    def __call__(self, mixture: EvaluationMixture) -> Tensor:
        """Stems ``[S, T]`` in the order of the mixture's labels."""


class SeparatorSystem:
    """A separator as a separation system: it sees the mixture and the queries, nothing else.

    Mixtures at ``sample_rate_hz`` (default: the separator's) are resampled for the separator, and its stems back.
    """

    def __init__(self, separator: Separator, *, sample_rate_hz: int | None = None) -> None:
        self.device = device_of(separator)
        self._batched = BatchedSeparator(separator=separator, device=self.device)
        self._sample_rate_hz = sample_rate_hz or separator.sample_rate_hz

    def __call__(self, mixture: EvaluationMixture) -> Tensor:
        (stems_ST,) = self.separate([(torch.from_numpy(mixture.mix_T), self.queries(mixture))])
        if isinstance(stems_ST, Exception):
            raise stems_ST
        return stems_ST

    def queries(self, mixture: EvaluationMixture, *more: str) -> list[str | Query]:
        """Queries for the labels of a mixture and for more labels."""
        rivals = mixture.labels if mixture.names_rivals else ()
        return [query_for(label, rivals, self._batched.separator) for label in (*mixture.labels, *more)]

    def separate(self, wanted: Sequence[tuple[Tensor, Sequence[str | Query]]]) -> list[Tensor | Exception]:
        """Stems ``[S, T]`` of mixtures ``[T]``, one for each of a mixture's queries, on :attr:`device`.

        An exception, such as a ``ValueError`` for an unknown query, stands for the stems of its mixture.
        """
        requests = [
            SeparationRequest(samples_T=inside_T, query=query)
            for inside_T, queries in [(self._resampled(mix_T), queries) for mix_T, queries in wanted]
            for query in queries
        ]
        answers = iter(self._batched.separate(requests))
        return [self._stems(itertools.islice(answers, len(queries)), len(mix_T)) for mix_T, queries in wanted]

    def _stems(self, answers: Iterable[Tensor | Exception], num_samples: int) -> Tensor | Exception:
        stems: list[Tensor] = []
        error: Exception | None = None
        for answer in answers:
            if isinstance(answer, Exception):
                error = error or answer
            else:
                stems.append(answer)
        if error is not None:
            return error
        stems_ST = self._resampled(torch.stack(stems), is_back=True)[:, :num_samples]
        return torch.nn.functional.pad(stems_ST, (0, num_samples - stems_ST.shape[1]))

    def _resampled(self, signal: Tensor, *, is_back: bool = False) -> Tensor:
        """Signals ``[..., T]`` at the separator's rate, or back at that of the mixtures."""
        rates_hz = self._sample_rate_hz, self._batched.separator.sample_rate_hz
        if rates_hz[0] == rates_hz[1]:
            return signal
        there = soxr.resample(signal.cpu().numpy().T, *(rates_hz[::-1] if is_back else rates_hz), quality="HQ").T
        return torch.from_numpy(np.ascontiguousarray(there)).to(signal.device)

    def absent_label(self, mixture: EvaluationMixture, rng: np.random.Generator) -> str | None:
        """A drawn label that the separator knows and that is not in the mixture; None if there is no such label."""
        if mixture.other_labels is None:
            return None
        present = {plain_label(label) for label in (*mixture.labels, *mixture.other_labels)}
        absent = [label for label, plain in self._known if plain not in present]
        return absent[rng.integers(len(absent))] if absent else None

    @functools.cached_property
    def _known(self) -> list[tuple[str, str]]:
        return [(label, plain_label(label)) for label in sorted(self._batched.separator.labels)]


def evaluate(
    system: SeparationSystem, mixtures: Iterable[EvaluationMixture], *, quick: bool = False, seed: int = 0
) -> Evaluation:
    """Figures of a system on mixtures; ``quick`` leaves out BSS-eval SDR, queries for absent sounds, class-aware SDRi.

    For each mixture a separator also gets one absent label as a query, drawn with ``seed`` from those that it knows; an
    oracle, which answers from the true sources, gets none. Raises ``ValueError`` if there are no mixtures.
    """
    scored: list[Scored] = []
    for _, one in score_mixtures(system, enumerate(mixtures), quick=quick, seed=seed):
        if isinstance(one, Exception):
            raise one
        scored.append(one)
    return summarise(scored)


def score_mixtures(
    system: SeparationSystem, mixtures: Iterable[tuple[int, EvaluationMixture]], *, quick: bool = False, seed: int = 0
) -> Iterator[tuple[int, Scored | Exception]]:
    """Scores of each mixture, or the exception that separating it raised, with the mixture's number and in order.

    The number and ``seed`` decide which absent label is the extra query. Some mixtures are in memory at once.
    """
    device = system.device if isinstance(system, SeparatorSystem) else "cpu"
    for group in _groups(mixtures, most_samples=_SAMPLES_AT_ONCE[device]):
        with in_32_bits():
            separated = _separated(system, group, device, quick=quick, seed=seed)
        scored: dict[int, Scored | Exception] = {}
        by_shape: dict[object, dict[int, _Separated]] = {}
        for (number, _), one in zip(group, separated, strict=True):
            if isinstance(one, Exception):
                scored[number] = one
            else:
                by_shape.setdefault((one.stems_ST.shape, one.reference_ST.shape), {})[number] = one
        for alike in by_shape.values():
            scored |= zip(alike, _scores(list(alike.values()), quick=quick), strict=True)
        for number, _ in group:
            yield number, scored[number]


@dataclass(frozen=True, kw_only=True)
class _Separated:
    """A mixture with its stems, the last of which is that of the absent label if there is one."""

    labels: tuple[str, ...]
    absent: str | None
    mix_T: Tensor
    reference_ST: Tensor
    stems_ST: Tensor
    sources_of: tuple[np.ndarray, ...] | None


def _groups(
    mixtures: Iterable[tuple[int, EvaluationMixture]], *, most_samples: int
) -> Iterator[list[tuple[int, EvaluationMixture]]]:
    group: list[tuple[int, EvaluationMixture]] = []
    num_samples = 0
    for number, mixture in mixtures:
        group.append((number, mixture))
        num_samples += (len(mixture.labels) + 1) * mixture.sources_ST.shape[1]
        if num_samples >= most_samples:
            yield group
            group, num_samples = [], 0
    if group:
        yield group


def _separated(
    system: SeparationSystem, group: Sequence[tuple[int, EvaluationMixture]], device: str, *, quick: bool, seed: int
) -> list[_Separated | Exception]:
    sources = [torch.from_numpy(mixture.sources_ST).to(device) for _, mixture in group]
    mixes = [sources_ST.sum(0) for sources_ST in sources]
    absent: list[str | None] = [None] * len(group)
    answers: list[Tensor | Exception]
    if isinstance(system, SeparatorSystem):
        if not quick:
            absent = [system.absent_label(one, np.random.default_rng([seed, number])) for number, one in group]
        extra = [() if label is None else (label,) for label in absent]
        queries = [system.queries(mixture, *more) for (_, mixture), more in zip(group, extra, strict=True)]
        answers = system.separate(list(zip(mixes, queries, strict=True)))
    else:
        answers = [system(mixture) for _, mixture in group]
    return [
        stems
        if isinstance(stems, Exception)
        else _Separated(
            labels=mixture.labels,
            absent=label,
            mix_T=mix_T,
            reference_ST=sources_ST[: len(mixture.labels)],
            stems_ST=stems,
            sources_of=mixture.sources_of,
        )
        for (_, mixture), label, mix_T, sources_ST, stems in zip(group, absent, mixes, sources, answers, strict=True)
    ]


def _scores(separated: Sequence[_Separated], *, quick: bool) -> list[Scored]:
    """Scores of mixtures of one shape; waits for the device once."""
    stems_GST, reference_GST, mix_GT = (
        torch.stack([getattr(one, name) for one in separated]) for name in ("stems_ST", "reference_ST", "mix_T")
    )
    num_labels, mix_GST = reference_GST.shape[1], mix_GT[:, None].expand_as(reference_GST)
    # The mixture is an estimate as well: what depends on the references alone is computed once for both.
    estimates_2GST = torch.stack([stems_GST[:, :num_labels], mix_GST])
    columns: dict[str, Tensor] = {}
    metrics = {"sdr": snr_db, "si_sdr": si_sdr_db} | ({} if quick else {"bss_sdr": bss_sdr_db})
    for name, metric in metrics.items():
        stem_db, mixture_db = metric(estimate=estimates_2GST, reference=reference_GST)
        columns |= {f"{name}_db": stem_db, f"{name}i_db": stem_db - mixture_db}
    absent_db = mix_GT.new_empty(len(mix_GT), 0, dtype=torch.float64)
    if stems_GST.shape[1] > num_labels:
        absent_db = level_db(signal=stems_GST[:, num_labels:], reference=mix_GT[:, None])
    values_GV = torch.cat([torch.stack(list(columns.values()), -1).flatten(1), absent_db], 1).tolist()
    scored = []
    for one, values_V in zip(separated, values_GV, strict=True):
        stems = [dict(zip(columns, values_V[row * len(columns) :], strict=False)) for row in range(num_labels)]
        scored.append(
            Scored(
                labels=one.labels,
                stems=tuple(stems),
                absent=None if one.absent is None else (one.absent, values_V[-1]),
                class_aware=None if quick else _matches(one, [stem["sdri_db"] for stem in stems]),
            )
        )
    return scored


def _matches(one: _Separated, sdri_db: Sequence[float]) -> tuple[LabelMatch, ...] | None:
    """Sources of each label matched to its stem, and those of the absent label, of which there are none."""
    if one.sources_of is None:
        return None
    names = [*one.labels, *([] if one.absent is None else [one.absent])]
    sources = [torch.from_numpy(source_PT).to(one.mix_T.device) for source_PT in one.sources_of]
    sources += [one.mix_T[None][:0]] * (len(names) - len(sources))
    return tuple(
        match_sources(name, estimate_ET=stem_T[None], reference_PT=source_PT, mix_T=one.mix_T, sum_sdri_db=gain_db)
        for name, stem_T, source_PT, gain_db in zip(names, one.stems_ST, sources, [*sdri_db, None], strict=False)
    )
