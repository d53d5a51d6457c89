import numpy as np
import pyarrow as pa
import pytest

from engine.corpus.clips import clip_id
from engine.corpus.roots import Root
from engine.errors import DamagedError
from engine.passes.labels.label import labeller_of
from engine.selection.filter import judge
from engine.selection.labels.table import (
    LABELS,
    AcceptedLabels,
    corpus_of,
    label_row,
    read_label_rows,
    write_rows,
)
from engine.selection.labels.update import first_labels, read_labels, require_all
from engine.selection.thresholds import Thresholds
from engine.taggers.ontology import Ontology
from engine.taggers.presence import CLIP, LogisticModel, Presence
from engine.taggers.windows import WindowTags


def measured(probability, precision):
    return {"probability": probability, "precision": precision, "recall": 0.5}


PRESENCE = Presence(
    tagger="t",
    models={
        CLIP: LogisticModel(names=("clip_tag_db",), mean=(0.0,), deviation=(1.0,), weight=(1.0,), bias=0.0, offsets={})
    },
    measured={
        "siren": [{"probability": 0.5, "precision": 0.8, "recall": 0.5}],
        "rain": [
            {"probability": 0.5, "precision": 0.6, "recall": 0.9},
            {"probability": 0.9, "precision": 0.8, "recall": 0.4},
        ],
    },
)


def clip(path, labels=()):
    return {"clip_id": path, "path": path, "labels": list(labels), "start_s": 0.0, "end_s": 5.0}


def windows(*, rain, siren):
    """A clip of one window with these tags."""
    one_W = np.ones(1)
    return WindowTags(
        tags_WL=np.array([[rain, siren]], np.float32),
        start_s_W=0 * one_W,
        end_s_W=one_W,
        is_active_W=one_W.astype(bool),
    )


def labeller(precision, ontology=None):
    return labeller_of(PRESENCE, tagger="t", labels=["rain", "siren"], precision=precision, ontology=ontology)


def test_of_a_label_and_its_kinds_only_the_lowest_are_given_and_tried(tmp_path):
    tags = [
        (clip("both.wav"), windows(rain=3.0, siren=1.0)),
        (clip("given.wav", ["siren"]), windows(rain=3.0, siren=1.0)),
    ]
    first_labels(tags, tmp_path, labeller=labeller(0.75, Ontology({"siren": ["rain"]})), num_tentative=2, inputs="i")
    rows = {row["path"]: (row["labels"], row["tentative"]) for row in read_label_rows(tmp_path / "labels.parquet")}
    assert rows == {"both.wav": (["siren"], []), "given.wav": (["siren"], [])}


def test_a_pass_queries_the_labels_and_the_tentative_ones(tmp_path):
    rows = [
        label_row("a.wav", 0.0, 5.0, labels=["rain"], tentative=["siren"]),
        label_row("a.wav", 5.0, 10.0, labels=[], tentative=["bell"]),
        label_row("b.wav", None, None, labels=[]),
    ]
    assert write_rows(tmp_path / "labels.parquet", rows, LABELS) == 3
    assert list(read_label_rows(tmp_path / "labels.parquet")) == rows
    corpus = corpus_of(rows, Root("/audio"), moving=True)
    assert corpus.root == "/audio" and corpus.num_failures == 0 and corpus.labels_move
    found = {row["clip_id"]: (row["labels"], row["num_tentative"]) for row in corpus.sorted_clips()}
    assert found == {
        clip_id("a.wav", ["rain", "siren"], 0.0, 5.0, 1): (["rain", "siren"], 1),
        clip_id("a.wav", ["bell"], 5.0, 10.0, 1): (["bell"], 1),
    }
    assert clip_id("a.wav", ["rain", "siren"], 0.0, 5.0, 1) != clip_id("a.wav", ["siren", "rain"], 0.0, 5.0, 1)


def test_a_pass_whose_labels_stay_queries_only_these():
    rows = [
        label_row("a.wav", 0.0, 5.0, labels=["rain"], tentative=["siren"]),
        label_row("b.wav", None, None, labels=[]),
    ]
    corpus = corpus_of(rows, Root("/audio"), moving=False)
    (row,) = corpus.sorted_clips()
    assert not corpus.labels_move
    assert (row["clip_id"], row["labels"]) == (clip_id("a.wav", ["rain"], 0.0, 5.0), ["rain"])


def test_first_labels_are_those_given_or_those_above_their_threshold(tmp_path):
    tags = [
        (clip("given.wav", ["dog"]), windows(rain=9.0, siren=-1.0)),
        (clip("loud.wav"), windows(rain=3.0, siren=1.0)),
        (clip("doubtful.wav"), windows(rain=1.0, siren=-0.5)),
        (clip("nothing.wav"), windows(rain=-9.0, siren=-8.0)),
    ]
    manifest = first_labels(tags, tmp_path, labeller=labeller(0.75), num_tentative=1, inputs="i")
    rows = {row["path"]: (row["labels"], row["tentative"]) for row in read_label_rows(tmp_path / "labels.parquet")}
    assert rows == {
        "given.wav": (["dog"], ["rain"]),
        "loud.wav": (["rain", "siren"], []),
        "doubtful.wav": ([], ["rain"]),
        "nothing.wav": ([], ["siren"]),
    }
    assert (manifest["num_before"], manifest["num_added"], manifest["num_after"]) == (1, 2, 3)
    assert (manifest["num_tentative"], manifest["num_unlabelled"]) == (3, 2)
    assert read_labels(tmp_path) == manifest


def test_a_damaged_table_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="there are no finished labels in"):
        read_labels(tmp_path)
    tags = [(clip("a.wav"), windows(rain=3.0, siren=-9.0))]
    first_labels(tags, tmp_path, labeller=labeller(0.7), num_tentative=1, inputs="i")
    (tmp_path / "changes.parquet").write_bytes(b"PAR1")
    with pytest.raises(DamagedError, match=r"changes.parquet must have the checksum in its manifest"):
        read_labels(tmp_path)


def test_labels_that_are_lost_are_an_error(tmp_path):
    counts = dict.fromkeys(("num_before", "num_kept", "num_dropped", "num_relabelled", "num_added", "num_after"), 0)
    require_all(
        counts
        | {"num_before": 3, "num_kept": 1, "num_dropped": 1, "num_relabelled": 1, "num_added": 2, "num_after": 3},
        tmp_path,
    )
    for name in counts:
        with pytest.raises(RuntimeError, match="cannot close the labels"):
            require_all(counts | {name: counts[name] + 1}, tmp_path)


def test_stems_of_labels_that_a_clip_lost_are_rejected_before_all_rules():
    accepted = AcceptedLabels([("a", ["Rain"]), ("b", [])], "f")
    has = [accepted.has(*pair) for pair in (("a", "rain"), ("a", "siren"), ("b", "rain"), ("c", "rain"))]
    assert has == [True, False, False, True]
    scores = pa.table({"remix_snr_db": pa.array([9.0, 9.0, 1.0, 1.0], pa.float32())})
    verdict = judge(scores, Thresholds(min_remix_snr_db=5.0), has_label_N=pa.array(has).to_numpy(zero_copy_only=False))
    assert verdict["rejected_by"].to_pylist() == [None, "no_label", "no_label", "min_remix_snr_db"]
    assert verdict["kept"].to_pylist() == [True, False, False, False]


def test_the_floor_does_not_readmit_them():
    scores = pa.table(
        {
            "label": ["rain"] * 3,
            "clip_id": ["a", "b", "c"],
            "estimated_si_sdr_db": pa.array([9.0, 8.0, 7.0], pa.float32()),
        }
    )
    thresholds = Thresholds(min_estimated_si_sdr_db=10.0, label_floor_fraction=0.5)
    has_label_N = pa.array([False, True, True]).to_numpy(zero_copy_only=False)
    assert judge(scores, thresholds, has_label_N=has_label_N)["kept"].to_pylist() == [False, True, False]
