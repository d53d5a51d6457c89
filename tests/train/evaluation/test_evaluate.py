"""Evaluation of systems with known figures, and the draw of its mixtures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

import train.evaluation.evaluate
from engine.audio.levels import active_rms
from engine.corpus.sources import read_sources
from engine.separators import load
from engine.separators.queries import Query
from train.evaluation.evaluate import SeparatorSystem, evaluate, score_mixtures
from train.evaluation.figures import Scored, confidence_interval, summarise
from train.evaluation.mixtures import (
    EvaluationMixture,
    ValidationConfig,
    draw_mixture,
    draw_mixtures,
    resolve_validation,
)

RATE_HZ = 8000
LABELS = ("bell", "dog", "rain", "siren")
Write = Callable[..., Path]


def tone(hz: float, *, duration_s: float = 0.5, gain: float = 0.3) -> np.ndarray:
    return (gain * np.sin(2 * np.pi * hz * np.arange(round(duration_s * RATE_HZ)) / RATE_HZ)).astype(np.float32)


def tones(labels: Sequence[str] = LABELS, num: int = 3, fold: int = 1) -> list[tuple[str, str, int, np.ndarray]]:
    """Clips of whole cycles and one length, so that all are orthogonal, at very different loudness."""
    return [
        (f"{label}-{fold}-{i}", label, fold, tone(300 + 400 * k + 20 * i + 100 * fold, gain=0.5 / 4**i))
        for k, label in enumerate(labels)
        for i in range(num)
    ]


def draw(clips: Path, **settings: object) -> list[EvaluationMixture]:
    config = ValidationConfig(**{"clips": str(clips), "num_mixtures": 8, **settings})
    return draw_mixtures(resolve_validation(config), sample_rate_hz=RATE_HZ)


def truth(mixture: EvaluationMixture) -> torch.Tensor:
    return torch.from_numpy(mixture.sources_ST)


def whole(mixture: EvaluationMixture) -> torch.Tensor:
    return torch.from_numpy(mixture.mix_T).expand(len(mixture.labels), -1)


def same(first: EvaluationMixture, second: EvaluationMixture) -> bool:
    return (first.labels, first.clips) == (second.labels, second.clips) and np.array_equal(
        first.sources_ST, second.sources_ST
    )


class Scaled:
    """A separator that returns the mixture times a gain for every query, and remembers the queries."""

    def __init__(self, gain: float, *, sample_rate_hz: int = RATE_HZ, labels: tuple[str, ...] = LABELS) -> None:
        self.gain, self.sample_rate_hz, self.labels = gain, sample_rate_hz, labels
        self.queries: list[str] = []

    def separate(
        self, mix_BT: torch.Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        self.queries += queries
        return self.gain * mix_BT


def scored(*values_db: float, label: str = "bell", absent: tuple[str, float] | None = None) -> Scored:
    """A mixture whose stems have these figures."""
    stems = tuple({"sdri_db": value_db, "bss_sdri_db": -value_db} for value_db in values_db)
    return Scored(labels=(label,) * len(stems), stems=stems, absent=absent)


@pytest.fixture
def clips(write_sources: Write) -> Path:
    return write_sources(tones())


# Figures.


def test_the_truth_scores_very_high(clips: Path) -> None:
    report = evaluate(truth, draw(clips))
    assert report["sdr_db"] > 90
    assert report["si_sdr_db"] > 90
    assert report["sdri_db"] > 90


@pytest.mark.parametrize("num_sources", [2, 3])
def test_the_mixture_itself_gains_exactly_nothing(clips: Path, num_sources: int) -> None:
    report = evaluate(whole, draw(clips, num_sources=num_sources))
    assert report["sdri_db"] == report["si_sdri_db"] == 0.0
    assert report["sdr_db"] == pytest.approx(-10 * np.log10(num_sources - 1), abs=0.01)
    assert report["sdri_standard_error_db"] == 0.0


def test_half_the_mixture_is_3_db_better_by_sdr_and_no_better_by_si_sdr(clips: Path) -> None:
    """Orthogonal sources of equal energy: the error (s - r) / 2 has half a source's energy."""
    report = evaluate(lambda mixture: 0.5 * whole(mixture), draw(clips))
    assert report["sdr_db"] == pytest.approx(3.0103, abs=0.01)
    assert report["sdri_db"] == pytest.approx(3.0103, abs=0.01)
    assert report["si_sdri_db"] == pytest.approx(0.0, abs=0.01)


def test_silence_scores_0_db(clips: Path) -> None:
    report = evaluate(lambda mixture: torch.zeros_like(truth(mixture)), draw(clips))
    assert report["sdr_db"] == pytest.approx(0.0, abs=1e-6)
    assert report["si_sdr_db"] == -100.0


def test_swapped_stems_are_seen(clips: Path) -> None:
    report = evaluate(lambda mixture: truth(mixture).flip(0), draw(clips))
    assert report["sdr_db"] == pytest.approx(-3.0103, abs=0.01)
    assert report["si_sdri_db"] < -50


def noisy_bell(mixture: EvaluationMixture) -> torch.Tensor:
    """The truth, but for the bell, which is the mixture."""
    rows = [whole(mixture)[i] if label == "bell" else truth(mixture)[i] for i, label in enumerate(mixture.labels)]
    return torch.stack(rows)


def test_labels_add_up_to_the_whole(clips: Path) -> None:
    report = evaluate(noisy_bell, draw(clips, num_mixtures=12))
    assert report["num_mixtures"] == 12
    assert report["num_stems"] == sum(part["num_stems"] for part in report["by_label"].values()) == 24
    for name in ("sdr_db", "sdri_db", "si_sdr_db", "si_sdri_db"):
        total = sum(part[name] * part["num_stems"] for part in report["by_label"].values())
        assert report[name] == pytest.approx(total / 24)
    assert report["by_label"]["bell"]["sdri_db"] == 0.0
    assert report["by_label"]["dog"]["sdri_db"] > 90
    assert list(report["by_label"]) == sorted(report["by_label"])


def test_standard_error_is_that_of_the_stems(clips: Path) -> None:
    mixtures = draw(clips, num_mixtures=12)
    report, bells = evaluate(noisy_bell, mixtures), [label == "bell" for m in mixtures for label in m.labels]
    gains_db = [0.0 if bell else report["by_label"]["dog"]["sdri_db"] for bell in bells]
    assert report["sdri_standard_error_db"] == pytest.approx(np.std(gains_db, ddof=1) / 24**0.5, rel=0.01)


def test_a_separator_is_given_the_mixture_and_the_labels(clips: Path, write_checkpoint: Write) -> None:
    separator = load(write_checkpoint(LABELS))
    (mixture,) = draw(clips, num_mixtures=1)
    stems_ST = SeparatorSystem(separator)(mixture)
    alone_T = separator.separate(torch.from_numpy(mixture.mix_T)[None], [mixture.labels[1]])[0]
    assert stems_ST.shape == mixture.sources_ST.shape
    assert torch.allclose(stems_ST[1], alone_T, atol=1e-5)
    report = evaluate(SeparatorSystem(separator), [mixture])
    assert np.isfinite([report["sdri_db"], report["si_sdri_db"]]).all()


@pytest.mark.parametrize("names_rivals", [True, False])
def test_queries_name_the_other_labels_of_a_mixture_where_that_is_used(clips: Path, names_rivals: bool) -> None:
    plain, knowing = Scaled(1.0), Scaled(1.0)
    knowing.uses_unwanted = True
    mixtures = draw(clips, num_mixtures=3, num_sources=2, names_rivals=names_rivals)
    for separator in (plain, knowing):
        evaluate(SeparatorSystem(separator), mixtures)
    assert {type(query) for query in plain.queries} == {str}
    for mixture in mixtures:
        for label in mixture.labels:
            others = [other for other in mixture.labels if other != label]
            assert (Query(label, unwanted=others) if names_rivals else label) in knowing.queries
    three = [query for query in knowing.queries if isinstance(query, Query) and len(query.unwanted) == 2]
    assert len(three) == (3 if names_rivals else 0)  # the absent label of each mixture


def test_a_label_the_separator_does_not_know_is_named(clips: Path, write_checkpoint: Write) -> None:
    separator = load(write_checkpoint(("bells", "cow")))
    with pytest.raises(ValueError, match="there is no label"):
        evaluate(SeparatorSystem(separator), draw(clips))


def test_the_three_sdrs_tell_a_gain_and_an_echo_apart(write_sources: Write) -> None:
    """Half the truth: an SNR of 6 dB, perfect to both others. A copy 10 samples later: bad to all but BSS-eval's.

    Noise keeps still for half a second, so that the delay loses nothing at the end.
    """
    rng = np.random.default_rng(0)
    sounds = [np.pad(rng.standard_normal(8000), (0, 400)) for _ in "ab"]
    path = write_sources([("a", "bell", 1, sounds[0]), ("b", "dog", 1, sounds[1])])
    mixtures = draw(path, num_mixtures=2)
    half = evaluate(lambda mixture: 0.5 * truth(mixture), mixtures)
    assert half["sdr_db"] == pytest.approx(6.0206, abs=1e-3)
    assert min(half["si_sdr_db"], half["bss_sdr_db"]) > 60
    late = evaluate(lambda mixture: truth(mixture).roll(10, -1), mixtures)
    assert late["sdr_db"] == pytest.approx(-3.0103, abs=0.3)
    assert late["si_sdr_db"] < -20
    assert late["bss_sdr_db"] > 60


def test_the_mixture_gains_nothing_by_bss_eval_either(clips: Path) -> None:
    report = evaluate(whole, draw(clips))
    assert report["bss_sdri_db"] == report["median"]["bss_sdri_db"] == 0.0
    assert report["confidence_95"]["bss_sdri_db"] == [0.0, 0.0]
    assert all(part["bss_sdri_db"] == 0.0 for part in report["by_label"].values())


def test_quick_leaves_out_what_is_costly_and_changes_nothing_else(clips: Path) -> None:
    separator = Scaled(0.5)
    full, quick = (evaluate(SeparatorSystem(separator), draw(clips, num_mixtures=4), quick=q) for q in (False, True))
    assert len(separator.queries) == 4 * 3 + 4 * 2
    assert "bss_sdr_db" not in quick
    assert quick["false_extraction_db"] is None
    for name in ("sdr_db", "sdri_db", "si_sdr_db", "si_sdri_db", "sdri_standard_error_db"):
        assert quick[name] == full[name]


class Guarded(Scaled):
    """Remembers the number of samples in each call, and refuses one label."""

    def __init__(self, gain: float = 0.5) -> None:
        super().__init__(gain)
        self.sizes: list[int] = []

    def separate(
        self, mix_BT: torch.Tensor, queries: Sequence[str], *, lengths: Sequence[int] | None = None
    ) -> torch.Tensor:
        self.sizes.append(mix_BT.numel())
        if "siren" in queries:
            raise ValueError("sirens must not be separated, got one; leave it out")
        return super().separate(mix_BT, queries, lengths=lengths)


def test_mixtures_of_different_shapes_are_scored_together_as_each_alone(clips: Path) -> None:
    mixtures = [
        one
        for num_sources, max_s in ((2, 0.5), (3, 0.5), (2, 0.3), (1, 0.5))
        for one in draw(clips, num_mixtures=3, num_sources=num_sources, max_s=max_s)
    ]
    together = [one for _, one in score_mixtures(SeparatorSystem(Scaled(0.5)), enumerate(mixtures))]
    for number, (mixture, one) in enumerate(zip(mixtures, together, strict=True)):
        ((_, alone),) = score_mixtures(SeparatorSystem(Scaled(0.5)), [(number, mixture)])
        assert isinstance(alone, Scored) and isinstance(one, Scored)
        assert (one.labels, one.absent) == (mixture.labels, alone.absent)
        assert one.stems == tuple(pytest.approx(stem, abs=1e-6) for stem in alone.stems)


def test_a_mixture_that_is_refused_costs_its_own_scores_alone(clips: Path) -> None:
    mixtures = draw(clips, num_mixtures=12)
    for number, one in score_mixtures(SeparatorSystem(Guarded()), enumerate(mixtures), quick=True):
        assert isinstance(one, ValueError) == ("siren" in mixtures[number].labels)


def test_some_mixtures_are_in_memory_at_once(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train.evaluation.evaluate, "_SAMPLES_AT_ONCE", {"cpu": 3 * 4000 * 4})
    separator, ahead = Scaled(0.5), list[int]()
    mixtures = (ahead.append(len(separator.queries)) or mixture for mixture in draw(clips, num_mixtures=10))
    evaluate(SeparatorSystem(separator), mixtures)
    assert ahead == [0, 0, 0, 0, 12, 12, 12, 12, 24, 24]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_figures_of_the_cpu(clips: Path, write_checkpoint: Write) -> None:
    folder, mixtures = write_checkpoint(LABELS), draw(clips)
    here, there = (evaluate(SeparatorSystem(load(folder, device=one)), mixtures) for one in ("cpu", "cuda"))
    assert there["median"] == pytest.approx(here["median"], abs=1e-2)


def test_no_mixtures_are_an_error() -> None:
    with pytest.raises(ValueError, match="must have at least one mixture, got none"):
        evaluate(truth, [])


# Medians and intervals.


def test_means_and_medians_are_those_of_the_stems() -> None:
    report = summarise([scored(1.0, 2.0), scored(6.0), scored(3.0, 23.0, label="dog")])
    assert (report["sdri_db"], report["median"]["sdri_db"]) == (7.0, 3.0)
    assert (report["bss_sdri_db"], report["median"]["bss_sdri_db"]) == (-7.0, -3.0)
    bell, dog = report["by_label"]["bell"], report["by_label"]["dog"]
    assert (bell["sdri_db"], bell["median"]["sdri_db"], bell["num_stems"]) == (3.0, 2.0, 3)
    assert (dog["sdri_db"], dog["median"]["sdri_db"], dog["num_stems"]) == (13.0, 13.0, 2)
    low, high = report["confidence_95"]["sdri_db"]
    assert 1.5 <= low < 7.0 < high <= 13.0
    assert bell["confidence_95"]["sdri_db"] is not None
    assert dog["confidence_95"]["sdri_db"] is None, "one mixture says nothing of how they vary"


def test_an_interval_covers_the_mean_about_19_times_in_20() -> None:
    rng, num_covered = np.random.default_rng(0), 0
    for seed in range(300):
        low, high = confidence_interval(rng.normal(5.0, 2.0, 60), range(60), seed=seed)
        num_covered += low <= 5.0 <= high
    assert 0.91 * 300 <= num_covered <= 0.98 * 300


def test_an_interval_is_as_wide_as_theory_has_it() -> None:
    values_N = np.random.default_rng(0).normal(0.0, 3.0, 2000)
    low, high = confidence_interval(values_N, range(2000))
    assert high - low == pytest.approx(2 * 1.96 * values_N.std() / 2000**0.5, rel=0.08)
    assert (low + high) / 2 == pytest.approx(values_N.mean(), abs=0.02)


def test_the_bootstrap_draws_mixtures_with_all_their_stems() -> None:
    """Two stems that say the same are no more evidence than one; taken as independent they would seem so."""
    values_N = np.random.default_rng(0).normal(size=50)
    once = confidence_interval(values_N, range(50))
    twice = confidence_interval(np.repeat(values_N, 2), np.repeat(np.arange(50), 2))
    apart = confidence_interval(np.repeat(values_N, 2), range(100))
    assert twice == pytest.approx(once)
    assert apart[1] - apart[0] < 0.8 * (once[1] - once[0])


def test_an_interval_depends_on_the_seed_alone() -> None:
    values_NK = np.random.default_rng(0).normal(size=(30, 2))
    first, again, other = (confidence_interval(values_NK, range(30), seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == (2, 2)
    assert first[:, 1] == pytest.approx(confidence_interval(values_NK[:, 1], range(30), seed=1))


@pytest.mark.parametrize("mixtures", [[], [7], [3, 3, 3]])
def test_fewer_than_two_mixtures_have_no_interval(mixtures: list[int]) -> None:
    assert confidence_interval(np.zeros(len(mixtures)), mixtures) is None


# False extraction.


@pytest.mark.parametrize(("gain", "level_db"), [(0.0, -100.0), (1.0, 0.0), (0.1, -20.0)])
def test_false_extraction_is_the_level_of_the_stem_of_an_absent_sound(
    clips: Path, gain: float, level_db: float
) -> None:
    report = evaluate(SeparatorSystem(Scaled(gain)), draw(clips))
    assert report["false_extraction_db"] == pytest.approx(level_db, abs=1e-4)
    assert report["median"]["false_extraction_db"] == pytest.approx(level_db, abs=1e-4)
    assert report["confidence_95"]["false_extraction_db"] == pytest.approx([level_db] * 2, abs=1e-4)
    assert report["num_absent_queries"] == report["num_mixtures"] == 8


def test_absent_labels_are_known_not_in_the_mixture_and_drawn_by_the_seed(clips: Path) -> None:
    """A label in another spelling is the same one."""
    known = ("Bell", "dog", "rain", "The sound of siren", "whale")
    drawn = []
    for seed in (0, 0, 1):
        separator, mixtures = Scaled(1.0, labels=known), draw(clips, num_mixtures=20)
        evaluate(SeparatorSystem(separator), mixtures, seed=seed)
        queries = separator.queries[2::3]
        assert set(queries) <= set(known)
        for mixture, label in zip(mixtures, queries, strict=True):
            assert label.lower().removeprefix("the sound of ") not in mixture.labels
        drawn.append(queries)
    assert drawn[0] == drawn[1] != drawn[2]
    assert set(drawn[0]) == set(known)


def test_a_label_has_the_false_extraction_of_the_queries_for_it() -> None:
    report = summarise(
        [
            scored(1.0, label="bell", absent=("Dog", -10.0)),
            scored(1.0, label="dog", absent=("bell", -30.0)),
            scored(1.0, label="rain", absent=("dog", -20.0)),
            scored(1.0, label="rain"),
        ]
    )
    levels_db = {name: part["false_extraction_db"] for name, part in report["by_label"].items()}
    assert levels_db == {"bell": -30.0, "dog": -15.0, "rain": None}
    assert (report["false_extraction_db"], report["num_absent_queries"]) == (-20.0, 3)


def test_an_oracle_and_a_separator_without_other_labels_get_no_absent_query(clips: Path) -> None:
    for system in (truth, SeparatorSystem(Scaled(1.0, labels=LABELS[:2]))):
        report = evaluate(system, [m for m in draw(clips, num_mixtures=30) if set(m.labels) == set(LABELS[:2])])
        assert (report["false_extraction_db"], report["num_absent_queries"]) == (None, 0)
        assert report["median"]["false_extraction_db"] is None


def test_no_label_is_absent_if_the_other_sounds_are_unknown(clips: Path) -> None:
    (mixture,) = draw(clips, num_mixtures=1, num_sources=2)
    for others, num in (((), 1), (("siren",), 1), (LABELS, 0), (None, 0)):
        part = EvaluationMixture(
            labels=mixture.labels[:1], clips=mixture.clips, sources_ST=mixture.sources_ST, other_labels=others
        )
        report = evaluate(SeparatorSystem(Scaled(1.0)), [part])
        assert (report["num_stems"], report["num_absent_queries"]) == (1, num)
        assert report["sdr_db"] == pytest.approx(0.0, abs=0.01)


def test_a_separator_of_another_rate_is_given_its_own_and_measured_at_that_of_the_mixture() -> None:
    """A tone below both Nyquist frequencies comes back as it went, but for the ends of the filters."""
    sound_T = tone(700, duration_s=2.0) * np.hanning(16000).astype(np.float32)
    mixture = EvaluationMixture(labels=("bell",), clips=("a",), sources_ST=sound_T[None])
    for rate_hz in (4000, 11025, 16000):
        system = SeparatorSystem(Scaled(1.0, sample_rate_hz=rate_hz), sample_rate_hz=RATE_HZ)
        assert system(mixture).shape == (1, 16000)
        assert evaluate(system, [mixture])["sdr_db"] > 50


# The draw.


def test_the_same_seed_draws_the_same(clips: Path) -> None:
    assert all(map(same, draw(clips, seed=3), draw(clips, seed=3)))


def test_another_seed_draws_others(clips: Path) -> None:
    assert sum(map(same, draw(clips, seed=3), draw(clips, seed=4))) < 3


def test_a_mixture_does_not_depend_on_how_many_are_drawn(clips: Path) -> None:
    few, many = draw(clips, num_mixtures=10), draw(clips, num_mixtures=20)
    assert (len(few), len(many)) == (10, 20)
    assert all(same(*pair) for pair in zip(few, many[:10], strict=True))
    assert not any(same(few[0], other) for other in many[10:])


def test_the_order_of_labels_in_the_list_does_not_matter(write_sources: Write) -> None:
    forwards = draw(write_sources(tones()))
    backwards = draw(write_sources(sorted(tones(), key=lambda clip: clip[1], reverse=True)))
    assert all(map(same, forwards, backwards))


@pytest.mark.parametrize("num_sources", [1, 2, 3, 4])
def test_labels_of_a_mixture_differ_and_name_its_clips(clips: Path, num_sources: int) -> None:
    for mixture in draw(clips, num_sources=num_sources):
        assert len(set(mixture.labels)) == len(mixture.labels) == num_sources == len(mixture.sources_ST)
        assert [Path(clip).name.split("-")[0] for clip in mixture.clips] == list(mixture.labels)
        assert np.allclose(mixture.mix_T, mixture.sources_ST.sum(0), atol=1e-6)


def test_sources_are_equally_loud_where_they_sound(write_sources: Write) -> None:
    """One tone is on all the time, one for a quarter of it and one is a short quiet clip that is padded."""
    part = np.concatenate([np.zeros(1600), tone(700, duration_s=0.2), np.zeros(3200)]).astype(np.float32)
    path = write_sources(
        [("a", "bell", 1, tone(300, duration_s=0.8)), ("b", "dog", 1, part), ("c", "rain", 1, 1e-3 * tone(900))]
    )
    for mixture in draw(path, num_sources=3):
        levels = [active_rms(source_T, sample_rate_hz=RATE_HZ) for source_T in mixture.sources_ST]
        assert 20 * np.log10(levels) == pytest.approx([-20.0] * 3, abs=0.8)
        assert mixture.sources_ST.shape == (3, 6400)
        loudest = [float(np.abs(source_T).max()) for source_T in mixture.sources_ST]
        assert loudest == pytest.approx([0.1 * 2**0.5] * 3, rel=0.02)


def test_a_drawn_gain_stays_within_gain_db(clips: Path) -> None:
    levels_db = []
    for number in range(20):
        mixture = draw_mixture(
            read_sources(clips),
            num_sources=2,
            sample_rate_hz=RATE_HZ,
            rng=np.random.default_rng(number),
            gain_db=5.0,
        )
        levels_db += [20 * np.log10(active_rms(each_T, sample_rate_hz=RATE_HZ) / 0.1) for each_T in mixture.sources_ST]
    assert -5.01 < min(levels_db) < -3
    assert 3 < max(levels_db) < 5.01


def test_shorter_clips_are_padded_at_different_places(write_sources: Write) -> None:
    path = write_sources([("a", "bell", 1, tone(300)), ("b", "dog", 1, tone(700, duration_s=0.1))])
    firsts = {int(np.flatnonzero(mixture.sources_ST[mixture.labels.index("dog")])[0]) for mixture in draw(path)}
    assert len(firsts) == 8


def test_only_max_s_of_each_clip_is_used(clips: Path) -> None:
    assert {mixture.mix_T.shape for mixture in draw(clips, max_s=0.25)} == {(2000,)}


def test_only_the_chosen_folds_are_used(write_sources: Write) -> None:
    path = write_sources([*tones(fold=1), *tones(fold=2), *tones(fold=3)])
    names = [Path(clip).name for mixture in draw(path, folds=(1, 3), num_mixtures=20) for clip in mixture.clips]
    assert {name.split("-")[1] for name in names} == {"1", "3"}
    with pytest.raises(ValueError, match=r"folds must include one of \[1, 2, 3\], got \[9\]"):
        draw(path, folds=(9,))


# Mixtures that cannot be drawn.


def test_too_few_labels_are_an_error(write_sources: Write) -> None:
    path = write_sources(tones(("bell", "dog")))
    with pytest.raises(
        ValueError, match=r"mixtures of 3 sources must have as many labels.*\['bell', 'dog'\]; add clips"
    ):
        draw(path, num_sources=3)


def test_a_silent_clip_is_named(write_sources: Write) -> None:
    path = write_sources([("hush", "bell", 1, np.zeros(4000)), *tones(("dog",))])
    with pytest.raises(ValueError, match=r"hush\.wav must contain sound, got silence"):
        draw(path)


def test_an_unreadable_clip_is_named(write_sources: Write) -> None:
    path = write_sources([("torn", "bell", 1, tone(300)), *tones(("dog",))])
    (path.parent / "torn.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"torn\.wav"):
        draw(path)


@pytest.mark.parametrize("name", ["num_mixtures", "num_sources"])
def test_settings_out_of_range_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        ValidationConfig(**{"clips": "clips.csv", name: 0})
