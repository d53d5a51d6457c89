"""The evidence of a pass without Ray: exact stems, and a tagger that measures the energy of bands."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from engine.corpus.read import read_corpus
from engine.passes.config import PassConfig
from engine.selection.labels.evidence import read_evidence, tagger_labels
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import read_tracks, select_tracks
from engine.storage.files import read_json
from engine.storage.fingerprints import write_sealed
from tests.support.signals import RATE_HZ, BandSeparator, BandTagger, close_pass, run_stages, two_bands, write_clips

CONFIG = PassConfig(min_clip_s=0.5, min_labels=1)


class Guesser(BandSeparator):
    """Finds a part of everything for a label that it does not know."""

    labels = ("low", "high", "click")

    def _band(self, mix_T, label):
        return 0.03 * mix_T if label == "click" else super()._band(mix_T, label)


def open_guesser(device):
    return Guesser()


def evidence(folder, labels, *, num_tentative=0):
    """The pass of a clip of both bands that is queried for some labels, of which the last are only tried."""
    low_T, high_T = two_bands(RATE_HZ)
    files = {"clip.wav": (low_T + 0.1 * high_T).astype(np.float32)}
    corpus = read_corpus(write_clips(folder / "corpus", files))
    rows = [{**row, "labels": list(labels), "num_tentative": num_tentative} for row in corpus.clips.to_pylist()]
    out = folder / "pass"
    run_stages(
        rows,
        corpus.root,
        out,
        config=CONFIG,
        open_tagger=lambda device: BandTagger(),
        open_separator=open_guesser,
    )
    close_pass(out)
    manifest = read_json(out / "stems" / "manifest.json")
    if num_tentative is not None:
        manifest["tagger_labels"] = list(BandTagger().labels)
    manifest.pop("checksum", None)
    write_sealed(out / "stems" / "manifest.json", manifest)
    return out / "stems"


def test_what_is_not_queried_is_in_the_residual(tmp_path):
    stems = evidence(tmp_path, ["low"])
    names = tagger_labels(stems)
    low, high = names.index("low"), names.index("high")
    (clip,) = read_evidence(stems)
    assert clip.stem_labels == ["low"] and clip.row["labels"] == ["low"]
    assert clip.stem_tags_SL.shape == (1, len(names))
    assert clip.stem_tags_SL[0, low] - clip.stem_tags_SL[0, high] > 40
    assert clip.clip_tags_L[low] - clip.clip_tags_L[high] == pytest.approx(20.0, abs=1.5)
    assert clip.residual_tags_L[high] - clip.residual_tags_L[low] > 20
    assert clip.residual_level_db == pytest.approx(-20.0, abs=1.0)
    assert clip.stem_level_db_S[0] == pytest.approx(0.0, abs=0.5)


def test_nothing_is_left_of_a_clip_whose_stems_add_up_to_it(tmp_path):
    (clip,) = read_evidence(evidence(tmp_path, ["low", "high"]))
    assert clip.residual_level_db < -60
    assert np.ptp(clip.residual_tags_L) == 0, "the tags of silence"
    assert clip.stem_level_db_S == pytest.approx([0.0, -20.0], abs=1.0)


def test_a_pass_that_kept_no_tags_is_an_error(tmp_path):
    stems = evidence(tmp_path, ["low"], num_tentative=None)
    with pytest.raises(ValueError, match=r"cannot find the tags of the pass in .*; make the pass again in a run"):
        list(read_evidence(stems))
    (shard,) = stems.glob("shard-*.parquet")
    assert pq.read_table(shard)["clip_tags_db"].to_pylist() == [None]
    assert pq.read_table(shard)["residual_level_db"].to_pylist() == [pytest.approx(-20.0, abs=1.0)]


def stems_of(stems):
    (shard,) = stems.glob("shard-*.parquet")
    return {row["label"]: row for row in pq.read_table(shard).to_pylist()}


def test_a_label_that_is_only_tried_does_not_change_the_scores_of_the_others(tmp_path):
    """A query that finds a part of everything, tried and as a label of the clip."""
    tried = stems_of(evidence(tmp_path / "tried", ["low", "high", "click"], num_tentative=1))
    label = stems_of(evidence(tmp_path / "label", ["low", "high", "click"]))
    without = stems_of(evidence(tmp_path / "without", ["low", "high"]))
    scores = ("remix_snr_db", "mask_snr_db", "tagger_margin_db")
    for name in ("low", "high"):
        assert [tried[name][score] for score in scores] == pytest.approx([without[name][score] for score in scores])
        assert tried[name]["remix_snr_db"] > label[name]["remix_snr_db"] + 20
    assert tried["click"]["remix_snr_db"] == pytest.approx(label["click"]["remix_snr_db"])


def test_what_is_only_tried_is_no_track(tmp_path):
    stems = evidence(tmp_path, ["low", "high", "click"], num_tentative=1)
    selection = select_tracks(stems, tmp_path / "tracks", Thresholds())
    assert selection["num_rejected"] == {"no_label": 1}
    index, _ = read_tracks(tmp_path / "tracks")
    assert index["labels"].to_pylist() == [["low", "high"]] * 2 and index["label"].to_pylist() == ["low", "high"]
