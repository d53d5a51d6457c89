"""Judges of a run: missing ones are refused early, made ones are found and not made twice."""

import logging

import pytest

from engine.passes.config import PassConfig
from engine.scoring.estimator import SiSdrEstimator, load_estimator, save_estimator
from engine.selection.thresholds import Thresholds
from engine.separators import find_separator
from engine.taggers import find_tagger, load_tagger, save_tagger
from engine.taggers.network import ShareTagger, TagNetworkConfig
from tests.support.signals import RATE_HZ, TINY, tiny_checkpoint, two_bands
from train.data.config import MixConfig
from train.data.strategies.estimate_weights import EstimateWeights
from train.judges.calibrate import CalibrationConfig
from train.judges.tagger import TaggerConfig
from train.student import DistilConfig
from tune.config import RunConfig
from tune.inputs import require_judges, resolve
from tune.steps.judges import Judges, prepare_judges

ESTIMATED = (Thresholds(min_estimated_si_sdr_db=5.0),)
TAGGED = (Thresholds(min_tagger_margin_db=0.0),)
FLOORED = (Thresholds(label_floor_fraction=0.2),)
PLAIN = (Thresholds(min_re_sdr_db=10.0),)
ESTIMATOR = SiSdrEstimator(
    names=("mask_snr_db",),
    lowest=(-20.0,),
    highest=(40.0,),
    mean=(5.0,),
    deviation=(8.0,),
    weight=(3.0,),
    bias=6.0,
    error_at_db=(0.0, 10.0),
    error_db=(4.0, 3.0),
    about={"rmse_db": 3.5, "num_stems": 60},
)


def config(schedule, **settings):
    return RunConfig(**({"corpus": "natural.csv", "separator": "seed", "schedule": schedule} | settings))


@pytest.fixture
def estimator(tmp_path):
    save_estimator(ESTIMATOR, tmp_path / "estimator")
    return str(tmp_path / "estimator")


@pytest.fixture
def tagger(tmp_path):
    save_tagger(ShareTagger(TagNetworkConfig(sample_rate_hz=RATE_HZ), ("low", "high")), tmp_path / "given")
    return str(tmp_path / "given")


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "natural.csv").write_text("path,labels\na.wav,low;high\n")
    return str(tmp_path / "natural.csv")


@pytest.fixture
def clips(write_sources):
    rows = [
        (f"{label}-{seed}", label, 1 + seed % 2, two_bands(RATE_HZ // 2, seed=seed)[number])
        for number, label in enumerate(("low", "high"))
        for seed in range(4)
    ]
    return str(write_sources(rows))


@pytest.fixture
def out(tmp_path):
    """A run's folder with its seed."""
    tiny_checkpoint(tmp_path / "run" / "iterations" / "0" / "separator")
    return tmp_path / "run"


@pytest.fixture
def seed(out):
    return str(out / "iterations" / "0" / "separator")


@pytest.fixture
def prepared(corpus, seed, out, caplog):
    """Prepares the judges of a run; returns them and what was logged."""
    caplog.set_level(logging.INFO, logger="tune")

    def prepare(schedule, **settings):
        caplog.clear()
        wanted = config(schedule, **({"corpus": corpus, "separator": seed} | settings))
        return prepare_judges(wanted, resolve(wanted), find_separator(seed), out), list(caplog.messages)

    return prepare


def folders_of(out):
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("schedule", [ESTIMATED, FLOORED, (*PLAIN, *ESTIMATED)])
def test_a_schedule_with_estimates_needs_an_estimator_or_clean_clips(schedule):
    with pytest.raises(ValueError, match=r"estimator or clean must be set .*SI-SDR, got neither; set clean"):
        require_judges(config(schedule))
    require_judges(config(schedule, clean="clips.csv"))
    require_judges(config(schedule, estimator="estimator"))


def test_a_weight_by_estimates_needs_an_estimator_or_clean_clips():
    weighted = DistilConfig(mix=MixConfig(estimate_weights=EstimateWeights()))
    with pytest.raises(ValueError, match=r"estimator or clean must be set .*distil\.mix\.estimate_weights"):
        require_judges(config(PLAIN, distil=weighted))
    require_judges(config(PLAIN, distil=weighted, estimator="estimator"))


def test_a_schedule_with_tagger_margins_needs_a_tagger_or_clean_clips():
    with pytest.raises(ValueError, match=r"tagger or clean must be set .*tagger_margin_db, got neither; set tagger"):
        require_judges(config(TAGGED))
    require_judges(config(TAGGED, clean="clips.csv"))
    require_judges(config(TAGGED, tagger="tagger"))


@pytest.mark.parametrize("rule", ["min_cycle_si_sdr_db", "max_rival_leak_db"])
def test_rules_on_scores_that_the_pass_will_not_have_are_refused(rule):
    schedule = (*PLAIN, Thresholds(**{rule: 0.0}))
    with pytest.raises(ValueError, match=r"engine\.reseparate must be true .*got false; set engine\.reseparate=true"):
        require_judges(config(schedule))
    require_judges(config(schedule, engine=PassConfig(reseparate=True)))


def test_given_judges_are_opened_early(tmp_path, corpus, seed, estimator, tagger):
    def resolved(**settings):
        return resolve(config(PLAIN, corpus=corpus, separator=seed, **settings))

    with pytest.raises(ValueError, match=r"estimator\.json in .*nowhere"):
        resolved(estimator=str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere"):
        resolved(tagger=str(tmp_path / "nowhere"))
    assert resolved(tagger=tagger).tagger.fingerprint == load_tagger(tagger).fingerprint
    assert resolved(estimator=estimator).estimator == ESTIMATOR
    (tmp_path / "estimator" / "estimator.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match=r"estimator\.json"):
        resolved(estimator=estimator)


def test_a_schedule_that_needs_no_judges_makes_none(prepared, out, clips):
    assert prepared(PLAIN, clean=clips) == (Judges(), [])
    assert folders_of(out) == ["iterations"]


def test_given_judges_are_used(prepared, out, estimator, tagger):
    judges, logged = prepared((*ESTIMATED, *TAGGED), estimator=estimator, tagger=tagger)
    assert judges == Judges(estimator=ESTIMATOR, tagger=find_tagger(tagger))
    assert logged == [] and folders_of(out) == ["iterations"]


def test_a_given_tagger_is_used_even_if_no_rule_needs_it(prepared, tagger):
    assert prepared(PLAIN, tagger=tagger)[0] == Judges(tagger=find_tagger(tagger))


def test_an_estimator_that_the_run_has_made_is_found(prepared, out, clips):
    save_estimator(ESTIMATOR, out / "estimator")
    judges, logged = prepared(ESTIMATED, clean=clips)
    assert judges.estimator == ESTIMATOR and logged == []
    assert folders_of(out) == ["estimator", "iterations"]


def test_a_given_separator_is_calibrated_on_all_clips_once(prepared, out, clips):
    settings = {"clean": clips, "calibration": CalibrationConfig(num_mixtures=40), "engine": PassConfig(batch_s=5.0)}
    judges, logged = prepared(ESTIMATED, **settings)
    assert judges.estimator is not None and judges.estimator.about["held_out"] == "all clips"
    assert judges.estimator == load_estimator(out / "estimator")
    assert len(logged) == 1 and "root mean square error of the SI-SDR" in logged[0]
    assert not {"rival_leak_db", "tagger_margin_db"} & set(judges.estimator.names), (
        "the pass will not have these scores"
    )
    stamp = (out / "estimator" / "estimator.json").stat().st_mtime_ns
    assert prepared(ESTIMATED, **settings) == (judges, [])
    assert (out / "estimator" / "estimator.json").stat().st_mtime_ns == stamp
    assert folders_of(out / "estimator") == ["estimator.json"], "nothing was trained"


def test_the_estimator_uses_scores_of_reseparation_if_the_pass_has_them(prepared, clips):
    settings = {
        "clean": clips,
        "calibration": CalibrationConfig(num_mixtures=40),
        "engine": PassConfig(reseparate=True),
    }
    assert "rival_leak_db" in prepared(ESTIMATED, **settings)[0].estimator.names


def test_a_tagger_is_trained_on_the_clean_clips_once_at_the_seeds_rate(prepared, out, clips):
    training = TaggerConfig(steps=2, batch_size=2, segment_s=0.5, channels=16)
    judges, logged = prepared(TAGGED, clean=clips, tagger_training=training)
    assert judges == Judges(tagger=find_tagger(out / "tagger"))
    assert logged == ["training a tagger on the single-source clips"]
    tagger = load_tagger(out / "tagger")
    assert tagger.sample_rate_hz == TINY.sample_rate_hz and set(tagger.labels) == {"low", "high"}
    again, logged_again = prepared(TAGGED, clean=clips, tagger_training=training)
    assert again == judges and load_tagger(out / "tagger").fingerprint == tagger.fingerprint
    assert logged_again == []
