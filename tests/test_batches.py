"""Training mixtures: what is in them, how often, and that a step alone decides them.

Every clip is a tone of its own pitch, so the spectrum of a mixture tells which clips are in it and how loud.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from engine.filter import Thresholds
from engine.shards import write_tracks
from train.batches import Batch, Item, MixConfig, Mixer, Pool, clean_items, natural_items, track_items
from train.losses import clearsep_loss
from train.refine import share_mixture

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


CLIPS = {  # natural recordings: what sounds in them, above the pitches of the clean clips
    **{f"clip{i}": ((label, 8), (LABELS[(i + 1) % len(LABELS)], 9)) for i, label in enumerate(LABELS)},
    "trio": (("train", 10), ("bell", 11), ("rain", 12)),
}


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


@pytest.fixture(params=[False, True], ids=["stems", "shares"])
def tracks(write_pass: Write, tmp_path: Path, request: pytest.FixtureRequest) -> list[Item]:
    """Two tracks of each of six clips, of neighbouring labels; their pitches lie above those of the clean clips."""
    stems = []
    for number in range(6):
        for offset in (0, 1):
            label = LABELS[(number + offset) % 6]
            stems.append((f"clip{number}", label, tone(pitch_hz(label, 8 + offset)), SCORES))
    write_tracks(write_pass(stems) / "stems", tmp_path / "tracks", Thresholds())
    return track_items(tmp_path / "tracks", sample_rate_hz=RATE_HZ, share=request.param)


@pytest.mark.parametrize(("clean_fraction", "tolerance"), [(0.0, 0.0), (0.3, 0.07), (0.5, 0.07), (1.0, 0.0)])
def test_share_of_clean_clips(clean: list[Item], tracks: list[Item], clean_fraction: float, tolerance: float) -> None:
    """Of two sources: for a third there may be no track whose clip names nothing of the others', and a clean one is."""
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


def named(contents_of: Iterable[tuple[str, int]]) -> list[set[str]]:
    """What the clip of every sound in a mixture names."""
    clips = {source: {label for label, _ in sources} for sources in CLIPS.values() for source in sources}
    return [clips.get((label, number), {label}) for label, number in contents_of]


def test_sounds_of_a_mixture_are_of_clips_that_name_nothing_in_common(clean: list[Item], tracks: list[Item]) -> None:
    """What leaked into a track from the rest of its clip is then of no other source and of no silent query."""
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


def exact(num_samples: int, *, seed: int) -> np.ndarray:
    """Noise that 24 bits hold exactly."""
    noise_T = np.random.default_rng(seed).uniform(-1, 1, num_samples)
    return np.round(noise_T * 2**20).astype(np.float32) / 2**20


@pytest.mark.parametrize("share", [False, True])
def test_tracks_of_single_stems_load_exactly_what_was_stored(write_pass: Write, tmp_path: Path, share: bool) -> None:
    audio = [exact(500 + i, seed=i) for i in range(20)]
    stems = [
        (f"clip{i}", LABELS[i % 3], samples_T, SCORES | {"stem_level_db": -30.0 if i % 5 == 4 else -3.0})
        for i, samples_T in enumerate(audio)
    ]
    write_tracks(write_pass(stems) / "stems", tmp_path / "tracks", Thresholds(min_stem_level_db=-20.0))
    items = track_items(tmp_path / "tracks", sample_rate_hz=RATE_HZ, share=share)
    assert [(item.clip, item.labels) for item in items] == [
        (f"clip{i}", (LABELS[i % 3],)) for i in range(20) if i % 5 != 4
    ]
    for item in items:
        wanted_T = audio[int(item.clip.removeprefix("clip"))]
        assert item.duration_s == pytest.approx(len(wanted_T) / RATE_HZ)
        assert np.array_equal(item.load(), wanted_T)


@dataclass(frozen=True)
class Natural:
    """A selection with clips of every kind: all noise, no mixture is the sum of its stems."""

    tracks: Path
    stems: dict[tuple[str, str], np.ndarray]
    mixtures: dict[str, np.ndarray]

    def shares(self, clip: str) -> dict[str, np.ndarray]:
        """By label, straight from ``train.refine``."""
        stems = {label: samples_T for (of, label), samples_T in self.stems.items() if of == clip}
        mixture_T = torch.from_numpy(self.mixtures[clip])
        stems_ST = torch.from_numpy(np.stack(list(stems.values())))
        shared_ST = share_mixture(mixture_T=mixture_T, stems_ST=stems_ST, sample_rate_hz=RATE_HZ)
        return dict(zip(stems, shared_ST.numpy(), strict=True))


KINDS = {  # labels of a clip, and the stems it has: whether each is kept
    "lone": (("dog",), {"dog": True}),
    "pair": (("wind", "bell"), {"wind": True, "bell": True}),
    "half": (("dog", "rain"), {"dog": False, "rain": True}),
    "lost": (("train", "siren", "dog"), {"train": True, "siren": True}),
    "trio": (("train", "bell", "rain"), {"train": True, "bell": False, "rain": True}),
    "none": (("bell", "dog"), {"bell": False, "dog": False}),
    "stub": (("rain", "bell"), {"bell": True}),
}


@pytest.fixture
def natural(write_pass: Write, tmp_path: Path) -> Natural:
    labels = {clip: names for clip, (names, _) in KINDS.items()}
    num_samples = {clip: 6000 + 100 * i for i, clip in enumerate(KINDS)}
    mixtures = {clip: exact(num_samples[clip], seed=i) for i, clip in enumerate(KINDS)}
    audio, rows = {}, []
    for clip, (_, kept) in KINDS.items():
        for label, good in kept.items():
            audio[clip, label] = exact(num_samples[clip], seed=100 + len(audio))
            rows.append((clip, label, audio[clip, label], SCORES | {"stem_level_db": -3.0 if good else -30.0}))
    folder = write_pass(rows, mixtures=mixtures, labels=labels)
    write_tracks(folder / "stems", tmp_path / "tracks", Thresholds(min_stem_level_db=-20.0))
    return Natural(tmp_path / "tracks", audio, mixtures)


def kept_tracks() -> list[tuple[str, str]]:
    return [(clip, label) for clip, (_, stems) in KINDS.items() for label, good in stems.items() if good]


def test_bare_tracks_load_exactly_the_stored_stems_of_every_kind_of_clip(natural: Natural) -> None:
    items = track_items(natural.tracks, sample_rate_hz=RATE_HZ, share=False)
    assert [(item.clip, *item.labels) for item in items] == kept_tracks()
    for item in items:
        assert np.array_equal(item.load(), natural.stems[item.clip, item.labels[0]])


def test_shared_tracks_are_what_refining_the_stored_clip_gives(natural: Natural) -> None:
    """Of all stems of the clip, the rejected ones too; a clip with a label without a stem is left as it is."""
    items = track_items(natural.tracks, sample_rate_hz=RATE_HZ)
    assert [(item.clip, *item.labels) for item in items] == kept_tracks()
    for item in items:
        (label,), loaded_T = item.labels, item.load()
        stored_T = natural.stems[item.clip, label]
        assert loaded_T.dtype == np.float32
        assert item.duration_s == pytest.approx(len(loaded_T) / RATE_HZ)
        if item.clip in ("pair", "half", "trio"):
            assert np.array_equal(loaded_T, natural.shares(item.clip)[label])
            assert np.abs(loaded_T - stored_T).max() > 0.1
        else:
            assert np.array_equal(loaded_T, stored_T)


def test_shared_tracks_of_a_clip_add_up_to_it(natural: Natural) -> None:
    items = track_items(natural.tracks, sample_rate_hz=RATE_HZ, share=True)
    shares = [item.load() for item in items if item.clip == "pair"]
    assert len(shares) == 2
    assert np.abs(np.sum(shares, axis=0) - natural.mixtures["pair"]).max() < 1e-5


def test_natural_items_are_the_whole_clips_of_which_every_label_has_a_stem_and_one_was_kept(natural: Natural) -> None:
    items = natural_items(natural.tracks, sample_rate_hz=RATE_HZ)
    assert [(item.clip, item.labels) for item in items] == [(clip, KINDS[clip][0]) for clip in ("pair", "half", "trio")]
    for item in items:
        loaded_T = item.load()
        assert loaded_T.dtype == np.float32
        assert np.array_equal(loaded_T, natural.mixtures[item.clip])
        assert item.duration_s == pytest.approx(len(loaded_T) / RATE_HZ)


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


# Natural clips as targets.

Group = tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]


@pytest.fixture
def recordings(write_pass: Write, tmp_path: Path) -> dict[str, list[Item]]:
    """Tracks and whole clips of seven recordings whose every source has a pitch of its own."""
    stems = [(clip, label, tone(pitch_hz(label, i)), SCORES) for clip, sources in CLIPS.items() for label, i in sources]
    write_tracks(write_pass(stems) / "stems", tmp_path / "tracks", Thresholds())
    return {
        "tracks": track_items(tmp_path / "tracks", sample_rate_hz=RATE_HZ),
        "natural": natural_items(tmp_path / "tracks", sample_rate_hz=RATE_HZ),
    }


def groups(made: Mixer, num_steps: int) -> list[Group]:
    """Mixture, target and queries of every group of some steps; its queries are asked of one mixture."""
    found = []
    for step in range(num_steps):
        batch = made.batch(step)
        num_groups = made.config.batch_size
        assert batch.group_B.unique().tolist() == list(range(num_groups))
        assert len(batch.mix_BT) == len(batch.index_B) == len(batch.group_B)
        assert len(batch.target_GT) == num_groups
        for group, target_T in enumerate(batch.target_GT):
            is_of_group_B = batch.group_B == group
            mix_T, *others = batch.mix_BT[is_of_group_B]
            assert all(torch.equal(mix_T, other_T) for other_T in others)
            found.append((mix_T, target_T, tuple(made.labels[int(i)] for i in batch.index_B[is_of_group_B])))
    return found


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


# Groups.


def test_regroup_adds_up_the_stems_of_a_group_and_gives_its_mixture() -> None:
    """The groups are not in order and not of one size; every stem gets its gradient."""
    mix_GT, group_B = torch.randn(3, 50), torch.tensor([1, 0, 2, 1, 1, 0])
    batch = Batch(
        mix_BT=mix_GT[group_B], index_B=torch.tensor([0, 1, 2, 3, 4, 5]), group_B=group_B, target_GT=torch.randn(3, 50)
    )
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


def split(batch: Batch, *, seed: int) -> torch.Tensor:
    """Stems that are noise, but add up to the target of their group."""
    stems_BT = 0.1 * torch.randn(batch.mix_BT.shape, generator=torch.Generator().manual_seed(seed))
    summed_GT, _ = batch.regroup(stems_BT)
    first_G = [batch.group_B.tolist().index(group) for group in range(len(batch.target_GT))]
    stems_BT[first_G] += batch.target_GT - summed_GT
    return stems_BT


def loss_db(batch: Batch, stems_BT: torch.Tensor) -> float:
    estimate_GT, mix_GT = batch.regroup(stems_BT)
    return float(clearsep_loss(estimate=estimate_GT, reference=batch.target_GT, mixture=mix_GT))


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
