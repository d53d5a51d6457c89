"""Single events: which clips are some and why others are not, and their table in a selection."""

from collections import Counter

import numpy as np
import pytest

from engine.errors import DamagedError
from engine.schema import ClipRow
from engine.selection.labels.events import event_row, mine
from engine.selection.labels.evidence import ClipEvidence
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import read_events, select_tracks
from tests.support.remixes import SCORES, tone

LABELS = ["bell", "dog", "rain"]


def evidence(labels=("dog",), *, stems=None, residual_db=-20.0, active=1.0, first_row=0, clip_id="clip"):
    stems = list(labels if stems is None else stems)
    row = ClipRow(clip_id=clip_id, path=f"{clip_id}.wav", labels=list(labels), start_s=None, end_s=None)
    values_S, tags_L = np.zeros(len(stems), np.float32), np.zeros(len(LABELS), np.float32)
    return ClipEvidence(
        row=row,
        shard="shard-000000-0000.parquet",
        first_row=first_row,
        sample_rate_hz=8000,
        num_samples=8000,
        stem_labels=stems,
        stem_tags_SL=np.zeros((len(stems), len(LABELS)), np.float32),
        stem_level_db_S=values_S,
        active_fraction_S=values_S + np.float32(active),
        clip_tags_L=tags_L,
        residual_tags_L=tags_L,
        residual_level_db=residual_db,
    )


def test_purity_is_the_probability_that_the_label_sounds_and_no_other_does():
    label, purity = mine(evidence(), np.array([0.1, 0.9, 0.2]), LABELS, min_purity_fraction=0.6)
    assert label == "dog" and purity == pytest.approx(0.9 * 0.9 * 0.8)


def test_the_label_has_the_spelling_of_its_stem():
    clip = evidence(("Rain", "Dog"))
    found = mine(clip, np.array([1e-9, 1.0, 1e-9]), LABELS, min_purity_fraction=0.9)
    assert found is not None and found[0] == "Dog"
    row = event_row(evidence(("Rain", "Dog"), first_row=4), *found)
    assert (row["row"], row["first_row"], row["num_stems"], row["label"]) == (5, 4, 2, "Dog")


@pytest.mark.parametrize(
    ("clip", "probability", "reason"),
    [
        (evidence(), [0.1, 0.9, 0.6], "number of labels"),
        (evidence(), [0.1, 0.4, 0.1], "number of labels"),
        (evidence(), [0.3, 0.9, 0.1], "purity"),
        (evidence(("rain",)), [0.01, 0.99, 0.01], "no stem"),
        (evidence(("dog", "rain"), stems=["rain"]), [0.01, 0.99, 0.01], "no stem"),
        (evidence(residual_db=-9.0), [0.01, 0.99, 0.01], "residual level"),
        (evidence(active=0.04), [0.01, 0.99, 0.01], "activity"),
        (evidence(("dog", "whale")), [0.01, 0.99, 0.01], "unknown label"),
        (evidence(("dog", "rain")), [0.01, 0.99, 0.0], "unknown label"),
    ],
)
def test_other_clips_are_refused_for_a_reason_that_is_counted(clip, probability, reason):
    refused = Counter()
    assert mine(clip, np.array(probability), LABELS, min_purity_fraction=0.8, refused=refused) is None
    assert refused == {reason: 1}


@pytest.fixture
def passed(write_pass):
    return write_pass([("a", "dog", tone(440), SCORES), ("b", "dog", tone(500), SCORES)]) / "stems"


ROWS = [event_row(evidence(clip_id=name, first_row=row), "dog", 0.75) for row, name in enumerate("ab")]


def test_a_selection_has_its_events_with_their_counts(passed, tmp_path):
    manifest = select_tracks(passed, tmp_path / "tracks", Thresholds(), events=iter(ROWS))
    assert (manifest["num_events"], manifest["events_by_label"]) == (2, {"dog": 2})
    table, stems = read_events(tmp_path / "tracks")
    assert table.to_pylist() == ROWS and stems == passed.resolve()


def test_events_decide_the_fingerprint_of_a_selection_and_not_what_it_keeps(passed, tmp_path):
    made = [select_tracks(passed, tmp_path / "tracks", Thresholds(), events=rows) for rows in (ROWS, ROWS[:1], ROWS)]
    assert made[0] == made[2]
    for name in ("fingerprint", "events_fingerprint"):
        assert made[0][name] != made[1][name]
    assert made[0]["kept_fingerprint"] == made[1]["kept_fingerprint"]


def test_a_selection_without_events_has_none_of_an_earlier_one(passed, tmp_path):
    select_tracks(passed, tmp_path / "tracks", Thresholds(), events=ROWS)
    assert "num_events" not in select_tracks(passed, tmp_path / "tracks", Thresholds())
    assert not (tmp_path / "tracks" / "events.parquet").exists()
    assert len(read_events(tmp_path / "tracks")[0]) == 0


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"PAR1"), lambda path: path.unlink()])
def test_damaged_events_are_an_error(passed, tmp_path, damage):
    select_tracks(passed, tmp_path / "tracks", Thresholds(), events=ROWS)
    damage(tmp_path / "tracks" / "events.parquet")
    with pytest.raises(DamagedError, match=r"events\.parquet must have the checksum in its manifest, got another"):
        read_events(tmp_path / "tracks")
