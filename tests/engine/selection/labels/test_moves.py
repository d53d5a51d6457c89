import dataclasses

import numpy as np
import pytest

from engine.selection.labels.evidence import ClipEvidence
from engine.selection.labels.moves import LabelJudge, LabelRules, tentative_labels
from engine.selection.labels.table import label_row
from engine.taggers.ontology import Ontology
from engine.taggers.presence import CLIP, REST, STEM, Presence
from tests.engine.selection.labels.presence import logistic

LABELS = ["Rain", "siren", "bell"]


PRESENCE = Presence(
    tagger="t",
    models={
        CLIP: logistic(CLIP, clip_tag_db=1.0),
        STEM: logistic(STEM, margin_db=1.0, stem_level_db=0.1),
        REST: logistic(REST, residual_tag_db=1.0),
    },
    measured={"rain": [], "siren": [], "bell": []},
)


def judge(**rules):
    return LabelJudge(
        PRESENCE, LABELS, LabelRules(**({"drop_below": 0.3, "add_from": 0.9, "num_tentative": 1} | rules))
    )


def evidence(stems, *, residual=(-9.0, -9.0, -9.0), level_db=0.0):
    """A clip whose stems, by label, have the given tags."""
    return ClipEvidence(
        row={"clip_id": "c", "path": "a.wav", "labels": list(stems), "start_s": 0.0, "end_s": 5.0},
        shard="s",
        first_row=0,
        sample_rate_hz=16000,
        num_samples=80000,
        stem_labels=list(stems),
        stem_tags_SL=np.array(list(stems.values()), np.float32).reshape(-1, len(LABELS)),
        stem_level_db_S=np.full(len(stems), level_db),
        active_fraction_S=np.full(len(stems), 0.5),
        clip_tags_L=np.zeros(len(LABELS), np.float32),
        residual_tags_L=np.array(residual, np.float32),
        residual_level_db=-20.0,
    )


def row(*labels, tentative=()):
    return label_row("a.wav", 0.0, 5.0, labels=labels, tentative=tentative)


def test_a_label_whose_stem_says_so_stays():
    moved = judge().move(row("rain"), evidence({"rain": [0, -5, -9]}))
    assert (moved.row["labels"], moved.changes) == (["rain"], [])
    assert moved.probability_L == pytest.approx([1 / (1 + np.exp(-5)), 1 / (1 + np.exp(9)), 1 / (1 + np.exp(9))])


def test_a_label_whose_stem_is_another_sound_is_dropped_with_its_evidence():
    moved = judge(add_from=2.0).move(row("rain", "siren"), evidence({"rain": [-5, 0, -9], "siren": [-5, 0, -9]}))
    (change,) = moved.changes
    assert moved.row["labels"] == ["siren"]
    assert (change["label"], change["change"], change["new_label"], change["reason"]) == (
        "rain",
        "dropped",
        None,
        "margin_db",
    )
    assert change["probability"] == pytest.approx(1 / (1 + np.exp(5))) and change["limit"] == 0.3
    assert dict(change["evidence"]) == {
        "clip_tag_db": 0.0,
        "stem_tag_db": -5.0,
        "margin_db": -5.0,
        "stem_level_db": 0.0,
        "active_fraction": 0.5,
    }


def test_a_label_whose_stem_is_almost_silent_is_dropped_for_its_level():
    moved = judge().move(row("rain"), evidence({"rain": [0, 0, -9]}, level_db=-30.0))
    assert moved.row["labels"] == [] and moved.changes[0]["reason"] == "stem_level_db"


def test_a_stem_in_which_another_label_sounds_is_relabelled():
    moved = judge().move(row("rain"), evidence({"rain": [-9, 0, -9]}))
    assert moved.row["labels"] == ["siren"]
    assert [(one["change"], one["label"], one["new_label"]) for one in moved.changes] == [
        ("relabelled", "rain", "siren")
    ]


def test_a_stem_is_not_relabelled_to_a_label_that_the_clip_has():
    moved = judge().move(row("rain", "siren"), evidence({"rain": [-9, 0, -9], "siren": [-9, 0, -9]}))
    assert moved.row["labels"] == ["siren"] and moved.changes[0]["change"] == "dropped"


def test_a_stem_is_not_relabelled_to_a_label_that_was_not_calibrated():
    known = dataclasses.replace(PRESENCE, measured={"rain": [], "bell": []})
    rules = LabelRules(drop_below=0.3, add_from=0.9, num_tentative=0)
    moved = LabelJudge(known, LABELS, rules).move(row("rain"), evidence({"rain": [-9, 0, -9]}))
    assert [(one["change"], one["new_label"]) for one in moved.changes] == [("dropped", None)]


def test_what_the_residual_has_is_added():
    moved = judge().move(row("rain"), evidence({"rain": [0, -5, -9]}, residual=(-9, -9, 3)))
    assert moved.row["labels"] == ["rain", "bell"]
    (change,) = moved.changes
    assert (change["change"], change["label"], change["reason"], change["limit"]) == (
        "added",
        "bell",
        "residual_tag_db",
        0.9,
    )


def test_a_label_is_not_added_to_a_clip_that_has_a_kind_of_it():
    above = judge(ontology=Ontology({"rain": ["bell"]})).move(
        row("rain"), evidence({"rain": [0, -5, -9]}, residual=(-9, -9, 3))
    )
    assert above.row["labels"] == ["rain"] and above.row["tentative"] == [] and above.changes == []


@pytest.mark.parametrize(("tags", "labels"), [([-5, 0, -9], ["rain", "siren"]), ([0, -1, -9], ["rain"])])
def test_a_tentative_label_is_accepted_by_its_stem(tags, labels):
    moved = judge().move(row("rain", tentative=["siren"]), evidence({"rain": [0, -5, -9], "siren": tags}))
    assert moved.row["labels"] == labels


def test_a_label_without_a_stem_or_unknown_to_the_tagger_stays():
    moved = judge().move(row("rain", "trombone"), evidence({"trombone": [-5, -5, 0]}))
    assert moved.row["labels"] == ["rain", "trombone"] and moved.changes == []


def test_without_rules_labels_stay():
    before = row("rain", tentative=["siren"])
    moved = judge(drop_below=0.0, add_from=2.0).move(before, evidence({"rain": [-9, 5, -9], "siren": [-9, 5, -9]}))
    assert moved.row["labels"] == ["rain"] and moved.changes == []


def test_a_clip_that_loses_its_last_label_has_a_tentative_one():
    moved = judge(num_tentative=0).move(
        row("rain"), evidence({"rain": [0, 0, -9]}, level_db=-30.0, residual=(-9, -8, -9))
    )
    assert moved.row["labels"] == [] and moved.row["tentative"] == ["Rain"]


def test_changes_can_be_taken_back():
    before = row("rain", "siren", tentative=["bell"])
    moved = judge().move(before, evidence({"rain": [-9, -9, 0], "siren": [-5, 0, -9], "bell": [-9, -9, 0]}))
    labels = set(moved.row["labels"])
    for change in reversed(moved.changes):
        labels -= {change["new_label"] or change["label"]} if change["change"] != "dropped" else set()
        labels |= {change["label"]} if change["change"] != "added" else set()
    assert moved.changes and labels == {"rain", "siren"}


def test_tentative_labels_are_the_likeliest_that_a_clip_does_not_have():
    probability = {"rain": 0.9, "siren": 0.4, "bell": 0.2, "dog": 0.01}
    assert tentative_labels(["Rain"], probability, most=3) == ["siren", "bell"]
    assert tentative_labels(["rain"], {"dog": 0.01}, most=3) == []
    assert tentative_labels([], {"dog": 0.01, "cat": 0.02}, most=0) == ["cat"]
