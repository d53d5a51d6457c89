"""What a run judges its stems with: refused early where it cannot be had, found where it was made, not made twice."""

import pytest

from engine.passes.config import PassConfig
from engine.scoring.estimator import SiSdrEstimator, load_estimator, save_estimator
from engine.selection.thresholds import Thresholds
from engine.taggers import load_tagger, save_tagger
from engine.taggers.network import ShareTagger, TagNetworkConfig
from tests.support.signals import RATE_HZ, TINY, tiny_checkpoint, two_bands
from train.data.config import MixConfig
from train.judges.calibrate import CalibrationConfig
from train.judges.tagger import TaggerConfig
from train.student import DistilConfig
from tune.config import RunConfig
from tune.judges import Judges, check_judges, prepare_judges

ESTIMATED = (Thresholds(min_estimated_si_sdr_db=5.0),)
TAGGED = (Thresholds(min_tagger_margin_db=0.0),)
FLOORED = (Thresholds(label_floor_fraction=0.2),)
PLAIN = (Thresholds(min_re_sdr_db=10.0),)
QUALITY = SiSdrEstimator(
    names=("mask_snr_db",),
    lowest=(-20.0,),
    highest=(40.0,),
    mean=(5.0,),
    deviation=(8.0,),
    weight=(3.0,),
    bias=6.0,
    error_at_db=(0.0, 10.0),
    error_db=(4.0, 3.0),
    about={},
)


def config(schedule, **settings):
    return RunConfig(**({"corpus": "natural.csv", "separator": "seed", "schedule": schedule} | settings))


@pytest.fixture
def estimator(tmp_path):
    save_estimator(QUALITY, tmp_path / "estimator")
    return str(tmp_path / "estimator")


@pytest.fixture
def ears(tmp_path):
    save_tagger(ShareTagger(TagNetworkConfig(sample_rate_hz=RATE_HZ), ("low", "high")), tmp_path / "ears")
    return str(tmp_path / "ears")


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


def prepared(config, out):
    said = []
    return prepare_judges(config, out, said.append), said


def folders_of(out):
    return sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("schedule", [ESTIMATED, FLOORED, (*PLAIN, *ESTIMATED)])
def test_an_estimate_without_the_means_to_calibrate_it_is_refused(schedule, estimator):
    with pytest.raises(ValueError, match=r"asks for estimated quality, .*set clean, or quality"):
        check_judges(config(schedule))
    check_judges(config(schedule, clean="clips.csv"))
    check_judges(config(schedule, quality=estimator))


def test_a_weight_by_quality_without_the_means_to_calibrate_it_is_refused(estimator):
    weighted = DistilConfig(mix=MixConfig(quality_weight="loss"))
    with pytest.raises(ValueError, match=r"asks for estimated quality, .*set clean, or quality"):
        check_judges(config(PLAIN, distil=weighted))
    check_judges(config(PLAIN, distil=weighted, quality=estimator))


def test_a_tagger_that_cannot_be_had_is_refused(ears):
    with pytest.raises(ValueError, match="asks for tagger_margin_db; set tagger, or clean"):
        check_judges(config(TAGGED))
    check_judges(config(TAGGED, clean="clips.csv"))
    check_judges(config(TAGGED, tagger=ears))


@pytest.mark.parametrize("rule", ["min_cycle_si_sdr_db", "max_rival_leak_db"])
def test_rules_on_scores_that_the_pass_will_not_have_are_refused(rule):
    schedule = (*PLAIN, Thresholds(**{rule: 0.0}))
    with pytest.raises(ValueError, match=r"asks for scores of re-separation; set engine\.reseparate"):
        check_judges(config(schedule))
    check_judges(config(schedule, engine=PassConfig(reseparate=True)))


def test_judges_that_are_given_are_opened_early(tmp_path, estimator, ears):
    with pytest.raises(ValueError, match=r"holds no quality\.json"):
        check_judges(config(PLAIN, quality=str(tmp_path / "nowhere")))
    with pytest.raises(ValueError):
        check_judges(config(PLAIN, tagger=str(tmp_path / "nowhere")))
    (tmp_path / "estimator" / "quality.json").write_text('{"format": 2}')
    with pytest.raises(ValueError, match="has not the fields of an estimator"):
        check_judges(config(PLAIN, quality=estimator))
    check_judges(config(PLAIN, tagger=ears))


def test_a_schedule_that_asks_for_nothing_needs_nothing_and_makes_nothing(out):
    check_judges(config(PLAIN))
    assert prepared(config(PLAIN, clean="nowhere.csv"), out) == (Judges(), [])
    assert folders_of(out) == ["iterations"]


def test_judges_that_are_given_are_used(out, estimator, ears):
    judges, said = prepared(config((*ESTIMATED, *TAGGED), quality=estimator, tagger=ears), out)
    assert judges == Judges(quality=QUALITY, tagger=ears)
    assert said == [] and folders_of(out) == ["iterations"]


def test_a_tagger_that_is_given_tags_though_no_rule_asks(out, ears):
    assert prepared(config(PLAIN, tagger=ears), out)[0] == Judges(tagger=ears)


def test_an_estimator_that_the_run_has_made_is_found(out, clips):
    save_estimator(QUALITY, out / "quality")
    judges, said = prepared(config(ESTIMATED, clean=clips), out)
    assert judges.quality == QUALITY and said == []
    assert folders_of(out) == ["iterations", "quality"]


def test_a_given_separator_is_calibrated_on_all_clips_once(out, clips, tmp_path):
    seed = tiny_checkpoint(tmp_path / "seed")
    wanted = config(
        ESTIMATED,
        clean=clips,
        separator=str(seed),
        calibration=CalibrationConfig(num_mixtures=40),
        engine=PassConfig(batch_s=5.0),
    )
    check_judges(wanted)
    judges, said = prepared(wanted, out)
    assert judges.quality is not None and judges.quality.about["held_out"] == "all clips"
    assert judges.quality == load_estimator(out / "quality")
    assert len(said) == 1 and "right within" in said[0]
    assert not {"rival_leak_db", "tagger_margin_db"} & set(judges.quality.names), "what the pass will not have"
    stamp = (out / "quality" / "quality.json").stat().st_mtime_ns
    assert prepared(wanted, out) == (judges, [])
    assert (out / "quality" / "quality.json").stat().st_mtime_ns == stamp
    assert folders_of(out / "quality") == ["quality.json"], "nothing was trained"


@pytest.mark.parametrize("again", [False, True])
def test_the_estimator_looks_at_what_a_pass_will_have(out, clips, tmp_path, again):
    wanted = config(
        ESTIMATED,
        clean=clips,
        separator=str(tiny_checkpoint(tmp_path / "seed")),
        calibration=CalibrationConfig(num_mixtures=40),
        engine=PassConfig(reseparate=again),
    )
    quality = prepared(wanted, out)[0].quality
    assert ("rival_leak_db" in quality.names) == again


def test_a_tagger_is_trained_on_the_clean_clips_once_at_the_seeds_rate(out, clips):
    wanted = config(
        TAGGED, clean=clips, tagger_training=TaggerConfig(steps=2, batch_size=2, segment_s=0.5, channels=16)
    )
    judges, said = prepared(wanted, out)
    assert judges == Judges(tagger=str(out / "tagger"))
    assert said == ["training a tagger on the single-source clips"]
    tagger = load_tagger(out / "tagger")
    assert tagger.sample_rate_hz == TINY.sample_rate_hz and set(tagger.labels) == {"low", "high"}
    found, said_again = prepared(wanted, out)
    assert found == judges and load_tagger(out / "tagger").fingerprint == tagger.fingerprint
    assert said_again == []
