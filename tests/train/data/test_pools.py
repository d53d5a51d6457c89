"""Natural targets, groups of queries, and the pools that sounds are drawn from."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from engine.selection.thresholds import Thresholds
from engine.selection.tracks import write_tracks
from tests.support.remixes import (
    CLIPS,
    CLIPS_PER_LABEL,
    RATE_HZ,
    SCORES,
    Natural,
    Write,
    batch_of,
    config,
    contents,
    groups,
    loss_db,
    mixer,
    mixtures,
    named,
    pitch_hz,
    pool,
    raw,
    sounds,
    split,
    tone,
    tones,
)
from train.data.config import MixConfig
from train.data.items import Item, clean_items, natural_items, track_items
from train.data.mixer import Batch


@pytest.mark.parametrize("is_old", [False, True], ids=["null", "no-such-column"])
def test_clips_stored_without_their_mixture_are_counted_and_skipped(
    write_pass: Write, write_sources: Write, tmp_path: Path, is_old: bool
) -> None:
    """Their bare stems can still be used. One clean clip is torn as well."""
    path = write_sources([*tones(("bell", "dog"), 2), ("torn", "bell", 1, tone(440))])
    (path.parent / "torn.wav").write_bytes(b"not audio")
    stems = [("bare", label, tone(pitch_hz(label, 8)), SCORES) for label in ("rain", "wind")]
    folder = write_pass(stems, mixtures={"bare": None}) / "stems"
    write_tracks(folder, tmp_path / "tracks", Thresholds())
    if is_old:
        shard = folder / "part-000000-0000.parquet"
        pq.write_table(pq.read_table(shard).drop_columns(["mixture_flac", "mixture_exponent"]), shard)
    mix, rate = config(natural_fraction=1.0, batch_size=32), {"sample_rate_hz": RATE_HZ}
    items = {"tracks": track_items(tmp_path / "tracks", **rate), "natural": natural_items(tmp_path / "tracks", **rate)}
    made = mixer(clean_items(path, folds=None, **rate), mix, **items)
    assert {query for *_, query in mixtures(made, 2)} == {"bell", "dog"}
    assert made.tracks.unusable == made.natural.unusable == {"bare"}
    assert made.num_unusable == 2
    bare = mixer([], config(), tracks=track_items(tmp_path / "tracks", **rate, share=False))
    assert {query for *_, query in mixtures(bare, 8)} == {"rain", "wind"}
    assert bare.num_unusable == 0


def test_a_natural_target_is_asked_for_by_all_its_labels_beside_a_sound_of_none_of_them(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    mix = config(natural_fraction=1.0, batch_size=32, three_source_fraction=0.5)
    seen, beside = set(), set()
    for mix_T, target_T, queries in groups(mixer(clean, mix, **recordings), 5):
        (clip,) = [clip for clip, sources in CLIPS.items() if set(sources) == set(contents(target_T))]
        assert queries == tuple(label for label, _ in CLIPS[clip])
        ((rival, number),) = contents(mix_T - target_T)
        assert not named([(rival, number)])[0] & set(queries)
        assert set(contents(mix_T)) == {*CLIPS[clip], (rival, number)}
        seen.add(clip)
        beside.add(number < CLIPS_PER_LABEL)
    assert seen == CLIPS.keys()
    assert beside == {True, False}  # clean clips and tracks


@pytest.mark.parametrize("augment", [False, True])
def test_a_natural_target_has_the_level_of_any_source(
    clean: list[Item], recordings: dict[str, list[Item]], augment: bool
) -> None:
    mix = config(natural_fraction=1.0, gain_db=0.0, batch_size=16, augment=augment)
    for mix_T, target_T, _ in groups(mixer(clean, mix, **recordings), 2):
        for samples_T in (target_T, mix_T - target_T):
            assert float(samples_T.square().mean().sqrt()) == pytest.approx(0.1, rel=0.02)


def test_a_natural_target_is_a_crop_of_the_stored_clip(clean: list[Item], natural: Natural) -> None:
    """Not of its stems, which add up to something else."""
    items = natural_items(natural.tracks, sample_rate_hz=RATE_HZ)
    seen = set()
    for _, target_T, queries in groups(mixer(clean, config(natural_fraction=1.0), natural=items), 4):
        (clip,) = [item.clip for item in items if item.labels == queries]
        whole_T, crop_T = natural.mixtures[clip].astype(np.float64), target_T.double().numpy()
        first = int(np.argmax(np.abs(np.correlate(whole_T, crop_T, "valid"))))
        part_T = whole_T[first : first + len(crop_T)]
        np.testing.assert_allclose(crop_T, part_T * (crop_T @ part_T) / (part_T @ part_T), atol=1e-6)
        seen.add((clip, first))
    assert len(seen) > 8


@pytest.mark.parametrize(("natural_fraction", "tolerance"), [(0.0, 0.0), (0.25, 0.06), (0.6, 0.06), (1.0, 0.0)])
def test_share_of_natural_targets(
    clean: list[Item], recordings: dict[str, list[Item]], natural_fraction: float, tolerance: float
) -> None:
    made = mixer(clean, config(batch_size=64, natural_fraction=natural_fraction), **recordings)
    share = np.mean([len(queries) > 1 for *_, queries in groups(made, 6)])
    assert share == pytest.approx(natural_fraction, abs=tolerance + 1e-9)


def test_without_natural_targets_every_target_is_one_source(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    for made in (
        mixer(clean, config(batch_size=32, natural_fraction=0.0), **recordings),
        mixer(clean, config(batch_size=32, natural_fraction=1.0), tracks=recordings["tracks"]),
    ):
        for _, target_T, query in mixtures(made, 3):
            assert [label for label, _ in contents(target_T)] == [query]


def test_a_natural_clip_whose_query_is_absent_has_a_silent_target(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    made = mixer(clean, config(natural_fraction=1.0, silence_rate=1.0, batch_size=32), **recordings)
    for mix_T, target_T, queries in groups(made, 2):
        (query,) = queries
        assert not target_T.any()
        assert len(contents(mix_T)) >= 3
        assert query not in {label for label, _ in contents(mix_T)}


def test_a_natural_clip_with_all_the_labels_there_are_is_not_mixed_with_one_of_them(
    write_sources: Write, recordings: dict[str, list[Item]]
) -> None:
    """A second bell beside a clip of bell and dog would be in the stems that are asked for, but not in the target."""
    some = [item for item in recordings["natural"] if item.clip == "clip0"]
    clean = clean_items(write_sources(tones(("bell", "dog"))), folds=None, sample_rate_hz=RATE_HZ)
    made = mixer(clean, config(natural_fraction=0.5, batch_size=16), natural=some)
    for mix_T, target_T, queries in groups(made, 4):
        assert {label for label, _ in contents(target_T)} == set(queries)
        assert not {label for label, _ in contents(mix_T - target_T)} & set(queries)


@pytest.mark.parametrize("pool_s", [7200.0, 3.0], ids=["all-in-memory", "rotating"])
def test_a_resumed_training_sees_the_same_natural_clips(
    clean: list[Item], recordings: dict[str, list[Item]], pool_s: float
) -> None:
    mix = config(pool_s=pool_s, refresh_steps=3, augment=True, natural_fraction=0.5, silence_rate=0.1)
    undisturbed, resumed = (mixer(clean, mix, **recordings) for _ in range(2))
    seen = [raw(undisturbed.batch(step)) for step in range(10)]
    assert [raw(resumed.batch(step)) for step in range(6, 10)] == seen[6:]
    assert any(groups != sorted(set(groups)) for *_, groups in seen)


def test_regroup_adds_up_the_stems_of_a_group_and_gives_its_mixture() -> None:
    """The groups are not in order and not of one size; every stem gets its gradient."""
    mix_GT = torch.randn(3, 50)
    batch = batch_of(mix_GT, torch.randn(3, 50), [1, 0, 2, 1, 1, 0])
    stems_BT = torch.randn(6, 50, requires_grad=True)
    summed_GT, regrouped_GT = batch.regroup(stems_BT)
    wanted = [stems_BT[1] + stems_BT[5], stems_BT[0] + stems_BT[3] + stems_BT[4], stems_BT[2]]
    torch.testing.assert_close(summed_GT, torch.stack(wanted))
    assert torch.equal(regrouped_GT, mix_GT)
    (summed_GT * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    assert stems_BT.grad is not None
    assert stems_BT.grad[:, 0].tolist() == [10.0, 1.0, 100.0, 10.0, 10.0, 1.0]


def test_regroup_of_a_drawn_batch_gives_the_mixture_of_each_group(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    made = mixer(clean, config(natural_fraction=0.5, batch_size=16), **recordings)
    batch = made.batch(0)
    _, mix_GT = batch.regroup(torch.zeros_like(batch.mix_BT))
    assert torch.equal(mix_GT, torch.stack([mix_T for mix_T, *_ in groups(made, 1)]))


def test_a_batch_goes_to_a_device_with_all_it_has(clean: list[Item]) -> None:
    batch = mixer(clean, config()).batch(0)
    moved = batch.to(torch.device("meta"))
    assert {field.name for field in fields(Batch)} == vars(moved).keys()
    assert all(value.device.type == "meta" for value in vars(moved).values())
    assert raw(batch.to(torch.device("cpu"))) == raw(batch)


def test_stems_that_add_up_to_the_target_have_the_least_loss_however_they_divide_it(
    clean: list[Item], recordings: dict[str, list[Item]]
) -> None:
    mix = config(natural_fraction=0.5, silence_rate=0.2, batch_size=32)
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


def test_tracks_of_another_rate_are_refused(write_pass: Write, tmp_path: Path) -> None:
    folder = write_pass([("clip", "dog", tone(440), SCORES)], sample_rate_hz=16000)
    write_tracks(folder / "stems", tmp_path / "tracks", Thresholds())
    with pytest.raises(ValueError, match=r"16000 Hz.*8000"):
        track_items(tmp_path / "tracks", sample_rate_hz=RATE_HZ)


def test_tracks_that_are_no_selection_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        track_items(tmp_path, sample_rate_hz=RATE_HZ)


def test_clean_items_keep_to_their_folds_rate_and_length(write_sources: Write) -> None:
    clips = [(f"{label}-{fold}", label, fold, tone(440)) for label in ("bell", "dog") for fold in (1, 2)]
    items = clean_items(write_sources(clips), folds=[2], sample_rate_hz=4000, max_s=0.5)
    assert sorted(Path(item.clip).stem for item in items) == ["bell-2", "dog-2"]
    assert [len(item.load()) for item in items] == [2000, 2000]


def test_a_pool_that_fits_holds_everything_on_every_rank(clean: list[Item]) -> None:
    held = [pool(clean, config(pool_s=24.0), rank=rank, num_ranks=2) for rank in (0, 1)]
    for each in held:
        each.prepare(0)
        assert len(sounds(each)) == 24
    held[0].prepare(10_000)
    assert len(sounds(held[0])) == 24


def test_short_clean_clips_count_with_their_own_length(write_sources: Write) -> None:
    """24 s of audio fit into 30 s of memory, however long clips are allowed to be."""
    items = clean_items(write_sources(tones()), folds=None, sample_rate_hz=RATE_HZ)
    held = pool(items, config(pool_s=30.0))
    held.prepare(0)
    assert len(sounds(held)) == 24


def test_a_rotating_pool_holds_its_share_and_sees_every_clip(clean: list[Item]) -> None:
    held = pool(clean, config(pool_s=5.0, refresh_steps=10))
    seen = []
    for step in range(0, 50, 5):
        held.prepare(step)
        assert len(sounds(held)) <= 5
        seen.append(frozenset(sounds(held)))
    assert seen[0::2] == seen[1::2]  # steps 0 and 5 are of one turn
    assert len(set(seen)) == 5
    assert frozenset.union(*seen) == {name for name, *_ in tones()}


def test_ranks_of_a_rotating_pool_share_the_clips_without_overlap(clean: list[Item]) -> None:
    seen: list[set[str]] = []
    for rank in range(3):
        held = pool(clean, config(pool_s=4.0, refresh_steps=1), rank=rank, num_ranks=3)
        seen.append(set())
        for step in range(4):
            held.prepare(step)
            seen[-1] |= sounds(held)
    assert [len(each) for each in seen] == [8, 8, 8]
    assert len(set.union(*seen)) == 24


def test_going_back_a_turn_holds_what_it_held(clean: list[Item]) -> None:
    held = pool(clean, config(pool_s=5.0, refresh_steps=10))
    held.prepare(0)
    first = sounds(held)
    held.prepare(10)
    held.prepare(0)
    assert sounds(held) == first


def test_unreadable_clips_are_counted_and_skipped(write_sources: Write) -> None:
    path = write_sources([*tones(("bell", "dog"), 2), ("lost", "dog", 1, tone(440)), ("torn", "bell", 1, tone(440))])
    (path.parent / "lost.wav").unlink()
    (path.parent / "torn.wav").write_bytes(b"not audio")
    made = mixer(clean_items(path, folds=None, sample_rate_hz=RATE_HZ), config())
    made.batch(0)
    assert len(made.clean.unusable) == made.num_unusable == 2
    assert sounds(made.clean) == {"bell-0", "bell-1", "dog-0", "dog-1"}


def test_silent_clips_are_not_drawn(write_sources: Write) -> None:
    path = write_sources([*tones(("bell", "dog"), 1), ("void", "dog", 1, np.zeros(8000))])
    rows = mixtures(mixer(clean_items(path, folds=None, sample_rate_hz=RATE_HZ), config(batch_size=32)), 1)
    assert all(set(contents(mix_T)) == {("bell", 0), ("dog", 0)} for mix_T, *_ in rows)


@pytest.mark.parametrize("labels", [("bell",), ()])
def test_fewer_than_two_labels_are_an_error(write_sources: Write, labels: tuple[str, ...]) -> None:
    """Clips of a second label are listed, but none of them can be read."""
    path = write_sources([*tones(labels, 2), ("torn", "siren", 1, tone(440))])
    (path.parent / "torn.wav").write_bytes(b"")
    with pytest.raises(ValueError, match=rf"two labels at least, found \[{', '.join(map(repr, labels))}\]"):
        mixer(clean_items(path, folds=None, sample_rate_hz=RATE_HZ), config()).batch(0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("three_source_fraction", 1.5),
        ("silence_rate", -0.1),
        ("clean_fraction", 2.0),
        ("natural_fraction", 1.01),
        ("batch_size", 0),
        ("segment_s", 0.0),
        ("pool_s", -1.0),
        ("refresh_steps", 0),
        ("clip_fraction", 1.5),
        ("mixit_fraction", -1.0),
        ("absent_fraction", 1.1),
        ("label_balance", 2.0),
        ("consistency_weight", -0.5),
        ("quality_weight", "some"),
        ("mixit_assignment", "worst"),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        MixConfig(**{name: value})


def test_shares_of_natural_mixtures_are_1_at_most_together() -> None:
    with pytest.raises(ValueError, match=r"clip_fraction and mixit_fraction are 1\.25 together"):
        MixConfig(clip_fraction=0.75, mixit_fraction=0.5)
