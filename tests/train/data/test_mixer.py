"""Training mixtures: their sources, how often each kind is drawn, and that a step alone decides them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from engine.corpus.sources import read_sources
from tests.support.remixes import (
    CLIPS_PER_LABEL,
    LABELS,
    RATE_HZ,
    Write,
    burst,
    config,
    contents,
    mixer,
    mixtures,
    named,
    pair_item,
    pitch_hz,
    raw,
    together,
    tone,
    tone_item,
)
from train.data.batch import Batch
from train.data.items import Item, clean_items


@pytest.mark.parametrize("augment", [False, True])
def test_same_seed_rank_and_step_give_the_same_bytes(clean: list[Item], augment: bool) -> None:
    mix = config(augment=augment, silence_rate=0.3)
    first, second = mixer(clean, mix, seed=5), mixer(clean, mix, seed=5)
    assert raw(first.batch(7)) == raw(second.batch(7))
    assert raw(first.batch(7)) == raw(first.batch(7))


def test_another_step_seed_or_rank_gives_another_batch(clean: list[Item]) -> None:
    batches = [
        mixer(clean, config(), seed=5).batch(7),
        mixer(clean, config(), seed=5).batch(8),
        mixer(clean, config(), seed=6).batch(7),
        mixer(clean, config(), seed=5, rank=1, num_ranks=2).batch(7),
    ]
    assert len({batch.mix_BT.numpy().tobytes() for batch in batches}) == 4


@pytest.mark.parametrize("pool_s", [7200.0, 12.0], ids=["all-in-memory", "rotating"])
def test_a_resumed_training_sees_what_an_undisturbed_one_sees(clean: list[Item], pool_s: float) -> None:
    mix = config(pool_s=pool_s, refresh_steps=3, augment=True)
    undisturbed = mixer(clean, mix)
    seen = [raw(undisturbed.batch(step)) for step in range(12)]
    resumed = mixer(clean, mix)
    assert [raw(resumed.batch(step)) for step in range(7, 12)] == seen[7:]


def test_shapes_and_kinds(clean: list[Item]) -> None:
    batch = mixer(clean, config(batch_size=5)).batch(0)
    assert batch.mix_BT.shape == batch.target_GT.shape == (5, 2000)
    assert batch.mix_BT.dtype == batch.target_GT.dtype == torch.float32
    assert batch.index_B.dtype == batch.group_B.dtype == torch.long
    assert batch.index_B.shape == batch.group_B.shape == (5,)


def test_target_is_the_queried_source_and_the_rest_has_none_of_it(clean: list[Item]) -> None:
    for mix_T, target_T, query in mixtures(mixer(clean, config(batch_size=16)), 4):
        (source,) = contents(target_T)
        assert source[0] == query
        rest = contents(mix_T - target_T)
        assert rest
        assert query not in {label for label, _ in rest}
        assert set(contents(mix_T)) == {source, *rest}


def test_sources_of_a_mixture_have_different_labels(clean: list[Item]) -> None:
    for mix_T, _, _ in mixtures(mixer(clean, config(batch_size=16, three_source_fraction=0.5)), 8):
        labels = [label for label, _ in contents(mix_T)]
        assert len(labels) == len(set(labels)) in (2, 3)


def test_every_label_is_a_query_and_every_clip_is_used(clean: list[Item]) -> None:
    rows = mixtures(mixer(clean, config(batch_size=64)), 6)
    queries = [query for *_, query in rows]
    assert all(queries.count(label) / len(rows) == pytest.approx(1 / 6, abs=0.07) for label in LABELS)
    labels_present = {source for mix_T, *_ in rows for source in contents(mix_T)}
    assert labels_present == {(label, i) for label in LABELS for i in range(CLIPS_PER_LABEL)}


@pytest.mark.parametrize(("three_source_fraction", "tolerance"), [(0.0, 0.0), (0.4, 0.07), (1.0, 0.0)])
def test_fraction_of_three_sources(clean: list[Item], three_source_fraction: float, tolerance: float) -> None:
    rows = mixtures(mixer(clean, config(batch_size=64, three_source_fraction=three_source_fraction)), 9)
    share = np.mean([len(contents(mix_T)) == 3 for mix_T, *_ in rows])
    assert share == pytest.approx(three_source_fraction, abs=tolerance + 1e-9)


@pytest.mark.parametrize(("silence_rate", "tolerance"), [(0.0, 0.0), (0.05, 0.03), (0.3, 0.07), (1.0, 0.0)])
def test_fraction_of_silent_targets(clean: list[Item], silence_rate: float, tolerance: float) -> None:
    rows = mixtures(mixer(clean, config(batch_size=64, silence_rate=silence_rate)), 9)
    share = np.mean([not target_T.any() for _, target_T, _ in rows])
    assert share == pytest.approx(silence_rate, abs=tolerance + 1e-9)


def test_the_query_of_a_silent_target_is_not_in_the_mixture(clean: list[Item]) -> None:
    queries = set()
    for mix_T, target_T, query in mixtures(mixer(clean, config(batch_size=32, silence_rate=1.0)), 3):
        assert not target_T.any()
        assert query not in {label for label, _ in contents(mix_T)}
        queries.add(query)
    assert queries == set(LABELS)


def rivals_of(batch: Batch, labels: Sequence[str]) -> list[set[str]]:
    return [{label for label, one in zip(labels, row, strict=True) if one} for row in batch.rivals.tolist()]


@pytest.mark.parametrize(("rivals_rate", "tolerance"), [(0.0, 0.0), (0.5, 0.1), (1.0, 0.0)])
def test_queries_name_the_other_sounds_of_their_mixture(
    clean: list[Item], rivals_rate: float, tolerance: float
) -> None:
    made = mixer(clean, config(batch_size=64, silence_rate=0.2, rivals_rate=rivals_rate))
    rows = []
    for step in range(4):
        batch = made.batch(step)
        for mix_T, index, rivals in zip(
            batch.mix_BT, batch.index_B.tolist(), rivals_of(batch, made.labels), strict=True
        ):
            rows.append(bool(rivals))
            assert rivals in (set(), {label for label, _ in contents(mix_T)} - {made.labels[index]})
    assert np.mean(rows) == pytest.approx(rivals_rate, abs=tolerance)


def test_what_may_leak_into_a_remix_is_no_rival_but_all_labels_of_a_natural_clip_are(clean: list[Item]) -> None:
    track = tone_item("dog", 5, labels_present=("dog", "wind"))
    remixes = mixer(clean, config(batch_size=64, rivals_rate=1.0), tracks=[track])
    batch = remixes.batch(0)
    for mix_T, index, rivals in zip(
        batch.mix_BT, batch.index_B.tolist(), rivals_of(batch, remixes.labels), strict=True
    ):
        assert rivals == {label for label, _ in contents(mix_T)} - {remixes.labels[index]}
    pair = pair_item("dog", 0.5, labels_present=("rain",))
    clips = mixer(clean, config(clip_fraction=1.0, silence_rate=0.0, rivals_rate=1.0), pairs=[pair])
    assert all(rivals == {"rain"} for rivals in rivals_of(clips.batch(0), clips.labels))


def test_rivals_of_a_student_that_reads_text_are_the_mean_of_their_embeddings(clean: list[Item]) -> None:
    vectors_LE = np.eye(len(LABELS), dtype=np.float32)
    settings = config(batch_size=64, rivals_rate=0.5, three_source_fraction=0.5)
    by_label, in_text = mixer(clean, settings), mixer(clean, settings, vectors_LE=vectors_LE)
    ones, mean = by_label.batch(0).rivals, in_text.batch(0).rivals
    assert torch.equal(ones > 0, mean > 0)
    assert torch.allclose(mean.norm(dim=1), ones.any(1).float())
    assert {0, 1, 2} == set(ones.sum(1).int().tolist())


def test_sources_are_at_equal_level_without_gain(clean: list[Item]) -> None:
    for mix_T, *_ in mixtures(mixer(clean, config(gain_db=0.0)), 8):
        assert list(contents(mix_T).values()) == pytest.approx([0.1] * len(contents(mix_T)), rel=1e-3)


def test_gains_stay_within_gain_db_and_use_it(clean: list[Item]) -> None:
    rows = mixtures(mixer(clean, config(batch_size=32, gain_db=6.0)), 5)
    levels_db = [20 * np.log10(rms / 0.1) for mix_T, *_ in rows for rms in contents(mix_T).values()]
    assert min(levels_db) == pytest.approx(-6.0, abs=0.5)
    assert max(levels_db) == pytest.approx(6.0, abs=0.5)
    assert -6.01 < min(levels_db)
    assert max(levels_db) < 6.01
    assert np.mean(levels_db) == pytest.approx(0.0, abs=0.7)


def test_a_quiet_recording_is_brought_to_the_same_level(write_sources: Write) -> None:
    quiet, loud = 1e-3 * tone(pitch_hz("bell", 0)), 3.0 * tone(pitch_hz("dog", 0))
    path = write_sources([("a", "bell", 1, quiet), ("b", "dog", 1, loud)])
    items = clean_items(read_sources(path), sample_rate_hz=RATE_HZ)
    for mix_T, *_ in mixtures(mixer(items, config(gain_db=0.0)), 2):
        assert list(contents(mix_T).values()) == pytest.approx([0.1, 0.1], rel=1e-3)


def test_augmentation_keeps_level_and_moves_pitch(clean: list[Item]) -> None:
    """A tone sped up by 5/4 sounds a third higher; colouring changes no level over the active part."""
    pitches_hz = set()
    for _, target_T, _ in mixtures(mixer(clean[:8], config(augment=True, gain_db=0.0, batch_size=32)), 3):
        assert float(target_T.square().mean().sqrt()) == pytest.approx(0.1, rel=0.02)
        pitches_hz.add(round(int(torch.fft.rfft(target_T).abs().argmax()) * 4 / 20) * 20)
    assert len(pitches_hz) > 2 * 8


@pytest.mark.parametrize(
    ("length_s", "at_s"),
    [(0.1, (0.0, 0.43, 0.6, 0.75, 1.06, 1.9)), (0.02, (0.0, 0.48, 0.6, 0.84, 1.31, 1.98))],
    ids=["95-percent-silent", "one-click"],
)
@pytest.mark.parametrize("augment", [False, True])
def test_crops_are_never_silent(write_sources: Write, length_s: float, at_s: tuple[float, ...], augment: bool) -> None:
    clips = [
        (f"{label}-{i}", label, 1, burst(pitch_hz(label, i), at_s=at, length_s=length_s))
        for label in ("bell", "dog")
        for i, at in enumerate(at_s)
    ]
    items = clean_items(read_sources(write_sources(clips)), sample_rate_hz=RATE_HZ)
    rows = mixtures(mixer(items, config(batch_size=64, augment=augment)), 4)
    assert sum(not target_T.any() for _, target_T, _ in rows) == 0


def test_a_sound_shorter_than_the_segment_is_padded(write_sources: Write) -> None:
    clips = [(label, label, 1, tone(pitch_hz(label, 0), duration_s=0.15)) for label in ("bell", "dog")]
    items = clean_items(read_sources(write_sources(clips)), sample_rate_hz=RATE_HZ)
    for _, target_T, _ in mixtures(mixer(items, config()), 3):
        assert target_T.shape == (2000,)
        assert target_T[:1200].any()
        assert not target_T[1200:].any()


@pytest.mark.parametrize(("clean_fraction", "tolerance"), [(0.0, 0.0), (0.3, 0.07), (0.5, 0.07), (1.0, 0.0)])
def test_fraction_of_clean_clips(
    clean: list[Item], tracks: list[Item], clean_fraction: float, tolerance: float
) -> None:
    """With two sources: a third may have to be a clean clip, because every track has a label of the others."""
    mix = config(batch_size=64, clean_fraction=clean_fraction, three_source_fraction=0.0)
    rows = mixtures(mixer(clean, mix, tracks=tracks), 8)
    numbers = [number for mix_T, *_ in rows for _, number in contents(mix_T)]
    assert np.mean([number < CLIPS_PER_LABEL for number in numbers]) == pytest.approx(
        clean_fraction, abs=tolerance + 1e-9
    )


def test_a_label_without_tracks_is_drawn_from_clean_clips_and_the_reverse(
    clean: list[Item], tracks: list[Item]
) -> None:
    some_clean = [item for item in clean if item.labels[0] in ("bell", "dog")]
    some_tracks = [item for item in tracks if item.labels[0] in ("dog", "rain")]
    numbers: dict[str, set[bool]] = {}
    for mix_T, *_ in mixtures(mixer(some_clean, config(batch_size=32), tracks=some_tracks), 5):
        for label, number in contents(mix_T):
            numbers.setdefault(label, set()).add(number < CLIPS_PER_LABEL)
    assert numbers == {"bell": {True}, "dog": {True, False}, "rain": {False}}


def test_tracks_of_one_clip_are_not_mixed_with_each_other(tracks: list[Item]) -> None:
    """That would be the natural recording again, where stems are not independent."""
    made = mixer([], config(batch_size=64, three_source_fraction=0.0), tracks=tracks)
    assert together(mixtures(made, 5)) == 0


def test_the_clips_of_a_mixture_have_no_label_in_common(clean: list[Item], tracks: list[Item]) -> None:
    """Leakage in a track, from the rest of its clip, is then of no other source and of no silent query."""
    num_tracks = set()
    mix = config(batch_size=64, clean_fraction=0.2, three_source_fraction=0.5, silence_rate=0.5)
    for mix_T, target_T, query in mixtures(mixer(clean, mix, tracks=tracks), 5):
        found = contents(mix_T)
        names = named(found)
        assert len(set.union(*names)) == sum(map(len, names))
        assert target_T.any() or query not in set.union(*names)
        num_tracks.add(sum(number >= CLIPS_PER_LABEL for _, number in found))
    assert num_tracks == {0, 1, 2, 3}


def test_a_clean_clip_is_taken_before_a_second_track_of_one_clip(clean: list[Item], tracks: list[Item]) -> None:
    """Only one natural clip has tracks, so two tracks always share it; clean clips of every label are there."""
    one_clip = [item for item in tracks if item.clip == "clip0"]
    assert len(one_clip) == 2
    some_clean = [item for item in clean if item.labels[0] in ("bell", "dog")]
    made = mixer(some_clean, config(batch_size=64, clean_fraction=0.3), tracks=one_clip)
    assert together(mixtures(made, 3)) == 0
