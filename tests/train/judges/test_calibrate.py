"""Calibration on real files, with separators of known estimator."""

import numpy as np
import pyarrow as pa
import pytest

from engine.corpus.sources import SOURCES, SourceClips, read_sources
from engine.errors import AudioError
from engine.passes.separate import separate_clips
from engine.schema import SCORES
from engine.scoring.model_scores import Scorer
from engine.separators import load
from engine.separators.batching import BatchedSeparator
from tests.support.signals import RATE_HZ, BandSeparator, BandTagger, decoded, mixture, tiny_checkpoint, two_bands
from train.judges.calibrate import CalibrationConfig, calibrate, calibrate_on

CONFIG = CalibrationConfig(num_mixtures=60)


class LeakySeparator(BandSeparator):
    """Leaves some of everything in every stem."""

    def __init__(self, leak):
        super().__init__()
        self.leak = leak

    def separate(self, mix_BT, queries, *, lengths=None):
        return (1 - self.leak) * super().separate(mix_BT, queries, lengths=lengths) + self.leak * mix_BT


def scorer(leak=0.0, **settings):
    return Scorer(batched=BatchedSeparator(separator=LeakySeparator(leak), batch_s=20.0), **settings)


@pytest.fixture
def clips(write_sources):
    """Four clips of each band."""
    return write_sources(
        [
            (f"{label}-{seed}", label, 1, two_bands(RATE_HZ // 2, seed=seed)[number])
            for number, label in enumerate(("low", "high"))
            for seed in range(4)
        ]
    )


@pytest.fixture
def sources(clips):
    return read_sources(clips)


def clips_of(rows):
    return SourceClips(table=pa.Table.from_pylist(rows, SOURCES), root="")


def joined(*parts):
    return SourceClips(table=pa.concat_tables([part.table for part in parts]), root="")


def estimates(estimator, judge):
    """Of the stems of a natural clip that the calibration has not seen."""
    item, _ = separate_clips([decoded(mixture(RATE_HZ // 2, seed=9))], judge.batched)
    rows = [row for clip in judge.scores(item) for row in clip]
    return estimator.estimate(pa.Table.from_pylist(rows, schema=SCORES))["estimated_si_sdr_db"].to_pylist()


def test_estimates_order_separators_by_their_quality(sources):
    """Between bands of one level a leak has an SI-SDR of -20 log10 of it: 14 and 6.9 dB. 25 dB is all that counts."""
    judges = [scorer(leak, tagger=BandTagger()) for leak in (0.0, 0.2, 0.45)]
    estimator = calibrate_on([(judge, sources) for judge in judges], CONFIG, about={})
    assert estimator.about["num_stems"] == 2 * CONFIG.num_mixtures
    good, leaky, poor = (estimates(estimator, judge) for judge in judges)
    for found, expected_db in ((good, 25.0), (leaky, 14.0), (poor, 6.9)):
        assert found == pytest.approx([expected_db] * 2, abs=3)
    assert min(good) > max(leaky) > min(leaky) > max(poor)
    assert estimator.about["rmse_db"] < 3


def test_a_calibration_is_a_function_of_its_seed(sources):
    def calibrated(**changes):
        held_out = [(scorer(0.1), sources), (scorer(0.4), sources)]
        return calibrate_on(held_out, CalibrationConfig(num_mixtures=40, **changes), about={})

    assert calibrated() == calibrated()
    assert calibrated(seed=1).fingerprint != calibrated().fingerprint


def test_mixtures_are_shared_evenly_and_each_part_uses_its_own_clips(sources):
    halves = [sources.part(number, 2) for number in (0, 1)]
    judges = [scorer(leak, reseparate=False) for leak in (0.1, 0.4)]
    calibrate_on(list(zip(judges, halves, strict=True)), CONFIG, about={})
    for judge in judges:
        assert (
            sum(rows for rows, _ in judge.batched.separator.shapes) == CONFIG.num_mixtures
        )  # of two stems, a half each
    gone = clips_of([{"path": f"nowhere/{label}.wav", "label": label, "fold": 1} for label in ("low", "high")])
    with pytest.raises(AudioError, match=r"nowhere/.*cannot open it"):
        calibrate_on([(judges[0], sources), (judges[1], gone)], CONFIG, about={})


def test_scores_that_were_not_taken_are_not_used(sources):
    """Without re-separation and tagger, an estimate may not use scores that a pass will not have."""
    estimator = calibrate_on([(scorer(0.1, reseparate=False), sources)] * 2, CONFIG, about={})
    assert not {"cycle_si_sdr_db", "rival_leak_db", "tagger_margin_db"} & set(estimator.names)
    assert "mask_snr_db" in estimator.names


def test_a_label_that_the_separator_does_not_know_costs_its_stems_alone(sources, write_sources):
    whale = write_sources([("whale", "whale", 1, two_bands(4000, seed=7)[0])], folder="whales")
    more = joined(sources, read_sources(whale))
    estimator = calibrate_on([(scorer(0.1), more), (scorer(0.4), more)], CONFIG, about={})
    assert 50 <= estimator.about["num_stems"] < 2 * CONFIG.num_mixtures


def test_clips_that_are_silent_or_cannot_be_read_cost_their_mixtures_alone(sources, write_sources, tmp_path):
    silent = read_sources(write_sources([("silent", "low", 1, np.zeros(4000))], folder="silence"))
    gone = clips_of([{"path": str(tmp_path / "gone.wav"), "label": "high", "fold": 1}])
    more = joined(sources, silent, gone)
    estimator = calibrate_on([(scorer(0.1), more), (scorer(0.4), more)], CONFIG, about={})
    assert 50 <= estimator.about["num_stems"] < 2 * CONFIG.num_mixtures
    assert {"mask_snr_db", "stem_level_db"} <= set(estimator.names)


def test_too_few_mixtures_are_refused(sources):
    with pytest.raises(ValueError, match=r"must have at least 50 stems .*, got 20"):
        calibrate_on([(scorer(0.3), sources)], CalibrationConfig(num_mixtures=10), about={})


def test_calibration_on_one_separator_is_that_of_its_scorer(clips, sources, tmp_path):
    folder = tiny_checkpoint(tmp_path / "separator")
    judge = Scorer(batched=BatchedSeparator(separator=load(folder), batch_s=80.0), reseparate=False)
    expected = calibrate_on([(judge, sources)], CONFIG, about={})
    made = calibrate(load(folder), read_sources(clips, folds=[1]), config=CONFIG)
    assert made.fingerprint == expected.fingerprint
    assert made.about["clean"] == str(clips.parent)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_mixtures": 0}, "num_mixtures must be at least 1, got 0; "),
        ({"steps": -1}, "steps must be at least 1, got -1; "),
        ({"max_s": 0.0}, "max_s must be above 0, got 0.0; "),
        ({"three_source_fraction": 1.5}, "three_source_fraction must be at most 1, got 1.5; "),
    ],
)
def test_settings_that_cannot_work_raise(settings, message):
    with pytest.raises(ValueError, match=message):
        CalibrationConfig(**settings)
