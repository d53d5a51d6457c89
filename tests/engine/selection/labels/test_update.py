"""From the evidence of a pass without Ray to moved labels and single events."""

import numpy as np
import pytest

from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.selection.labels.moves import LabelRules
from engine.selection.labels.table import LABELS, label_row, read_label_rows, write_rows
from engine.selection.labels.update import accepted_labels, single_events, update_labels
from engine.storage.files import read_json
from engine.storage.fingerprints import write_sealed
from tests.engine.selection.labels.presence import BANDS
from tests.support.signals import RATE_HZ, BandTagger, close_pass, run_stages, two_bands, write_clips

RULES = LabelRules(drop_below=0.3, add_from=0.9, num_tentative=0)


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """Three clips that are labelled "low": of that band alone, of both, and of the other one alone; and their pass."""
    folder = tmp_path_factory.mktemp("labels")
    low_T, high_T = two_bands(RATE_HZ)
    files = {"low.wav": low_T, "both.wav": low_T + high_T, "high.wav": high_T}
    corpus = read_corpus(write_clips(folder / "corpus", {name: np.float32(one) for name, one in files.items()}))
    rows = [label_row(row["path"], None, None, labels=["low"]) for row in corpus.clips.to_pylist()]
    write_rows(folder / "labels.parquet", rows, LABELS)
    names = ("clip_id", "path", "labels", "start_s", "end_s")
    clips = [{**{name: row[name] for name in names}, "num_tentative": 0} for row in rows]
    config = PassConfig(min_clip_s=0.5, min_labels=1)
    run_stages(clips, corpus.root, folder / "pass", config=config, open_tagger=lambda device: BandTagger())
    close_pass(folder / "pass")
    path = folder / "pass" / "stems" / "manifest.json"
    manifest = read_json(path)
    write_sealed(path, {**manifest, "tagger_labels": list(BandTagger.labels)})
    return folder


def test_labels_move_by_what_the_pass_found(before, tmp_path):
    manifest = update_labels(before, before / "pass" / "stems", tmp_path, presence=BANDS, rules=RULES, inputs="i")
    labels = {row["path"]: row["labels"] for row in read_label_rows(tmp_path / "labels.parquet")}
    assert labels == {"low.wav": ["low"], "both.wav": ["low", "high"], "high.wav": ["high"]}
    assert (manifest["num_before"], manifest["num_kept"], manifest["num_after"]) == (3, 2, 4)
    assert manifest["num_dropped"] + manifest["num_relabelled"] == 1 and manifest["num_added"] == 2


def test_stems_of_labels_that_moved_away_are_not_accepted(before, tmp_path):
    update_labels(before, before / "pass" / "stems", tmp_path, presence=BANDS, rules=RULES, inputs="i")
    accepted = accepted_labels(before, tmp_path)
    found = {row["path"]: accepted.has(row["clip_id"], "low") for row in read_label_rows(before / "labels.parquet")}
    assert found == {"low.wav": True, "both.wav": True, "high.wav": False}


def test_a_clip_of_one_sound_is_a_single_event(before):
    events = single_events(before, before / "pass" / "stems", presence=BANDS, rules=RULES, from_purity=0.9)
    (event,) = events
    assert (event["path"], event["label"], event["num_stems"]) == ("low.wav", "low", 1)
    assert event["purity_fraction"] > 0.99
