"""Single events in training: whole clips of one label, capped for each label and weighted by their purity."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from engine.corpus.sources import read_sources
from engine.selection.labels.events import EventRow
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import select_tracks
from tests.support.remixes import LABELS, RATE_HZ, SCORES, Write, config, tone, tones
from train.data.items import event_items, track_items
from train.data.training_data import TrainingData, capped_events, make_mixer
from train.student import DistilConfig
from train.task import training_identity

PURITIES = (0.5, 0.9, 0.75)


@pytest.fixture
def tracks(write_pass: Write, tmp_path: Path) -> Path:
    """Three clips of a dog and a quiet bell, all of them single events of the dog."""
    stems = [
        (f"clip{i}", label, gain * tone(440 + 100 * i), SCORES)
        for i in range(3)
        for label, gain in (("dog", 1.0), ("bell", 0.01))
    ]
    passed = write_pass(stems) / "stems"
    rows: list[EventRow] = [
        {
            **{"shard": "shard-000000-0000.parquet", "row": 2 * i, "first_row": 2 * i, "num_stems": 2},
            **{"clip_id": f"clip{i}", "path": f"clip{i}.wav", "labels": ["dog", "bell"], "label": "dog"},
            **{"sample_rate_hz": RATE_HZ, "num_samples": RATE_HZ, "purity_fraction": purity},
        }
        for i, purity in enumerate(PURITIES)
    ]
    select_tracks(passed, tmp_path / "tracks", Thresholds(), events=rows)
    return tmp_path / "tracks"


def test_an_event_is_its_whole_clip_purest_first(tracks: Path) -> None:
    items = event_items(tracks, sample_rate_hz=RATE_HZ)
    assert [(item.clip, item.weight) for item in items] == [
        ("clip1", pytest.approx(0.9)),
        ("clip2", 0.75),
        ("clip0", 0.5),
    ]
    for item in items:
        assert item.labels == ("dog",) and item.labels_present == {"dog", "bell"}
        expected_T = 1.01 * tone(440 + 100 * int(item.clip[-1]))
        np.testing.assert_allclose(item.load(), expected_T, atol=1e-6)
    with pytest.raises(ValueError, match=r"must have the separator's sample rate of 16000 Hz, got 8000 Hz"):
        event_items(tracks, sample_rate_hz=16000)


@pytest.mark.parametrize(
    ("clean", "ratio", "taken"),
    [
        (["dog"], 1.0, [0.9]),
        (["dog"], 2.0, [0.9, 0.75]),
        (["Dog"], 4.0, [0.9, 0.75, 0.5]),
        (["bell", "rain", "rain", "rain", "wind", "wind"], 1.0, [0.9, 0.75]),  # the median label has room for two
        ([], 1.0, [0.9, 0.75, 0.5]),
    ],
)
def test_the_purest_events_of_a_label_are_taken(
    tracks: Path, clean: list[str], ratio: float, taken: list[float]
) -> None:
    items = capped_events(event_items(tracks, sample_rate_hz=RATE_HZ), clean, ratio)
    assert [item.weight for item in items] == pytest.approx(taken)


def test_events_join_the_clean_clips_unless_they_are_switched_off(tracks: Path, write_sources: Write) -> None:
    data = TrainingData(clean=read_sources(write_sources(tones())), tracks=str(tracks))
    for ratio, num in ((4.0, 3), (0.5, 2), (0.0, 0)):
        made = make_mixer(data, config(max_events_ratio=ratio), seed=0, sample_rate_hz=RATE_HZ)
        assert made.pools["clean"].counts["dog"] == 4 + num
        assert made.pools["clean"].counts["bell"] == 4
    alone = make_mixer(TrainingData(tracks=str(tracks)), config(), seed=0, sample_rate_hz=RATE_HZ)
    assert alone.pools["clean"].counts == {"dog": 3}


def test_the_weight_of_an_event_is_its_purity_and_no_track_of_its_clip_is_mixed_with_it(
    tracks: Path, write_sources: Write
) -> None:
    data = TrainingData(clean=read_sources(write_sources(tones())), tracks=str(tracks))
    made = make_mixer(data, config(), seed=0, sample_rate_hz=RATE_HZ)
    made.draw(0)
    rng, purities = np.random.default_rng(0), dict(zip(("clip0", "clip1", "clip2"), PURITIES, strict=True))
    seen = set()
    for _ in range(300):
        first, *others = made.draw_sounds(rng, list(LABELS), 3)
        is_event = first.item.clip in purities and first in made.pools["clean"].by_label["dog"]
        assert made.weight(first) == pytest.approx(purities[first.item.clip] if is_event else 1.0)
        if is_event:
            seen.add(first.item.clip)
            assert {first.item.clip}.isdisjoint(other.item.clip for other in others)
            assert all({"dog", "bell"}.isdisjoint(other.item.labels_present) for other in others)
    assert seen == purities.keys()
    assert {item.clip for item in track_items(tracks, sample_rate_hz=RATE_HZ)} == purities.keys()


def test_events_decide_the_identity_of_a_training_that_uses_them(tracks: Path) -> None:
    def identity(ratio: float) -> str:
        mix = config(max_events_ratio=ratio)
        return training_identity(data=TrainingData(tracks=str(tracks)), config=DistilConfig(mix=mix))

    stems = tracks.parent / "pass" / "stems"
    before = identity(4.0), identity(0.0)
    select_tracks(stems, tracks, Thresholds())
    assert identity(4.0) != before[0] and identity(0.0) == before[1]
