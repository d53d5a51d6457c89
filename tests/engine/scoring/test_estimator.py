"""The estimator of a stem's SI-SDR: finds what scores say of it, knows its error, and is kept without being changed."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from engine.schema import ESTIMATES, SCORES
from engine.scoring.estimator import calibrate, load_estimator, save_estimator

NUM_STEMS = 400
MASK_DB, LEAK_DB = np.random.default_rng(0).uniform(-10, 20, (2, NUM_STEMS))
GROUPS = (np.arange(NUM_STEMS) // 2).tolist()
TRUTH_DB = 4.0 + 0.4 * MASK_DB - 0.3 * LEAK_DB  # from -6 to 15 dB


def table(**columns):
    """Rows of ``SCORES`` of which all but ``columns`` is undefined; NaN in a column is undefined too."""
    (num_rows,) = {len(values) for values in columns.values()}
    given = {name: pa.array(np.float32(values), from_pandas=True) for name, values in columns.items()}
    empty = pa.nulls(num_rows, pa.float32())
    return pa.table([given.get(name, empty) for name in SCORES.names], schema=SCORES)


def calibrated(truth_db=TRUTH_DB, **columns):
    scores = table(**(columns or {"mask_snr_db": MASK_DB, "rival_leak_db": LEAK_DB}))
    return calibrate(scores, truth_db, groups=GROUPS[: len(scores)], about={"made": "here"})


@pytest.fixture(scope="module")
def quality():
    return calibrated()


def estimates(quality, **columns):
    return quality.estimate(table(**columns))["estimated_si_sdr_db"].to_pylist()


def test_a_truth_that_is_a_sum_of_two_scores_is_found(quality):
    assert set(quality.names) == {"mask_snr_db", "rival_leak_db"}
    mask_db, leak_db = np.random.default_rng(1).uniform(-9, 19, (2, 100))
    found = estimates(quality, mask_snr_db=mask_db, rival_leak_db=leak_db)
    assert found == pytest.approx(4.0 + 0.4 * mask_db - 0.3 * leak_db, abs=0.5)
    assert quality.about["rmse_db"] < 0.2
    assert quality.about["num_stems"] == NUM_STEMS and quality.about["made"] == "here"


def test_a_score_that_says_nothing_gets_no_say():
    irrelevant = np.random.default_rng(2).uniform(-10, 20, NUM_STEMS)
    quality = calibrated(mask_snr_db=MASK_DB, rival_leak_db=LEAK_DB, contested_db=irrelevant)
    low, high = estimates(quality, mask_snr_db=[5, 5], rival_leak_db=[5, 5], contested_db=[-10, 20])
    assert low == pytest.approx(high, abs=0.2)


@pytest.mark.parametrize("noise_db", [1.0, 2.0])
def test_the_error_is_the_noise_that_the_truth_has(noise_db):
    noisy_db = TRUTH_DB + noise_db * np.random.default_rng(3).standard_normal(NUM_STEMS)
    quality = calibrated(noisy_db)
    assert quality.about["rmse_db"] == pytest.approx(noise_db, rel=0.15)
    errors = quality.estimate(table(mask_snr_db=MASK_DB, rival_leak_db=LEAK_DB))["estimated_error_db"].to_numpy()
    assert errors == pytest.approx(noise_db, rel=0.35)


def test_the_error_is_told_where_it_is():
    """Noise on the good half of the stems alone."""
    noise_db = np.where(TRUTH_DB > 4.5, 3.0, 0.0) * np.random.default_rng(4).standard_normal(NUM_STEMS)
    quality = calibrated(TRUTH_DB + noise_db)
    bad, good = quality.estimate(table(mask_snr_db=[-9, 19], rival_leak_db=[19, -9]))["estimated_error_db"].to_pylist()
    assert good > 2.0 > 1.0 > bad


def test_stems_of_a_clip_are_held_out_together():
    """A score that names its clip says nothing of clips that were not seen."""
    clip_db = np.repeat(np.random.default_rng(5).uniform(-8, 20, NUM_STEMS // 2), 2)
    quality = calibrated(clip_db, mask_snr_db=np.random.default_rng(6).uniform(-10, 20, NUM_STEMS))
    assert quality.about["rmse_db"] == pytest.approx(np.std(clip_db), rel=0.05)


def test_an_undefined_score_counts_as_the_usual_one(quality):
    found = estimates(quality, mask_snr_db=[10, 10], rival_leak_db=[np.nan, np.mean(LEAK_DB)])
    assert found[0] == pytest.approx(found[1], abs=0.01)


def test_where_all_scores_are_undefined_there_is_no_estimate(quality):
    rows = quality.estimate(table(mask_snr_db=[np.nan, 3.0], rival_leak_db=[np.nan, np.nan], re_sdr_db=[15.0, 15.0]))
    assert rows.schema.equals(ESTIMATES)
    assert [None in row.values() for row in rows.to_pylist()] == [True, False]
    assert set(rows.to_pylist()[0].values()) == {None}


def test_scores_that_are_undefined_here_and_there_do_not_spoil_the_fit():
    gaps = np.where(np.arange(NUM_STEMS) % 4 == 0, np.nan, LEAK_DB)
    quality = calibrated(mask_snr_db=MASK_DB, rival_leak_db=gaps)
    mask_db, leak_db = np.random.default_rng(1).uniform(-9, 19, (2, 50))
    found = estimates(quality, mask_snr_db=mask_db, rival_leak_db=leak_db)
    assert found == pytest.approx(4.0 + 0.4 * mask_db - 0.3 * leak_db, abs=0.7)


def test_a_fit_is_not_stretched_beyond_what_it_has_seen(quality):
    seen, beyond = estimates(quality, mask_snr_db=[MASK_DB.max(), 100], rival_leak_db=[LEAK_DB.min(), -100])
    assert beyond == seen


def test_truths_beyond_reason_count_as_the_last_reasonable_one():
    """-100 dB of silent stems would outweigh everything else."""
    bad = MASK_DB < 0
    quality = calibrated(np.where(bad, -100.0, 10.0), mask_snr_db=MASK_DB)
    assert quality == calibrated(np.where(bad, -10.0, 10.0), mask_snr_db=MASK_DB)


@pytest.mark.parametrize(
    ("num_stems", "truth_db"), [(49, TRUTH_DB[:49]), (60, np.full(60, 7.0)), (60, np.full(60, -90.0))]
)
def test_too_few_stems_or_alike_are_refused(num_stems, truth_db):
    with pytest.raises(ValueError, match=rf"{num_stems} stems .* give more single-source clips"):
        calibrated(truth_db, mask_snr_db=MASK_DB[:num_stems])


# On disk.


def test_what_is_saved_is_loaded(quality, tmp_path):
    save_estimator(quality, tmp_path)
    loaded = load_estimator(tmp_path)
    assert loaded == quality and loaded.fingerprint == quality.fingerprint
    scores = table(mask_snr_db=MASK_DB, rival_leak_db=LEAK_DB)
    assert loaded.estimate(scores).equals(quality.estimate(scores))


def test_the_fingerprint_is_of_what_decides_an_estimate(quality):
    assert replace(quality, about={"made": "elsewhere"}).fingerprint == quality.fingerprint
    assert replace(quality, bias=quality.bias + 1e-6).fingerprint != quality.fingerprint
    assert replace(quality, error_db=tuple(2 * error for error in quality.error_db)).fingerprint != quality.fingerprint


def edited(quality, folder, change):
    save_estimator(quality, folder)
    path = folder / "quality.json"
    stored = json.loads(path.read_text())
    change(stored)
    path.write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stored: stored.update(bias=stored["bias"] + 1.0), "was changed since it was written"),
        (lambda stored: stored.update(fingerprint="0" * 16), "was changed since it was written"),
        (lambda stored: stored.pop("fingerprint"), "was changed since it was written"),
        (lambda stored: stored.update(format=0), r"is not of format 2; calibrate again with this version"),
        (lambda stored: stored.pop("format"), r"is not of format 2; calibrate again with this version"),
        (lambda stored: stored.pop("weight"), "has not the fields of an estimator"),
        (lambda stored: stored.update(names=["beauty_db", "rival_leak_db"]), "has not the fields of an estimator"),
    ],
)
def test_an_edited_file_or_one_of_another_version_is_refused(quality, tmp_path, change, message):
    with pytest.raises(ValueError, match=rf"quality\.json {message}"):
        load_estimator(edited(quality, tmp_path, change))


def test_a_folder_without_an_estimator_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no quality\.json"):
        load_estimator(tmp_path / "nowhere")
