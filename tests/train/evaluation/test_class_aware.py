"""Class-aware SDRi: systems with known figures, and mixtures with two sources of one label."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch

from clearsep import evaluate as measure
from engine.corpus.sources import read_sources
from train.evaluation.class_aware import match_sources
from train.evaluation.evaluate import SeparatorSystem, evaluate
from train.evaluation.figures import LabelMatch, Scored, summarise
from train.evaluation.mixtures import (
    EvaluationMixture,
    ValidationConfig,
    ValidationSet,
    draw_mixtures,
    resolve_validation,
)
from train.tables import evaluation_table

RATE_HZ = 8000
LABELS = ("bell", "dog", "rain", "siren")
Write = Callable[..., Path]


def tone(hz: float, duration_s: float = 0.5) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(duration_s * RATE_HZ)) / RATE_HZ)).astype(np.float32)


def tones(labels: Sequence[str] = LABELS, num: int = 3) -> list[tuple[str, str, int, np.ndarray]]:
    """Clips of whole cycles and one length, so that all are orthogonal."""
    return [
        (f"{label}-{i}", label, 1, tone(300 + 400 * k + 20 * i)) for k, label in enumerate(labels) for i in range(num)
    ]


@pytest.fixture
def clips(write_sources: Write) -> Path:
    return write_sources(tones())


def draw(clips: Path, **settings: object) -> list[EvaluationMixture]:
    config = ValidationConfig(**{"clips": str(clips), "num_mixtures": 20, **settings})
    return draw_mixtures(resolve_validation(config), sample_rate_hz=RATE_HZ)


SIGNALS_NT = torch.from_numpy(np.stack([tone(hz) for hz in (300, 700, 1100)]))


def matched(estimates: Sequence[torch.Tensor], num_sources: int) -> LabelMatch:
    """Estimates against the first signals; the mixture is the sum of all three."""
    return match_sources(
        "dog",
        estimate_ET=torch.stack(list(estimates)) if estimates else SIGNALS_NT[:0],
        reference_PT=SIGNALS_NT[:num_sources],
        mix_T=SIGNALS_NT.sum(0),
    )


# Matches of estimates and sources.


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_estimates_are_matched_in_whatever_order_they_come(order: tuple[int, int]) -> None:
    """Orthogonal sources of equal energy: the mixture has -3 dB, 0.9 s has 20 dB, 0.5 s has 6 dB."""
    estimates = [0.9 * SIGNALS_NT[0], 0.5 * SIGNALS_NT[1]]
    match = matched([estimates[i] for i in order], 2)
    assert sorted(match.sdri_db) == pytest.approx([9.03, 23.01], abs=0.01)
    assert (match.num_missed, match.num_false) == (0, 0)


def test_the_perfect_separation_gains_all_there_is() -> None:
    match = matched(list(SIGNALS_NT[:2].flip(0)), 2)
    assert len(match.sdri_db) == 2 and min(match.sdri_db) > 90


def test_the_mixture_gains_nothing() -> None:
    assert matched([SIGNALS_NT.sum(0)], 2).sdri_db == (0.0,)


def test_one_estimate_of_two_sources_is_of_the_nearer_one() -> None:
    match = matched([0.9 * SIGNALS_NT[1]], 2)
    assert match.sdri_db == pytest.approx([23.01], abs=0.01)
    assert (match.num_missed, match.num_false) == (1, 0)


def test_an_estimate_too_many_is_false() -> None:
    match = matched([SIGNALS_NT[2], 0.9 * SIGNALS_NT[0]], 1)
    assert match.sdri_db == pytest.approx([23.01], abs=0.01)
    assert (match.num_missed, match.num_false) == (0, 1)
    assert matched([SIGNALS_NT[2]], 0).num_false == 1


@pytest.mark.parametrize(("level_db", "is_estimate"), [(-29.9, True), (-30.1, False), (-400.0, False)])
def test_a_stem_is_an_estimate_from_30_db_below_the_mixture_on(level_db: float, is_estimate: bool) -> None:
    stem_T = 10 ** (level_db / 20) * SIGNALS_NT.sum(0)
    present, absent = matched([stem_T], 1), matched([stem_T], 0)
    assert (len(present.sdri_db), present.num_missed) == ((1, 0) if is_estimate else (0, 1))
    assert (absent.sdri_db, absent.num_missed, absent.num_false) == ((), 0, int(is_estimate))


def test_the_match_is_that_of_the_best_permutation() -> None:
    """Against all assignments tried one by one, on noise."""
    noise_NT = torch.randn(7, 500, generator=torch.Generator().manual_seed(0))
    estimate_ET, reference_PT, mix_T = noise_NT[:3] + 0.5 * noise_NT[[3, 5, 4]], noise_NT[3:6], noise_NT.sum(0)

    def sdr_db(estimate_T: torch.Tensor, reference_T: torch.Tensor) -> float:
        return float(10 * torch.log10(reference_T.square().sum() / (reference_T - estimate_T).square().sum()))

    tried = [
        [sdr_db(estimate_ET[e], reference_PT[p]) - sdr_db(mix_T, reference_PT[p]) for p, e in enumerate(order)]
        for order in permutations(range(3))
    ]
    absolute = [sum(sdr_db(estimate_ET[e], reference_PT[p]) for p, e in enumerate(o)) for o in permutations(range(3))]
    match = match_sources("dog", estimate_ET=estimate_ET, reference_PT=reference_PT, mix_T=mix_T)
    assert sorted(match.sdri_db) == pytest.approx(sorted(tried[int(np.argmax(absolute))]), abs=1e-3)


# The figure of a system.


class Answers:
    """A separator that knows the sources: per label, a gain of all of them, or of the first one alone."""

    labels = LABELS

    def __init__(self, mixtures: Sequence[EvaluationMixture], *, absent_gain: float = 0.0, first: bool = False) -> None:
        self.mixtures = {mixture.mix_T.tobytes(): mixture for mixture in mixtures}
        self.sample_rate_hz, self.absent_gain, self.first = RATE_HZ, absent_gain, first
        self.absent: list[tuple[EvaluationMixture, str]] = []

    def separate(
        self, mix_BT: torch.Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        stems = []
        for mix_T, query in zip(mix_BT, queries, strict=True):
            mixture = self.mixtures[mix_T.numpy().tobytes()]
            if query in mixture.labels:
                sources_PT = mixture.sources_of[mixture.labels.index(query)]
                stems.append(torch.from_numpy(sources_PT[0] if self.first else sources_PT.sum(0)))
            else:
                self.absent.append((mixture, query))
                stems.append(self.absent_gain * mix_T)
        return torch.stack(stems)


def test_a_perfect_stem_of_one_of_two_sources_is_half_right(clips: Path) -> None:
    """Two labels, one of them twice: two of three sources are perfect, the third is missed."""
    mixtures = draw(clips, same_label_fraction=1.0)
    report = evaluate(SeparatorSystem(Answers(mixtures, first=True)), mixtures)
    perfect = evaluate(SeparatorSystem(Answers(mixtures[:1], first=True)), mixtures[:1])
    (doubled,) = (label for label, part in perfect["by_label"].items() if part["num_same_label"])
    (single,) = perfect["by_label"].keys() - {doubled}
    by_label = perfect["by_label"]
    assert by_label[doubled]["capi_sdri_db"] > 90 / 2
    assert perfect["capi_sdri_db"] == pytest.approx(
        (2 * by_label[doubled]["capi_sdri_db"] + by_label[single]["capi_sdri_db"]) / 3
    )
    assert (report["num_same_label"], report["num_missed_sources"], report["num_false_positives"]) == (20, 20, 0)
    assert report["confidence_95"]["capi_sdri_db"][0] <= report["capi_sdri_db"]
    assert 0 < report["same_label_sdri_db"] < 10, "one of two sources is no good answer to the query of both"


def test_the_sum_of_both_sources_is_what_a_query_asks_for(clips: Path) -> None:
    """Against one of two sources their sum has 0 dB; the mixture of all three has -3 dB."""
    mixtures = draw(clips, same_label_fraction=1.0)
    report = evaluate(SeparatorSystem(Answers(mixtures)), mixtures)
    assert report["sdri_db"] > 90 and report["same_label_sdri_db"] > 90
    for part in report["by_label"].values():
        assert part["num_missed_sources"] == part["num_same_label"]
    (match,) = (m for m in _matches(mixtures[0]) if m.num_missed)
    assert match.sdri_db == pytest.approx([3.01], abs=0.01)


def _matches(mixture: EvaluationMixture) -> list[LabelMatch]:
    mix_T = torch.from_numpy(mixture.mix_T)
    sources = [torch.from_numpy(sources_PT) for sources_PT in mixture.sources_of]
    return [
        match_sources(label, estimate_ET=sources_PT.sum(0)[None], reference_PT=sources_PT, mix_T=mix_T)
        for label, sources_PT in zip(mixture.labels, sources, strict=True)
    ]


def test_a_false_positive_counts_with_0(clips: Path) -> None:
    """Three values instead of two in each mixture: two thirds of the figure are left."""
    mixtures = [m for m in draw(clips, same_label_fraction=0.01) if len(m.clips) == 2]
    silent, loud = (evaluate(SeparatorSystem(Answers(mixtures, absent_gain=gain)), mixtures) for gain in (0.0, 0.1))
    assert (silent["num_false_positives"], loud["num_false_positives"]) == (0, len(mixtures))
    assert loud["capi_sdri_db"] == pytest.approx(silent["capi_sdri_db"] * 2 / 3)
    assert loud["sdri_db"] == silent["sdri_db"] == pytest.approx(silent["capi_sdri_db"])
    assert silent["same_label_sdri_db"] is None and silent["num_missed_sources"] == 0
    assert sum(part["num_false_positives"] for part in loud["by_label"].values()) == len(mixtures)


def test_a_silent_stem_misses_its_sources(clips: Path) -> None:
    mixtures = draw(clips, same_label_fraction=1.0)
    report = evaluate(lambda mixture: torch.zeros(2, mixture.sources_ST.shape[1]), mixtures)
    assert report["capi_sdri_db"] == report["median"]["capi_sdri_db"] == 0.0
    assert report["num_missed_sources"] == 3 * 20


def test_an_absent_query_is_never_a_label_that_is_present(clips: Path) -> None:
    mixtures = draw(clips, same_label_fraction=1.0)
    separator = Answers(mixtures)
    evaluate(SeparatorSystem(separator), mixtures)
    assert len(separator.absent) == 20
    for mixture, query in separator.absent:
        assert query not in {Path(clip).name.split("-")[0] for clip in mixture.clips}


def test_a_label_has_its_own_figure_over_mixtures() -> None:
    def match(label: str, *sdri_db: float, missed: int = 0, false: int = 0) -> LabelMatch:
        return LabelMatch(label=label, sdri_db=sdri_db, num_missed=missed, num_false=false, sum_sdri_db=None)

    def scored(*matches: LabelMatch) -> Scored:
        stems = tuple({"sdri_db": 0.0} for one in matches if not one.num_false)
        return Scored(
            labels=tuple(m.label for m in matches)[: len(stems)], stems=stems, absent=None, class_aware=matches
        )

    report = summarise(
        [scored(match("dog", 6.0, missed=1), match("bell", 9.0)), scored(match("bell", 3.0), match("Dog", false=1))]
    )
    assert report["capi_sdri_db"] == pytest.approx((15 / 3 + 3 / 2) / 2)
    assert report["by_label"]["bell"]["capi_sdri_db"] == 6.0
    assert report["by_label"]["dog"]["capi_sdri_db"] == 1.5, "3 dB where it sounds, 0 dB where it does not"
    assert (report["by_label"]["dog"]["num_missed_sources"], report["by_label"]["dog"]["num_false_positives"]) == (1, 1)


def test_without_same_label_sources_nothing_is_reported_that_was_not_before(clips: Path) -> None:
    report = evaluate(SeparatorSystem(Silent()), draw(clips, num_mixtures=3))
    assert not any("capi" in key or "same_label" in key or "num_missed" in key for key in _keys(report))
    quick = evaluate(SeparatorSystem(Silent()), draw(clips, num_mixtures=3, same_label_fraction=1.0), quick=True)
    assert "capi_sdri_db" not in quick


def _keys(report: object) -> set[str]:
    return set(json.dumps(report).replace('"', " ").split())


class Silent:
    """A separator that returns silence."""

    labels, sample_rate_hz = LABELS, RATE_HZ

    def separate(
        self, mix_BT: torch.Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        return torch.zeros_like(mix_BT)


def test_the_table_has_the_figures_and_the_counts(clips: Path) -> None:
    mixtures = draw(clips, same_label_fraction=1.0)
    table = evaluation_table(evaluate(SeparatorSystem(Answers(mixtures, absent_gain=1.0)), mixtures))
    assert table.title == "20 mixtures, 20 with two sources of one label: 20 sources missed, 20 false positives"
    assert list(table.columns)[-3:] == ["absent dB", "CAPI-SDRi dB", "same-label SDRi dB"]


# The draw.


def test_a_second_source_is_another_clip_of_one_label_and_the_rest_is_as_without_it(clips: Path) -> None:
    plain, doubled = draw(clips), draw(clips, same_label_fraction=0.5)
    num_doubled = 0
    for one, other in zip(plain, doubled, strict=True):
        assert one.sources_of is None and other.sources_of is not None
        assert (one.labels, one.clips) == (other.labels, other.clips[:2])
        assert len(set(other.clips)) == len(other.clips)
        first_ST = np.stack([sources_PT[0] for sources_PT in other.sources_of])
        assert np.array_equal(first_ST, one.sources_ST)
        assert np.allclose(np.stack([sources_PT.sum(0) for sources_PT in other.sources_of]), other.sources_ST)
        several = [row for row, sources_PT in enumerate(other.sources_of) if len(sources_PT) == 2]
        assert len(several) == len(other.clips) - 2 <= 1
        for row in several:
            assert Path(other.clips[2]).name.split("-")[0] == other.labels[row]
            assert np.sqrt(np.mean(other.sources_of[row][1] ** 2)) == pytest.approx(0.1, rel=0.01)
        num_doubled += len(several)
    assert 4 <= num_doubled <= 16


def test_the_mixture_is_as_long_as_its_second_source(write_sources: Write) -> None:
    path = write_sources(
        [("bell-0", "bell", 1, tone(300)), ("dog-0", "dog", 1, tone(700)), ("dog-1", "dog", 1, tone(900, 0.8))]
    )
    mixtures = draw(path, same_label_fraction=1.0)
    assert {mixture.mix_T.shape for mixture in mixtures} == {(6400,)}
    assert all(len(mixture.clips) == 3 for mixture in mixtures)
    assert all(len(mixture.sources_of[mixture.labels.index("bell")]) == 1 for mixture in mixtures)


def test_a_validation_of_before_keeps_its_identity(clips: Path) -> None:
    sources = read_sources(clips)
    identities = [
        ValidationSet(config=ValidationConfig(clips="c", **settings), sources=sources).identity
        for settings in ({}, {"same_label_fraction": 0.0}, {"same_label_fraction": 0.3})
    ]
    assert identities[0] == identities[1] != identities[2]
    assert "same_label_fraction" not in identities[0]


def test_clips_without_a_second_one_are_refused(write_sources: Write) -> None:
    path = write_sources(tones(num=1))
    with pytest.raises(
        ValueError, match=r"same_label_fraction must be 0 for clips of which no label has two, got 0\.3"
    ):
        draw(path, same_label_fraction=0.3)


def test_settings_of_the_draw_alone_are_taken(clips: Path) -> None:
    report = measure(Silent(), str(clips), num_mixtures=5, config={"same_label_fraction": 1.0})
    assert (report["num_mixtures"], report["num_same_label"], report["capi_sdri_db"]) == (5, 5, 0.0)
    with pytest.raises(ValueError, match=r"must say how its clips are mixed, got \['folds'\]; use the options"):
        measure(Silent(), str(clips), config={"folds": [1]})
    with pytest.raises(ValueError, match=r"same_label_fraction must be at most 1, got 1\.5"):
        measure(Silent(), str(clips), config={"same_label_fraction": 1.5})
