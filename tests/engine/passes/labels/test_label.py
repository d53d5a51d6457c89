"""Labels that follow from tags, against signals whose content is known second by second."""

import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.passes.decode import Decode
from engine.passes.labels.label import LABELLED, read_label_summary, tags_folder, write_labels
from engine.passes.labels.tag import Tag, Tagging, WriteTags, tagging_config
from engine.passes.records import missing_tasks, read_totals, write_manifest_failures
from engine.passes.shards import PassStart
from engine.passes.tasks import Tasks
from engine.storage.fingerprints import write_sealed
from engine.taggers import TaggerSource
from engine.taggers.ontology import Ontology
from engine.taggers.presence import LogisticModel, Presence
from tests.support.signals import RATE_HZ, BandTagger, read_failures, two_bands

CONFIG = tagging_config(PassConfig(clip_s=6.0))
LOW_T, HIGH_T = two_bands(2 * RATE_HZ)
NOTHING_T = np.zeros(2 * RATE_HZ, np.float32)


class Fractions(BandTagger):
    """The energy of each band relative to all of it, in dB."""

    def _tags(self, audio_T):
        energies = 10.0 ** (np.array(super()._tags(audio_T)) / 10.0)
        return (10.0 * np.log10(energies / energies.sum() + 1e-9)).tolist()


def model(*, thresholds, bias=5.0):
    """Probability 1 / (1 + exp(-(tag + bias))), so that -5 dB is a half."""
    logistic = LogisticModel(
        names=("clip_tag_db",), mean=(0.0,), deviation=(1.0,), weight=(1.0,), bias=bias, offsets={}
    )
    steps = {
        label: [{"probability": at, "precision": p, "recall": 1.0 - at} for at, p in of_label]
        for label, of_label in thresholds.items()
    }
    return Presence(tagger=Fractions.fingerprint, models={"clip": logistic}, measured=steps)


TWO_STEPS = {label: [(0.1, 0.6), (0.9, 0.9)] for label in ("low", "high", "click")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    recordings = tmp_path_factory.mktemp("label") / "recordings"
    recordings.mkdir()
    sounds = {
        "low": [LOW_T],
        "low_high": [LOW_T, NOTHING_T, HIGH_T],
        "high_twice": [HIGH_T, NOTHING_T, HIGH_T, LOW_T, HIGH_T],  # cut at 6 s
        "both": [LOW_T + HIGH_T],
    }
    for name, parts in sounds.items():
        soundfile.write(recordings / f"{name}.wav", np.concatenate(parts), RATE_HZ, subtype="FLOAT")
    soundfile.write(recordings / "silent.wav", np.zeros(RATE_HZ), RATE_HZ)
    (recordings / "broken.wav").write_bytes(b"RIFF")
    return recordings


@pytest.fixture(scope="module")
def tags(folder):
    out, corpus = folder.parent / "labelled.tags", read_corpus(folder, needs_labels=False)
    counts = Tasks(out / "corpus").write(corpus, rows_per_task=64, min_labels=0)
    decode = Decode(CONFIG, root=corpus.root, out=str(out), sample_rate_hz=RATE_HZ)
    tag, write = Tag(lambda _: Fractions(), CONFIG), WriteTags(str(out), RATE_HZ)
    for task in missing_tasks(out, read_totals(out)):
        for shard in decode(pa.Table.from_pylist([task])):
            write(tag(shard))
    write_manifest_failures(out, corpus)
    source = TaggerSource(
        name="bands",
        fingerprint=Fractions.fingerprint,
        factory=lambda _: Fractions(),
        sample_rate_hz=RATE_HZ,
        labels=Fractions.labels,
    )
    start = PassStart(wall_s=1.0, audio_s=1.0, limit=None)
    work = Tagging(tagger=source, labels=Fractions.labels)
    made = work.manifest(read_totals(out), corpus=corpus, config=CONFIG, counts=counts, start=start)
    write_sealed(out / "stems" / "manifest.json", made)
    return out


def labelled(folder, tags, out=None, *, presence=None, precision=0.8, ontology=None):
    out = out or folder.parent / "labelled.parquet"
    presence = presence or model(thresholds=TWO_STEPS)
    summary = write_labels(tags, out, root=str(folder), presence=presence, precision=precision, ontology=ontology)
    table = pq.read_table(out)
    assert table.schema.equals(LABELLED)
    return summary, {(row["path"].split("/")[-1], row["start_s"] or 0.0): row for row in table.to_pylist()}


def test_a_clip_gets_the_labels_that_sound_in_it_with_their_spans(folder, tags):
    _, rows = labelled(folder, tags)
    assert {key: sorted(row["labels"]) for key, row in rows.items()} == {
        ("low.wav", 0.0): ["low"],
        ("low_high.wav", 0.0): ["high", "low"],
        ("high_twice.wav", 0.0): ["high"],
        ("high_twice.wav", 6.0): ["high", "low"],
        ("both.wav", 0.0): [],  # each of the two is -3 dB, of probability 0.88
    }
    spans = {tag["label"]: tag["spans"] for tag in rows["high_twice.wav", 6.0]["tags"]}
    assert spans["low"] == [{"start_s": 6.0, "end_s": 8.0}] and spans["high"][0]["end_s"] == 10.0  # in the file
    (high,) = [tag for tag in rows["high_twice.wav", 0.0]["tags"] if tag["label"] == "high"]
    assert [(span["start_s"], span["end_s"]) for span in high["spans"]] == [(0.0, 2.5), (3.5, 6.0)]
    assert high["probability"] == pytest.approx(1 / (1 + math.exp(-5)), abs=1e-3) and abs(high["tag_db"]) < 0.1


def test_labels_below_their_threshold_are_candidates(folder, tags):
    _, rows = labelled(folder, tags)
    candidates = {tag["label"]: tag for tag in rows["both.wav", 0.0]["tags"]}
    assert set(candidates) == {"low", "high"} and candidates["low"]["spans"] == []
    assert candidates["low"]["probability"] == pytest.approx(1 / (1 + math.exp(-(5 - 3.01))), abs=0.05)
    assert labelled(folder, tags, precision=0.5)[1]["both.wav", 0.0]["labels"] != []


def test_the_counts_add_up_and_are_in_the_file(folder, tags):
    summary, _ = labelled(folder, tags)
    counts = {name: summary[name] for name in ("num_clips", "num_labelled", "num_unlabelled", "num_failed")}
    assert counts == {"num_clips": 7, "num_labelled": 4, "num_unlabelled": 1, "num_failed": 2}
    assert len(read_failures(tags)) == 2
    by_label = {row["label"]: row for row in summary["labels"]}
    assert (by_label["high"]["num_clips"], by_label["low"]["num_clips"], by_label["click"]["num_clips"]) == (3, 3, 0)
    assert (by_label["low"]["probability"], by_label["low"]["precision"]) == (0.9, 0.9)
    assert read_label_summary(folder.parent / "labelled.parquet") == summary
    assert read_label_summary(tags / "corpus" / "tasks-000000.parquet") is None


def test_the_file_is_a_manifest_as_it_is(folder, tags):
    labelled(folder, tags)
    corpus = read_corpus(folder.parent / "labelled.parquet", needs_labels=False)
    assert (corpus.num_clips, corpus.num_failures) == (5, 0)
    found = {row["path"]: row["labels"] for row in corpus.clips.to_pylist()}
    assert found["recordings/low.wav"] == ["low"] and found["recordings/both.wav"] == []


def test_elsewhere_it_is_read_with_the_root_of_the_recordings(folder, tags, tmp_path):
    summary, rows = labelled(folder, tags, tmp_path / "far.parquet")
    assert summary["audio_root"] == str(folder) and rows["low.wav", 0.0]["path"] == "low.wav"
    corpus = read_corpus(tmp_path / "far.parquet", audio_root=folder, needs_labels=False)
    assert (corpus.num_clips, corpus.num_failures) == (5, 0)


def test_an_ontology_leaves_the_lowest_labels_only(folder, tags):
    _, rows = labelled(folder, tags, ontology=Ontology({"low": ["high"]}))
    assert rows["low_high.wav", 0.0]["labels"] == ["low"]
    assert {tag["label"] for tag in rows["low_high.wav", 0.0]["tags"]} == {"low", "high"}
    assert rows["high_twice.wav", 0.0]["labels"] == ["high"]


def test_only_labels_of_the_calibration_are_judged_and_the_best_threshold_stands_for_a_missing_one(
    folder, tags, caplog
):
    presence = model(thresholds={"": [(0.1, 0.9)], "low": [(0.1, 0.3), (0.9, 0.5)]})
    summary, rows = labelled(folder, tags, presence=presence)
    assert [row["label"] for row in summary["labels"]] == ["low"]
    assert summary["labels"][0]["probability"] == 0.9
    assert {tag["label"] for row in rows.values() for tag in row["tags"]} == {"low"}
    assert "1 of 1 labels reach no precision of 0.8" in caplog.text


def test_thresholds_that_leave_nothing_are_an_error_with_the_nearest(folder, tags, tmp_path):
    strict = model(thresholds={"low": [(0.999, 1.0)], "click": [(0.999, 1.0)]})
    with pytest.raises(ValueError, match=r"got none of 5 tagged clips .*low 0.99 of 1.00 in .*; lower the precision"):
        labelled(folder, tags, tmp_path / "none.parquet", presence=strict)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"precision": 0.0}, "precision must be above 0 and at most 1, got 0"),
        ({"precision": float("nan")}, "precision must be above 0"),
        (
            {"presence": model(thresholds={"whale": [(0.5, 0.9)]})},
            r"must be calibrated on labels of the tagger, got \['w",
        ),
        ({"ontology": Ontology({"cat": ["animal"]})}, "an ontology must have labels of the tagger, got none of"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(folder, tags, given, message):
    with pytest.raises(ValueError, match=message):
        labelled(folder, tags, **given)


def test_a_model_of_another_tagger_is_refused(folder, tags):
    other = Presence(tagger="f" * 16, models={}, measured={"low": []})
    with pytest.raises(ValueError, match="must be calibrated with the tagger 0123456789abcdef, got one of ffff"):
        labelled(folder, tags, presence=other)


def test_a_labelled_corpus_is_a_parquet_file_with_its_tags_next_to_it(tmp_path):
    assert tags_folder(tmp_path / "a.parquet") == (tmp_path / "a.parquet", tmp_path / "a.tags")
    assert str(tags_folder("s3://b/x/a.parquet")[1]) == "s3://b/x/a.tags"
    with pytest.raises(ValueError, match=r"must be a .parquet file, got labels.csv; name one"):
        tags_folder("labels.csv")


def test_no_audio_is_opened(folder, tags, monkeypatch):
    monkeypatch.setattr(torch, "stack", None)  # of the tagger and of the windows
    monkeypatch.setattr(soundfile, "SoundFile", None)
    assert labelled(folder, tags, precision=0.5)[0]["num_labelled"] == 5
