import json

import numpy as np
import pytest

from engine.taggers.presence import (
    CLIP,
    REST,
    STEM,
    Pairs,
    StemEvidence,
    fit_presence,
    load_presence,
    save_presence,
)


def drawn(num, *, labels=("rain", "siren"), slope=0.5, middle=-6.0, seed=0, fraction=None):
    """Pairs whose log odds are ``slope * (tag - middle)``."""
    rng, pairs = np.random.default_rng(seed), Pairs()
    for number in range(num):
        for label in labels:
            tag = float(rng.uniform(-20.0, 8.0))
            present = bool(rng.random() < 1.0 / (1.0 + np.exp(-slope * (tag - middle))))
            pairs.add(number, label, [tag], present=present)
    return pairs


def test_probabilities_are_those_that_the_pairs_were_drawn_with():
    presence = fit_presence({CLIP: drawn(3000)}, tagger="t", about={})
    tags = np.array([[-14.0], [-6.0], [-2.0]])
    expected = 1.0 / (1.0 + np.exp(-0.5 * (tags[:, 0] + 6.0)))
    assert presence.model(CLIP).probabilities(["rain"] * 3, tags) == pytest.approx(expected, abs=0.03)


def test_a_label_has_its_own_offset_and_an_unknown_one_none():
    pairs = drawn(2000, labels=("rain",), middle=-10.0)
    other = drawn(2000, labels=("siren",), middle=-2.0, seed=1)
    for number in range(len(other.labels)):
        pairs.add(other.clips[number] + 2000, "siren", other.values[number], present=other.present[number])
    presence = fit_presence({CLIP: pairs}, tagger="t", about={})
    rain, siren, new = presence.model(CLIP).probabilities(["Rain", "siren", "bell"], np.full((3, 1), -6.0))
    assert rain == pytest.approx(1 / (1 + np.exp(-2)), abs=0.04) and siren == pytest.approx(
        1 / (1 + np.exp(2)), abs=0.04
    )
    assert siren < new < rain


def test_thresholds_reach_the_precision_asked_and_measure_the_recall():
    presence = fit_presence({CLIP: drawn(2000)}, tagger="t", about={})
    test = drawn(4000, seed=9)
    for precision in (0.6, 0.9):
        limit = presence.thresholds(precision)["rain"]
        rows = [i for i, label in enumerate(test.labels) if label == "rain"]
        values, truth = np.array([test.values[i] for i in rows]), np.array([test.present[i] for i in rows])
        accepted = presence.model(CLIP).probabilities(["rain"] * len(rows), values) >= limit["probability"]
        assert truth[accepted].mean() == pytest.approx(limit["precision"], abs=0.05) and limit["precision"] >= precision
        assert accepted[truth].mean() == pytest.approx(limit["recall"], abs=0.05)
    assert presence.thresholds(0.9)["rain"]["recall"] < presence.thresholds(0.6)["rain"]["recall"]


def test_a_precision_that_is_never_reached_gives_the_highest_there_is():
    pairs = drawn(400, slope=0.0)
    thresholds = fit_presence({CLIP: pairs}, tagger="t", about={}).thresholds(0.99)
    assert max(limit["precision"] for limit in thresholds.values()) < 0.99


def test_the_margin_of_a_stem_is_over_all_other_labels():
    stems = StemEvidence(
        clip_tags_L=np.array([-2.0, 0.0, 0.0]),
        stem_tags_SL=np.array([[-3.0, -8.0, -1.0]]),
        stem_level_db_S=np.array([-6.0]),
        active_fraction_S=np.array([0.5]),
    )
    assert stems.values(0, 0) == [-2.0, -3.0, -2.0, -6.0, 0.5]


def test_a_model_is_the_same_after_it_was_stored(tmp_path):
    presence = fit_presence({CLIP: drawn(200)}, tagger="t", about={"clean": "clips.csv"})
    save_presence(presence, tmp_path)
    assert load_presence(tmp_path) == presence


def test_a_model_that_was_edited_or_is_missing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"there is no presence.json in .*; give RUN/presence, or clips"):
        load_presence(tmp_path)
    save_presence(fit_presence({CLIP: drawn(200)}, tagger="t", about={}), tmp_path)
    record = json.loads((tmp_path / "presence.json").read_text())
    record["models"]["clip"]["bias"] += 1.0
    (tmp_path / "presence.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="fingerprint of its values"):
        load_presence(tmp_path)


def test_evidence_that_was_not_calibrated_is_an_error():
    presence = fit_presence({CLIP: drawn(200)}, tagger="t", about={})
    for kind in (STEM, REST):
        with pytest.raises(ValueError, match="must be calibrated on stems to judge them"):
            presence.model(kind)


def test_too_few_pairs_are_an_error():
    with pytest.raises(ValueError, match=r"at least 50 pairs of a clip and a label, some of which sound, got 20"):
        fit_presence({CLIP: drawn(10)}, tagger="t", about={})
