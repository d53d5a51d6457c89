"""Training mixtures: what is in them, how often, and that a step alone decides them.

Every clip is a tone of its own pitch, so the spectrum of a mixture tells which clips are in it and how loud.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.filter import Thresholds
from engine.shards import write_tracks
from train.batches import Batch, Item, MixConfig, Mixer, Pool, clean_items, track_items

RATE_HZ = 8000
LABELS = ("bell", "dog", "rain", "siren", "train", "wind")
CLIPS_PER_LABEL = 4
SCORES = {
    "re_sdr_db": 20.0,
    "re_si_sdr_db": 20.0,
    "remix_snr_db": 20.0,
    "stem_level_db": -3.0,
    "coherence_fraction": None,
}
Write = Callable[..., Path]


def pitch_hz(label: str, number: int) -> int:
    """The tone of a label's clip; all fall on bins of a 0.25 s spectrum."""
    return 400 + 600 * LABELS.index(label) + 40 * number


def tone(hz: float, *, duration_s: float = 1.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(duration_s * RATE_HZ)) / RATE_HZ)).astype(np.float32)


def tones(labels: Sequence[str] = LABELS, num: int = CLIPS_PER_LABEL) -> list[tuple[str, str, int, np.ndarray]]:
    return [(f"{label}-{i}", label, 1, tone(pitch_hz(label, i))) for label in labels for i in range(num)]


def contents(samples_T: torch.Tensor) -> dict[tuple[str, int], float]:
    """Which clips sound in a segment, ``(label, number)``, and the RMS of each."""
    rms_F = np.abs(np.fft.rfft(samples_T.double().numpy())) * 2**0.5 / len(samples_T)
    step_hz = RATE_HZ / len(samples_T)
    found = {}
    for bin_number in np.flatnonzero(rms_F > 0.005):
        above_hz = round(bin_number * step_hz) - 400
        found[(LABELS[above_hz // 600], above_hz % 600 // 40)] = float(rms_F[bin_number])
    return found


def config(**changes: object) -> MixConfig:
    return MixConfig(**{"batch_size": 4, "segment_s": 0.25, "augment": False, "silence_rate": 0.0, **changes})


def pool(items: Sequence[Item], mix: MixConfig, *, seed: int = 0, rank: int = 0, num_ranks: int = 1) -> Pool:
    return Pool(items, mix, sample_rate_hz=RATE_HZ, seed=seed, rank=rank, num_ranks=num_ranks)


def mixer(
    clean: Sequence[Item],
    mix: MixConfig,
    *,
    tracks: Sequence[Item] = (),
    natural: Sequence[Item] = (),
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
) -> Mixer:
    items = {"clean": clean, "tracks": tracks, "natural": natural}
    pools = {name: pool(some, mix, seed=seed, rank=rank, num_ranks=num_ranks) for name, some in items.items()}
    labels = sorted({label for some in items.values() for item in some for label in item.labels})
    return Mixer(pools, labels, mix, sample_rate_hz=RATE_HZ, seed=seed, rank=rank)


def sounds(held: Pool) -> set[str]:
    return {Path(sound.clip).stem for group in held.by_label.values() for sound in group}


def raw(batch: Batch) -> tuple[bytes, bytes, list[int], list[int]]:
    signals = batch.mix_BT.numpy().tobytes(), batch.target_GT.numpy().tobytes()
    return *signals, batch.index_B.tolist(), batch.group_B.tolist()


def mixtures(made: Mixer, num_steps: int) -> list[tuple[torch.Tensor, torch.Tensor, str]]:
    """Mixture, target and query of every row of some steps of single-label material: every group has one query."""
    batches = [made.batch(step) for step in range(num_steps)]
    assert all(batch.group_B.tolist() == list(range(made.config.batch_size)) for batch in batches)
    return [
        (mix_T, target_T, made.labels[int(index)])
        for batch in batches
        for mix_T, target_T, index in zip(batch.mix_BT, batch.target_GT, batch.index_B, strict=True)
    ]


@pytest.fixture
def clean(write_sources: Write) -> list[Item]:
    return clean_items(write_sources(tones()), folds=None, sample_rate_hz=RATE_HZ, max_s=1.0)


# A batch is a function of seed, rank and step.


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


# What is in a mixture.


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


def test_every_label_is_asked_for_and_every_clip_is_used(clean: list[Item]) -> None:
    rows = mixtures(mixer(clean, config(batch_size=64)), 6)
    queries = [query for *_, query in rows]
    assert all(queries.count(label) / len(rows) == pytest.approx(1 / 6, abs=0.07) for label in LABELS)
    heard = {source for mix_T, *_ in rows for source in contents(mix_T)}
    assert heard == {(label, i) for label in LABELS for i in range(CLIPS_PER_LABEL)}


@pytest.mark.parametrize(("three_source_fraction", "tolerance"), [(0.0, 0.0), (0.4, 0.07), (1.0, 0.0)])
def test_share_of_three_sources(clean: list[Item], three_source_fraction: float, tolerance: float) -> None:
    rows = mixtures(mixer(clean, config(batch_size=64, three_source_fraction=three_source_fraction)), 9)
    share = np.mean([len(contents(mix_T)) == 3 for mix_T, *_ in rows])
    assert share == pytest.approx(three_source_fraction, abs=tolerance + 1e-9)


@pytest.mark.parametrize(("silence_rate", "tolerance"), [(0.0, 0.0), (0.05, 0.03), (0.3, 0.07), (1.0, 0.0)])
def test_share_of_silent_targets(clean: list[Item], silence_rate: float, tolerance: float) -> None:
    rows = mixtures(mixer(clean, config(batch_size=64, silence_rate=silence_rate)), 9)
    share = np.mean([not target_T.any() for _, target_T, _ in rows])
    assert share == pytest.approx(silence_rate, abs=tolerance + 1e-9)


def test_a_silent_target_asks_for_what_is_not_in_the_mixture(clean: list[Item]) -> None:
    asked = set()
    for mix_T, target_T, query in mixtures(mixer(clean, config(batch_size=32, silence_rate=1.0)), 3):
        assert not target_T.any()
        assert query not in {label for label, _ in contents(mix_T)}
        asked.add(query)
    assert asked == set(LABELS)


# Levels.


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
    items = clean_items(path, folds=None, sample_rate_hz=RATE_HZ)
    for mix_T, *_ in mixtures(mixer(items, config(gain_db=0.0)), 2):
        assert list(contents(mix_T).values()) == pytest.approx([0.1, 0.1], rel=1e-3)


def test_augmentation_keeps_level_and_moves_pitch(clean: list[Item]) -> None:
    """A tone sped up by 5/4 sounds a third higher; colouring changes no level over the active part."""
    pitches_hz = set()
    for _, target_T, _ in mixtures(mixer(clean[:8], config(augment=True, gain_db=0.0, batch_size=32)), 3):
        assert float(target_T.square().mean().sqrt()) == pytest.approx(0.1, rel=0.02)
        pitches_hz.add(round(int(torch.fft.rfft(target_T).abs().argmax()) * 4 / 20) * 20)
    assert len(pitches_hz) > 2 * 8


# Crops.


def burst(hz: float, *, at_s: float, length_s: float, duration_s: float = 2.0) -> np.ndarray:
    """Digital silence but for a tone somewhere."""
    clip_T = np.zeros(round(duration_s * RATE_HZ), np.float32)
    sound_T = tone(hz, duration_s=length_s)
    first = round(at_s * RATE_HZ)
    clip_T[first : first + len(sound_T)] = sound_T
    return clip_T


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
    items = clean_items(write_sources(clips), folds=None, sample_rate_hz=RATE_HZ)
    rows = mixtures(mixer(items, config(batch_size=64, augment=augment)), 4)
    assert sum(not target_T.any() for _, target_T, _ in rows) == 0


def test_a_sound_shorter_than_the_segment_is_padded(write_sources: Write) -> None:
    clips = [(label, label, 1, tone(pitch_hz(label, 0), duration_s=0.15)) for label in ("bell", "dog")]
    items = clean_items(write_sources(clips), folds=None, sample_rate_hz=RATE_HZ)
    for _, target_T, _ in mixtures(mixer(items, config()), 3):
        assert target_T.shape == (2000,)
        assert target_T[:1200].any()
        assert not target_T[1200:].any()


# Clean clips and tracks.


@pytest.fixture
def tracks(write_pass: Write, tmp_path: Path) -> list[Item]:
    """Two tracks of each of six clips, of neighbouring labels; their pitches lie above those of the clean clips."""
    stems = []
    for number in range(6):
        for offset in (0, 1):
            label = LABELS[(number + offset) % 6]
            stems.append((f"clip{number}", label, tone(pitch_hz(label, 8 + offset)), SCORES))
    write_tracks(write_pass(stems) / "stems", tmp_path / "tracks", Thresholds())
    return track_items(tmp_path / "tracks", sample_rate_hz=RATE_HZ)


@pytest.mark.parametrize(("clean_fraction", "tolerance"), [(0.0, 0.0), (0.3, 0.07), (0.5, 0.07), (1.0, 0.0)])
def test_share_of_clean_clips(clean: list[Item], tracks: list[Item], clean_fraction: float, tolerance: float) -> None:
    rows = mixtures(mixer(clean, config(batch_size=64, clean_fraction=clean_fraction), tracks=tracks), 5)
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


def together(rows: list[tuple[torch.Tensor, torch.Tensor, str]]) -> int:
    """How many mixtures hold two tracks of one clip."""
    num = 0
    for mix_T, *_ in rows:
        clips = [(LABELS.index(label) - (number - 8)) % 6 for label, number in contents(mix_T) if number >= 8]
        num += len(clips) != len(set(clips))
    return num


def test_tracks_of_one_clip_are_not_mixed_with_each_other(tracks: list[Item]) -> None:
    """That would be the natural recording again, where stems are not independent."""
    made = mixer([], config(batch_size=64, three_source_fraction=0.0), tracks=tracks)
    assert together(mixtures(made, 5)) == 0


def test_a_clean_clip_is_taken_before_a_second_track_of_one_clip(clean: list[Item], tracks: list[Item]) -> None:
    """Only one natural clip has tracks, so two tracks always share it; clean clips of every label are there."""
    one_clip = [item for item in tracks if item.clip == "clip0"]
    assert len(one_clip) == 2
    some_clean = [item for item in clean if item.labels[0] in ("bell", "dog")]
    made = mixer(some_clean, config(batch_size=64, clean_fraction=0.3), tracks=one_clip)
    assert together(mixtures(made, 3)) == 0


def test_track_items_load_exactly_what_was_stored(write_pass: Write, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    audio = [np.round(rng.uniform(-1, 1, 500 + i) * 2**20).astype(np.float32) / 2**20 for i in range(20)]
    stems = [
        (f"clip{i}", LABELS[i % 3], samples_T, SCORES | {"stem_level_db": -30.0 if i % 5 == 4 else -3.0})
        for i, samples_T in enumerate(audio)
    ]
    write_tracks(write_pass(stems) / "stems", tmp_path / "tracks", Thresholds(min_stem_level_db=-20.0))
    items = track_items(tmp_path / "tracks", sample_rate_hz=RATE_HZ)
    assert [(item.clip, item.label) for item in items] == [(f"clip{i}", LABELS[i % 3]) for i in range(20) if i % 5 != 4]
    for item in items:
        wanted_T = audio[int(item.clip.removeprefix("clip"))]
        assert item.duration_s == pytest.approx(len(wanted_T) / RATE_HZ)
        assert np.array_equal(item.load(), wanted_T)


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


# Pools that do not fit.


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


# What cannot be used.


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
    ],
)
def test_settings_out_of_range_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} is {value}"):
        MixConfig(**{name: value})
