"""Stems in audio files: scores, the verdict of each rule and of all together."""

import numpy as np
import pytest
import soundfile

from engine.files.score import score_files
from engine.schema import SCORES
from engine.scoring.estimator import SiSdrEstimator
from engine.selection.thresholds import Quantile, Thresholds
from tests.support.signals import RATE_HZ, BandSeparator, BandTagger, two_bands, write_clips

LOW_T, HIGH_T = two_bands(RATE_HZ)
LEVEL_IS_ESTIMATE = SiSdrEstimator(
    names=("stem_level_db",),
    lowest=(-40.0,),
    highest=(0.0,),
    mean=(0.0,),
    deviation=(1.0,),
    weight=(1.0,),
    bias=0.0,
    error_at_db=(-100.0, 100.0),
    error_db=(2.0, 2.0),
    about={},
)
"""Estimates a stem's SI-SDR as its level."""


@pytest.fixture
def scored(tmp_path):
    """Scores ``low.wav`` and ``high.wav`` against their mixture, by default the sum of two bands."""

    def score(low_T=LOW_T, high_T=HIGH_T, *, mix_T=LOW_T + HIGH_T, labels=("low", "high"), thresholds=None, **judges):
        write_clips(tmp_path, {"mix.wav": mix_T, "low.wav": low_T, "high.wav": high_T})
        paths = {label: str(tmp_path / name) for label, name in zip(labels, ("low.wav", "high.wav"), strict=False)}
        return score_files(tmp_path / "mix.wav", paths, thresholds or Thresholds(), **judges)

    return score


def test_stems_in_files_are_scored_and_judged(scored):
    rows = scored(high_T=0.01 * HIGH_T[: RATE_HZ - 100], thresholds=Thresholds(min_stem_level_db=-30.0))
    assert [(row["label"], row["kept"], row["rejected_by"]) for row in rows] == [
        ("low", True, None),
        ("high", False, "min_stem_level_db"),
    ]
    assert rows[0]["scores"]["stem_level_db"] == pytest.approx(-3.0, abs=0.2)
    assert rows[1]["rejected_value"] == rows[1]["scores"]["stem_level_db"] == pytest.approx(-43.0, abs=0.2)
    assert rows[0]["scores"]["remix_snr_db"] == pytest.approx(3.1, abs=0.2)


def test_stems_of_another_length_than_the_mixture_are_refused(scored):
    long_T = np.tile(LOW_T, 2)
    with pytest.raises(ValueError, match=r"must be as long as their mixture, got .*high\.wav 1\.00 s"):
        scored(long_T, mix_T=long_T)


def test_every_active_rule_has_its_verdict_alone(scored):
    limits = {"min_remix_snr_db": 10.0, "min_stem_level_db": -2.0, "max_coherence_fraction": 0.5}
    rows = scored(thresholds=Thresholds(**limits))
    for row in rows:
        assert list(row["rules"]) == list(limits)
        assert (row["kept"], row["rejected_by"]) == (False, "min_stem_level_db")
        for name, verdict in row["rules"].items():
            assert verdict == {
                "passes": name != "min_stem_level_db",
                "value": row["scores"][name.partition("_")[2]],
                "limit": limits[name],
            }


def test_every_rule_that_rejects_a_stem_is_reported(scored):
    limits = Thresholds(min_re_sdr_db=10.0, min_remix_snr_db=10.0, max_contested_db=-10.0)
    for row in scored(HIGH_T, HIGH_T, thresholds=limits):
        assert row["rejected_by"] == "min_re_sdr_db"
        assert [verdict["passes"] for verdict in row["rules"].values()] == [False, False, False]


def test_a_quantile_is_of_these_stems(scored):
    rows = scored(
        0.5 * LOW_T,
        mix_T=0.5 * LOW_T + HIGH_T,
        thresholds=Thresholds(min_active_fraction=Quantile(quantile=0.5), min_mask_snr_db=Quantile(quantile=0.5)),
    )
    values = [row["scores"]["mask_snr_db"] for row in rows]
    assert [row["rules"]["min_mask_snr_db"]["passes"] for row in rows] == [value == max(values) for value in values]
    assert rows[0]["rules"]["min_mask_snr_db"]["limit"] == {"quantile": 0.5, "by_label": False}


BY_JUDGES = ["min_tagger_margin_db", "min_estimated_si_sdr_db", "label_floor_fraction"]


@pytest.mark.parametrize(
    ("low_T", "high_T", "rejected_by"),
    [
        (LOW_T, HIGH_T, [None, None]),
        (LOW_T + HIGH_T, 0 * HIGH_T, ["max_mixture_coherence_fraction", "min_stem_level_db"]),
        (0.5 * (LOW_T + HIGH_T), 0.5 * (LOW_T + HIGH_T), ["max_mixture_coherence_fraction"] * 2),
        (0.1 * LOW_T, 0.1 * HIGH_T, ["min_remix_snr_db"] * 2),
    ],
    ids=["sources", "mixture and silence", "halves", "quiet"],
)
def test_without_a_rule_the_default_thresholds_decide(scored, low_T, high_T, rejected_by):
    rows = scored(low_T, high_T)
    assert [row["rejected_by"] for row in rows] == rejected_by
    assert [row["kept"] for row in rows] == [rule is None for rule in rejected_by]
    assert all(row["not_judged"] == BY_JUDGES and "min_share_si_sdr_db" in row["rules"] for row in rows)


def test_a_default_threshold_is_judged_as_soon_as_its_score_is_at_hand(scored):
    rows = scored(HIGH_T, LOW_T, tagger=BandTagger(), estimator=LEVEL_IS_ESTIMATE)
    assert [row["not_judged"] for row in rows] == [["label_floor_fraction"]] * 2
    assert [row["rejected_by"] for row in rows] == ["min_tagger_margin_db"] * 2
    assert all(not row["rules"]["min_estimated_si_sdr_db"]["passes"] for row in rows), "no floor keeps it"
    assert scored(thresholds=Thresholds(min_re_sdr_db=10.0))[0]["not_judged"] == []


def test_a_clip_that_is_too_short_for_a_rule_is_rejected_by_it(scored):
    rows = scored(LOW_T[:1], HIGH_T[:1], mix_T=(LOW_T + HIGH_T)[:1], thresholds=Thresholds(min_re_sdr_db=10.0))
    assert [(row["kept"], row["rejected_by"]) for row in rows] == [(False, "min_re_sdr_db")] * 2
    assert rows[0]["rules"]["min_re_sdr_db"] == {"passes": False, "value": None, "limit": 10.0}


def test_scores_of_a_model_are_undefined_without_it(scored):
    for row in scored():
        assert list(row["scores"]) == SCORES.names
        assert [row["scores"][name] for name in SCORES.names[-3:]] == [None, None, None]


def test_a_separator_scores_the_leak_but_no_cycle(scored):
    clean = scored(separator=BandSeparator())
    leaking = scored(LOW_T + 0.5 * HIGH_T, 0.5 * HIGH_T, separator=BandSeparator())
    for row in clean:
        assert row["scores"]["rival_leak_db"] < -80
        assert row["scores"]["cycle_si_sdr_db"] is None
    assert leaking[0]["scores"]["rival_leak_db"] == pytest.approx(10 * np.log10(0.25 / 1.25), abs=0.1)
    assert leaking[1]["scores"]["rival_leak_db"] < -80


def test_the_separator_gets_files_at_its_rate(tmp_path):
    """The files have 16 kHz, with a sound above the separator's band."""
    seconds = np.arange(16000) / 16000
    low_T, high_T = (0.2 * np.sin(2 * np.pi * hz * seconds) for hz in (400, 6000))
    for name, samples_T in {"mix": low_T + high_T, "low": low_T, "high": high_T}.items():
        soundfile.write(tmp_path / f"{name}.wav", samples_T, 16000, subtype="FLOAT")
    stems = {name: str(tmp_path / f"{name}.wav") for name in ("low", "high")}
    levels = [
        [row["scores"]["stem_level_db"] for row in score_files(tmp_path / "mix.wav", stems, Thresholds(), **judges)]
        for judges in ({}, {"separator": BandSeparator()})
    ]
    assert levels[0] == pytest.approx([-3.01, -3.01], abs=0.05)
    assert levels[1][0] == pytest.approx(0.0, abs=0.1) and levels[1][1] < -30


def test_a_label_that_the_separator_does_not_know_is_refused(scored):
    with pytest.raises(ValueError, match="does not know 'whale'"):
        scored(labels=("low", "whale"), separator=BandSeparator())
    assert len(scored(labels=("low", "whale"))) == 2


@pytest.mark.parametrize("rate_hz", [RATE_HZ, 16000])
def test_a_tagger_recognises_swapped_stems(scored, rate_hz):
    swapped = scored(HIGH_T, LOW_T, thresholds=Thresholds(min_tagger_margin_db=0.0), tagger=BandTagger(rate_hz))
    assert [row["rejected_by"] for row in swapped] == ["min_tagger_margin_db"] * 2
    right = scored(thresholds=Thresholds(min_tagger_margin_db=0.0), tagger=BandTagger(rate_hz))
    assert [row["kept"] for row in right] == [True, True]
    assert all(row["scores"]["rival_leak_db"] is None for row in right)


def test_a_label_that_the_tagger_does_not_know_has_no_margin_and_passes_its_rule(scored):
    rows = scored(labels=("low", "whale"), thresholds=Thresholds(min_tagger_margin_db=0.0), tagger=BandTagger())
    assert rows[1]["scores"]["tagger_margin_db"] is None
    assert rows[1]["rules"]["min_tagger_margin_db"] == {"passes": True, "value": None, "limit": 0.0}


def test_an_estimator_adds_its_estimate_and_its_rule(scored):
    thresholds = Thresholds(min_estimated_si_sdr_db=-5.0)
    rows = scored(0.3 * LOW_T, thresholds=thresholds, estimator=LEVEL_IS_ESTIMATE)
    assert [row["kept"] for row in rows] == [False, True]
    for row in rows:
        assert list(row["scores"]) == [*SCORES.names, "estimated_si_sdr_db", "estimated_error_db"]
        assert row["scores"]["estimated_si_sdr_db"] == pytest.approx(row["scores"]["stem_level_db"], abs=1e-4)
        assert row["scores"]["estimated_error_db"] == 2.0
        assert row["rules"]["min_estimated_si_sdr_db"]["value"] == row["scores"]["estimated_si_sdr_db"]


@pytest.mark.parametrize(
    ("rule", "advice"),
    [
        ("max_rival_leak_db", "re-separation"),
        ("min_cycle_si_sdr_db", "re-separation"),
        ("min_tagger_margin_db", "with a tagger"),
        ("min_estimated_si_sdr_db", "give an estimator"),
    ],
)
def test_a_rule_whose_score_is_not_computed_is_refused(scored, rule, advice):
    with pytest.raises(ValueError, match=rf"cannot apply {rule} \(no stem has .*\); .*{advice}"):
        scored(thresholds=Thresholds(**{rule: 0.0}))


def test_the_coherence_of_an_only_stem_passes_its_rule(scored):
    (row,) = scored(labels=("low",), thresholds=Thresholds(max_coherence_fraction=0.1, max_contested_db=-50.0))
    assert row["kept"]
    assert [verdict["value"] for verdict in row["rules"].values()] == [None, None]
