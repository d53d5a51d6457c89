"""The estimator of a stem's SI-SDR: its fit, its error, undefined scores and its file."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from engine.schema import ESTIMATES, SCORES
from engine.scoring.estimator import fit_estimator, load_estimator, save_estimator

NUM_STEMS = 400
MASK_DB, LEAK_DB = np.random.default_rng(0).uniform(-10, 20, (2, NUM_STEMS))
GROUPS = (np.arange(NUM_STEMS) // 2).tolist()
TRUTH_DB = 4.0 + 0.4 * MASK_DB - 0.3 * LEAK_DB  # from -6 to 15 dB


def table(**columns):
    """Rows of ``SCORES``; values are undefined if NaN or in no column of ``columns``."""
    (num_rows,) = {len(values) for values in columns.values()}
    given = {name: pa.array(np.float32(values), from_pandas=True) for name, values in columns.items()}
    empty = pa.nulls(num_rows, pa.float32())
    return pa.table([given.get(name, empty) for name in SCORES.names], schema=SCORES)


def calibrated(truth_db=TRUTH_DB, **columns):
    scores = table(**(columns or {"mask_snr_db": MASK_DB, "rival_leak_db": LEAK_DB}))
    return fit_estimator(scores, truth_db, groups=GROUPS[: len(scores)], about={"made": "here"})


@pytest.fixture(scope="module")
def estimator():
    return calibrated()


def estimates(estimator, **columns):
    return estimator.estimate(table(**columns))["estimated_si_sdr_db"].to_pylist()


def test_a_truth_that_is_a_sum_of_two_scores_is_found(estimator):
    assert set(estimator.names) == {"mask_snr_db", "rival_leak_db"}
    mask_db, leak_db = np.random.default_rng(1).uniform(-9, 19, (2, 100))
    found = estimates(estimator, mask_snr_db=mask_db, rival_leak_db=leak_db)
    assert found == pytest.approx(4.0 + 0.4 * mask_db - 0.3 * leak_db, abs=0.5)
    assert estimator.about["rmse_db"] < 0.2
    assert estimator.about["num_stems"] == NUM_STEMS and estimator.about["made"] == "here"


def test_an_irrelevant_score_has_no_weight():
    irrelevant = np.random.default_rng(2).uniform(-10, 20, NUM_STEMS)
    estimator = calibrated(mask_snr_db=MASK_DB, rival_leak_db=LEAK_DB, contested_db=irrelevant)
    low, high = estimates(estimator, mask_snr_db=[5, 5], rival_leak_db=[5, 5], contested_db=[-10, 20])
    assert low == pytest.approx(high, abs=0.2)


@pytest.mark.parametrize("noise_db", [1.0, 2.0])
def test_the_error_is_the_noise_that_the_truth_has(noise_db):
    noisy_db = TRUTH_DB + noise_db * np.random.default_rng(3).standard_normal(NUM_STEMS)
    estimator = calibrated(noisy_db)
    assert estimator.about["rmse_db"] == pytest.approx(noise_db, rel=0.15)
    errors = estimator.estimate(table(mask_snr_db=MASK_DB, rival_leak_db=LEAK_DB))["estimated_error_db"].to_numpy()
    assert errors == pytest.approx(noise_db, rel=0.35)


def test_the_error_depends_on_the_estimate():
    """Only the good half of the stems has noise."""
    noise_db = np.where(TRUTH_DB > 4.5, 3.0, 0.0) * np.random.default_rng(4).standard_normal(NUM_STEMS)
    estimator = calibrated(TRUTH_DB + noise_db)
    bad, good = estimator.estimate(table(mask_snr_db=[-9, 19], rival_leak_db=[19, -9]))[
        "estimated_error_db"
    ].to_pylist()
    assert good > 2.0 > 1.0 > bad


def test_stems_of_a_clip_are_held_out_together():
    """A score that identifies its clip does not predict the truth of other clips."""
    clip_db = np.repeat(np.random.default_rng(5).uniform(-8, 20, NUM_STEMS // 2), 2)
    estimator = calibrated(clip_db, mask_snr_db=np.random.default_rng(6).uniform(-10, 20, NUM_STEMS))
    assert estimator.about["rmse_db"] == pytest.approx(np.std(clip_db), rel=0.05)


def test_an_undefined_score_counts_as_the_mean(estimator):
    found = estimates(estimator, mask_snr_db=[10, 10], rival_leak_db=[np.nan, np.mean(LEAK_DB)])
    assert found[0] == pytest.approx(found[1], abs=0.01)


def test_a_stem_without_scores_has_no_estimate(estimator):
    rows = estimator.estimate(table(mask_snr_db=[np.nan, 3.0], rival_leak_db=[np.nan, np.nan], re_sdr_db=[15.0, 15.0]))
    assert rows.schema.equals(ESTIMATES)
    assert [None in row.values() for row in rows.to_pylist()] == [True, False]
    assert set(rows.to_pylist()[0].values()) == {None}


def test_a_score_that_some_stems_lack_does_not_spoil_the_fit():
    gaps = np.where(np.arange(NUM_STEMS) % 4 == 0, np.nan, LEAK_DB)
    estimator = calibrated(mask_snr_db=MASK_DB, rival_leak_db=gaps)
    mask_db, leak_db = np.random.default_rng(1).uniform(-9, 19, (2, 50))
    found = estimates(estimator, mask_snr_db=mask_db, rival_leak_db=leak_db)
    assert found == pytest.approx(4.0 + 0.4 * mask_db - 0.3 * leak_db, abs=0.7)


def test_scores_outside_the_calibration_count_as_its_bounds(estimator):
    inside, outside = estimates(estimator, mask_snr_db=[MASK_DB.max(), 100], rival_leak_db=[LEAK_DB.min(), -100])
    assert outside == inside


def test_truths_outside_the_bounds_count_as_the_bounds():
    """The -100 dB of silent stems would outweigh everything else."""
    bad = MASK_DB < 0
    estimator = calibrated(np.where(bad, -100.0, 10.0), mask_snr_db=MASK_DB)
    assert estimator == calibrated(np.where(bad, -10.0, 10.0), mask_snr_db=MASK_DB)


@pytest.mark.parametrize(
    ("num_stems", "truth_db"), [(49, TRUTH_DB[:49]), (60, np.full(60, 7.0)), (60, np.full(60, -90.0))]
)
def test_too_few_stems_or_a_constant_truth_are_refused(num_stems, truth_db):
    with pytest.raises(ValueError, match=rf"at least 50 stems .*, got {num_stems} .*; give more single-source clips"):
        calibrated(truth_db, mask_snr_db=MASK_DB[:num_stems])


def test_a_saved_estimator_is_loaded(estimator, tmp_path):
    save_estimator(estimator, tmp_path)
    loaded = load_estimator(tmp_path)
    assert loaded == estimator and loaded.fingerprint == estimator.fingerprint
    scores = table(mask_snr_db=MASK_DB, rival_leak_db=LEAK_DB)
    assert loaded.estimate(scores).equals(estimator.estimate(scores))


def test_the_fingerprint_is_that_of_the_estimates(estimator):
    assert replace(estimator, about={"made": "elsewhere"}).fingerprint == estimator.fingerprint
    assert replace(estimator, bias=estimator.bias + 1e-6).fingerprint != estimator.fingerprint
    assert (
        replace(estimator, error_db=tuple(2 * error for error in estimator.error_db)).fingerprint
        != estimator.fingerprint
    )


def edited(estimator, folder, change):
    save_estimator(estimator, folder)
    path = folder / "estimator.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda stored: stored.update(bias=stored["bias"] + 1.0),
            r"must have the fingerprint of its values, got another \(it was edited\); calibrate again",
        ),
        (
            lambda stored: stored.update(fingerprint="0" * 16),
            r"must have the fingerprint of its values, got another \(it was edited\); calibrate again",
        ),
        (
            lambda stored: stored.pop("fingerprint"),
            r"must have the fingerprint of its values, got another \(it was edited\); calibrate again",
        ),
        (lambda stored: stored.update(format=0), "must have format 2, got another version; calibrate again"),
        (lambda stored: stored.pop("format"), "must have format 2, got another version; calibrate again"),
        (lambda stored: stored.pop("weight"), "must have weight, got a file without it; calibrate again"),
        (
            lambda stored: stored.update(names=["beauty_db", "rival_leak_db"]),
            "must have names of scores alone, got 'beauty_db'; calibrate again",
        ),
    ],
)
def test_an_edited_file_or_one_of_another_version_is_refused(estimator, tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"estimator\.json {message}"):
        load_estimator(edited(estimator, tmp_path, change))


def test_a_folder_without_an_estimator_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no estimator\.json in .*; give RUN/estimator"):
        load_estimator(tmp_path / "nowhere")
