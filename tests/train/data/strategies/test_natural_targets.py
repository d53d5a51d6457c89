"""Natural targets: whole clips as targets, whose stems add up to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from engine.corpus.sources import read_sources
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import select_tracks
from tests.support.closed_pass import rewrite_shard
from tests.support.remixes import (
    CLIPS,
    CLIPS_PER_LABEL,
    RATE_HZ,
    SCORES,
    Natural,
    Write,
    config,
    contents,
    groups,
    loss_db,
    mixer,
    mixtures,
    named,
    pitch_hz,
    raw,
    split,
    tone,
    tones,
)
from train.data.items import Item, clean_items, track_items
from train.data.strategies.natural_targets import natural_items


def test_a_natural_target_has_a_query_for_each_label_and_is_mixed_with_another_sound(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    mix = config(natural_targets={"fraction": 1.0}, batch_size=32, three_source_fraction=0.5)
    seen, rivals_are_clean = set(), set()
    for mix_T, target_T, queries in groups(mixer(clean, mix, **recordings), 5):
        (clip,) = [clip for clip, sources in CLIPS.items() if set(sources) == set(contents(target_T))]
        assert queries == tuple(label for label, _ in CLIPS[clip])
        ((rival, number),) = contents(mix_T - target_T)
        assert not named([(rival, number)])[0] & set(queries)
        assert set(contents(mix_T)) == {*CLIPS[clip], (rival, number)}
        seen.add(clip)
        rivals_are_clean.add(number < CLIPS_PER_LABEL)
    assert seen == CLIPS.keys()
    assert rivals_are_clean == {True, False}  # clean clips and tracks


@pytest.mark.parametrize("augment", [False, True])
def test_a_natural_target_has_the_level_of_any_source(
    clean: list[Item], recordings: dict[str, list[Item]], augment: bool
) -> None:
    mix = config(natural_targets={"fraction": 1.0}, gain_db=0.0, batch_size=16, augment=augment)
    for mix_T, target_T, _ in groups(mixer(clean, mix, **recordings), 2):
        for samples_T in (target_T, mix_T - target_T):
            assert float(samples_T.square().mean().sqrt()) == pytest.approx(0.1, rel=0.02)


def test_a_natural_target_is_a_crop_of_the_stored_clip(clean: list[Item], natural: Natural) -> None:
    """Not of its stems, which add up to something else."""
    items = natural_items(natural.tracks, sample_rate_hz=RATE_HZ)
    seen = set()
    for _, target_T, queries in groups(mixer(clean, config(natural_targets={"fraction": 1.0}), natural=items), 4):
        (clip,) = [item.clip for item in items if item.labels == queries]
        whole_T, crop_T = natural.mixtures[clip].astype(np.float64), target_T.double().numpy()
        first = int(np.argmax(np.abs(np.correlate(whole_T, crop_T, "valid"))))
        part_T = whole_T[first : first + len(crop_T)]
        np.testing.assert_allclose(crop_T, part_T * (crop_T @ part_T) / (part_T @ part_T), atol=1e-6)
        seen.add((clip, first))
    assert len(seen) > 8


@pytest.mark.parametrize(("natural_fraction", "tolerance"), [(0.0, 0.0), (0.25, 0.06), (0.6, 0.06), (1.0, 0.0)])
def test_fraction_of_natural_targets(
    clean: list[Item], recordings: dict[str, list[Item]], natural_fraction: float, tolerance: float
) -> None:
    made = mixer(clean, config(batch_size=64, natural_targets={"fraction": natural_fraction}), **recordings)
    share = np.mean([len(queries) > 1 for *_, queries in groups(made, 6)])
    assert share == pytest.approx(natural_fraction, abs=tolerance + 1e-9)


def test_without_natural_targets_every_target_is_one_source(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    for made in (
        mixer(clean, config(batch_size=32, natural_targets={"fraction": 0.0}), **recordings),
        mixer(clean, config(batch_size=32, natural_targets={"fraction": 1.0}), tracks=recordings["tracks"]),
    ):
        for _, target_T, query in mixtures(made, 3):
            assert [label for label, _ in contents(target_T)] == [query]


def test_a_natural_clip_whose_query_is_absent_has_a_silent_target(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    made = mixer(clean, config(natural_targets={"fraction": 1.0}, silence_rate=1.0, batch_size=32), **recordings)
    for mix_T, target_T, queries in groups(made, 2):
        (query,) = queries
        assert not target_T.any()
        assert len(contents(mix_T)) >= 3
        assert query not in {label for label, _ in contents(mix_T)}


def test_a_natural_clip_with_all_labels_is_not_mixed_with_one_of_them(
    write_sources: Write, recordings: dict[str, list[Item]]
) -> None:
    """A second bell next to a clip of bell and dog would be in the stem of a query, but not in the target."""
    some = [item for item in recordings["natural"] if item.clip == "clip0"]
    clean = clean_items(read_sources(write_sources(tones(("bell", "dog")))), sample_rate_hz=RATE_HZ)
    made = mixer(clean, config(natural_targets={"fraction": 0.5}, batch_size=16), natural=some)
    for mix_T, target_T, queries in groups(made, 4):
        assert {label for label, _ in contents(target_T)} == set(queries)
        assert not {label for label, _ in contents(mix_T - target_T)} & set(queries)


@pytest.mark.parametrize("pool_s", [7200.0, 3.0], ids=["all-in-memory", "rotating"])
def test_a_resumed_training_sees_the_same_natural_clips(
    clean: list[Item], recordings: dict[str, list[Item]], pool_s: float
) -> None:
    mix = config(pool_s=pool_s, refresh_steps=3, augment=True, natural_targets={"fraction": 0.5}, silence_rate=0.1)
    undisturbed, resumed = (mixer(clean, mix, **recordings) for _ in range(2))
    seen = [raw(undisturbed.batch(step)) for step in range(10)]
    assert [raw(resumed.batch(step)) for step in range(6, 10)] == seen[6:]
    assert any(groups != sorted(set(groups)) for *_, groups in seen)


@pytest.mark.parametrize("is_old", [False, True], ids=["null", "no-such-column"])
def test_clips_stored_without_their_mixture_are_counted_and_skipped(
    write_pass: Write, write_sources: Write, tmp_path: Path, is_old: bool
) -> None:
    """Their bare stems can still be used. One clean clip is torn as well."""
    path = write_sources([*tones(("bell", "dog"), 2), ("torn", "bell", 1, tone(440))])
    (path.parent / "torn.wav").write_bytes(b"not audio")
    stems = [("bare", label, tone(pitch_hz(label, 8)), SCORES) for label in ("rain", "wind")]
    folder = write_pass(stems, mixtures={"bare": None}) / "stems"
    select_tracks(folder, tmp_path / "tracks", Thresholds())
    if is_old:
        (shard,) = folder.glob("*.parquet")
        rewrite_shard(folder, shard.name, pq.read_table(shard).drop_columns(["mixture_flac", "mixture_exponent"]))
    mix, rate = config(natural_targets={"fraction": 1.0}, batch_size=32), {"sample_rate_hz": RATE_HZ}
    items = {"tracks": track_items(tmp_path / "tracks", **rate), "natural": natural_items(tmp_path / "tracks", **rate)}
    made = mixer(clean_items(read_sources(path), **rate), mix, **items)
    assert {query for *_, query in mixtures(made, 2)} == {"bell", "dog"}
    assert made.pools["tracks"].unusable == made.pools["natural"].unusable == {"bare"}
    assert made.num_unusable == 2
    bare = mixer([], config(), tracks=track_items(tmp_path / "tracks", **rate, share=False))
    assert {query for *_, query in mixtures(bare, 8)} == {"rain", "wind"}
    assert bare.num_unusable == 0


def test_regroup_of_a_drawn_batch_gives_the_mixture_of_each_group(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    made = mixer(clean, config(natural_targets={"fraction": 0.5}, batch_size=16), **recordings)
    batch = made.batch(0)
    _, mix_GT = batch.regroup(torch.zeros_like(batch.mix_BT))
    assert torch.equal(mix_GT, torch.stack([mix_T for mix_T, *_ in groups(made, 1)]))


def test_stems_that_add_up_to_the_target_have_the_least_loss_however_they_divide_it(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    mix = config(natural_targets={"fraction": 0.5}, silence_rate=0.2, batch_size=32)
    made = mixer(clean, mix, **recordings)
    batch = made.batch(0)
    per_group_db = [
        -10 * np.log10(1 + 1e3 * float(target_T.double().square().sum() / mix_T.double().square().sum()))
        for mix_T, target_T, _ in groups(made, 1)
    ]
    assert 0.0 in per_group_db  # a silent target
    best_db = np.mean(per_group_db)
    oracle_BT = split(batch, seed=0)
    assert [loss_db(batch, split(batch, seed=seed)) for seed in range(4)] == pytest.approx([best_db] * 4, abs=1e-3)
    without_one_BT = oracle_BT.clone()
    without_one_BT[batch.group_B.tolist().index(int(batch.group_B.bincount().argmax()))] = 0.0
    others = {
        "softer": 0.95 * oracle_BT,
        "louder": 1.05 * oracle_BT,
        "inverted": -oracle_BT,
        "late": oracle_BT.roll(1, dims=1),
        "silence": torch.zeros_like(oracle_BT),
        "mixture": batch.mix_BT,
        "target for every query": batch.target_GT[batch.group_B],
        "stems of other groups": oracle_BT.roll(1, dims=0),
        "one stem less": without_one_BT,
    }
    assert {name: loss_db(batch, stems_BT) > best_db + 0.1 for name, stems_BT in others.items()} == dict.fromkeys(
        others, True
    )
