"""The estimator of a stem's SI-SDR: its fit, its error, undefined scores and its file."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest

from engine.schema import ESTIMATES, SCORES
from engine.scoring.estimator import JudgedStems, fit_estimator, load_estimator, save_estimator

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


NOISE_DB = 2.0
LEVEL_DB = 6.0


def judged(level_db=LEVEL_DB, *, leak_weight=0.0, num=300, seed=7):
    """A listener calls a stem good if its SI-SDR is high; it may depend on a score that the calibration ignores."""
    rng = np.random.default_rng(seed)
    mask_db, leak_db = rng.uniform(-10, 20, (2, num))
    sdr_db = 4.0 + 0.4 * mask_db + leak_weight * (leak_db - 5.0) + NOISE_DB * rng.standard_normal(num)
    return JudgedStems(
        scores=table(mask_snr_db=mask_db, rival_leak_db=leak_db),
        is_good=(sdr_db > level_db).tolist(),
        groups=[str(number // 2) for number in range(num)],
        about={"fingerprint": "verdicts"},
    )


def with_verdicts(verdicts):
    """Fitted to stems whose SI-SDR depends on one score, and not on the leak."""
    truth_db = 4.0 + 0.4 * MASK_DB + NOISE_DB * np.random.default_rng(8).standard_normal(NUM_STEMS)
    scores = table(mask_snr_db=MASK_DB, rival_leak_db=LEAK_DB)
    return fit_estimator(scores, truth_db, groups=GROUPS, about={}, judged=verdicts)


def test_verdicts_that_agree_with_the_truths_change_nothing_and_show_the_listeners_level():
    estimator, without = with_verdicts(judged()), with_verdicts(None)
    found, expected = (estimates(one, mask_snr_db=[-9, 5, 19], rival_leak_db=[5, 5, 5]) for one in (estimator, without))
    assert found == pytest.approx(expected, abs=0.5)
    figures = estimator.about["verdicts"]
    assert figures["fingerprint"] == "verdicts"
    assert figures["level_db"] == pytest.approx(LEVEL_DB, abs=0.5)
    assert figures["auc"] == pytest.approx(figures["auc_before"], abs=0.01)
    assert "verdicts" not in without.about


def test_verdicts_move_the_estimates_to_what_the_listener_judges():
    """To the listener a leak costs 0.3 dB a dB; the known stems show nothing of it. Their scale in dB stays."""
    verdicts = judged(leak_weight=-0.3, num=1000)
    estimator, without = with_verdicts(verdicts), with_verdicts(None)
    low, high = estimates(estimator, mask_snr_db=[5, 5], rival_leak_db=[0, 10])
    same = estimates(without, mask_snr_db=[5, 5], rival_leak_db=[0, 10])
    assert same[0] == pytest.approx(same[1], abs=0.3)
    assert 1.0 < low - high < 3.0, "between 0 dB of the known stems and 3 dB of the listener"
    assert np.mean([low, high]) == pytest.approx(np.mean(same), abs=0.3)
    figures = estimator.about["verdicts"]
    assert figures["auc"] > figures["auc_before"] + 0.02
    opposite = with_verdicts(judged(leak_weight=0.3, num=1000))
    assert opposite.weight[1] > 0.5 > -0.5 > estimator.weight[1]
    assert estimator.about["rmse_db"] > without.about["rmse_db"], "the known stems are fitted less well for it"


def test_verdicts_at_random_change_little():
    is_good = (np.random.default_rng(9).random(300) < 0.5).tolist()
    estimator, without = with_verdicts(replace(judged(), is_good=is_good)), with_verdicts(None)
    assert estimator.about["verdicts"]["auc"] == pytest.approx(0.5, abs=0.08)
    assert estimator.weight[1] == pytest.approx(without.weight[1], abs=0.5)


def test_the_verdicts_of_one_clip_do_not_judge_themselves():
    """Good and bad stems of a single clip: no other clip shows what they have in common."""
    verdicts = replace(judged(leak_weight=-0.3), groups=["one"] * 300)
    figures = with_verdicts(verdicts).about["verdicts"]
    assert figures["auc"] == pytest.approx(figures["auc_before"], abs=0.005)


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
