"""Clips of tones, each with its own pitch: the spectrum of a mixture shows which clips it contains and how loud."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from engine.corpus.sources import read_sources
from engine.scoring.sharing import share_mixture
from engine.selection.thresholds import Thresholds
from engine.selection.tracks import select_tracks
from train.data.batch import Batch
from train.data.config import MixConfig
from train.data.items import Item, clean_items, track_items
from train.data.mixer import Mixer
from train.data.pools import Pool
from train.data.strategies.compose import mixer_class
from train.data.strategies.natural_targets import natural_items
from train.losses import clearsep_loss

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
    """Pitch of a label's clip; all pitches are bins of a 0.25 s spectrum."""
    return 400 + 600 * LABELS.index(label) + 40 * number


def tone(hz: float, *, duration_s: float = 1.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(duration_s * RATE_HZ)) / RATE_HZ)).astype(np.float32)


def tones(labels: Sequence[str] = LABELS, num: int = CLIPS_PER_LABEL) -> list[tuple[str, str, int, np.ndarray]]:
    return [(f"{label}-{i}", label, 1, tone(pitch_hz(label, i))) for label in labels for i in range(num)]


def contents(samples_T: torch.Tensor) -> dict[tuple[str, int], float]:
    """Clips in a segment, ``(label, number)``, and the RMS of each."""
    rms_F = np.abs(np.fft.rfft(samples_T.double().numpy())) * 2**0.5 / len(samples_T)
    step_hz = RATE_HZ / len(samples_T)
    found = {}
    for bin_number in np.flatnonzero(rms_F > 0.005):
        above_hz = round(bin_number * step_hz) - 400
        found[(LABELS[above_hz // 600], above_hz % 600 // 40)] = float(rms_F[bin_number])
    return found


CLIPS = {  # sources of natural recordings; their pitches lie above those of the clean clips
    **{f"clip{i}": ((label, 8), (LABELS[(i + 1) % len(LABELS)], 9)) for i, label in enumerate(LABELS)},
    "trio": (("train", 10), ("bell", 11), ("rain", 12)),
}


def config(**changes: object) -> MixConfig:
    return MixConfig(**{"batch_size": 4, "segment_s": 0.25, "augment": False, "silence_rate": 0.0, **changes})


def pool(
    items: Sequence[Item],
    mix: MixConfig,
    *,
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    device: torch.device | None = None,
) -> Pool:
    return Pool(items, mix, sample_rate_hz=RATE_HZ, seed=seed, rank=rank, num_ranks=num_ranks, device=device)


def mixer(
    clean: Sequence[Item],
    mix: MixConfig,
    *,
    tracks: Sequence[Item] = (),
    natural: Sequence[Item] = (),
    pairs: Sequence[Item] = (),
    absent: Sequence[Item] = (),
    seed: int = 0,
    rank: int = 0,
    num_ranks: int = 1,
    device: torch.device | None = None,
    vectors_LE: np.ndarray | None = None,
) -> Mixer:
    items = {"clean": clean, "tracks": tracks, "natural": natural, "pairs": pairs, "absent": absent}
    pools = {
        name: pool(some, mix, seed=seed, rank=rank, num_ranks=num_ranks, device=device) for name, some in items.items()
    }
    labels = sorted({label for some in items.values() for item in some for label in item.labels})
    kind, rest = mixer_class(mix), {"vectors_LE": vectors_LE, "device": device}
    return kind(pools, labels, mix, sample_rate_hz=RATE_HZ, seed=seed, rank=rank, **rest)


def sounds(pool: Pool) -> set[str]:
    return {Path(sound.item.clip).stem for group in pool.by_label.values() for sound in group}


def raw(batch: Batch) -> tuple[bytes, bytes, bytes, list[int], list[int]]:
    signals = (tensor.numpy().tobytes() for tensor in (batch.mix_BT, batch.target_GT, batch.weight_G))
    return *signals, batch.index_B.tolist(), batch.group_B.tolist()


def mixtures(made: Mixer, num_steps: int) -> list[tuple[torch.Tensor, torch.Tensor, str]]:
    """Mixture, target and query of every row of some steps; every group has one query."""
    batches = [made.batch(step) for step in range(num_steps)]
    assert all(batch.group_B.tolist() == list(range(made.config.batch_size)) for batch in batches)
    return [
        (mix_T, target_T, made.labels[int(index)])
        for batch in batches
        for mix_T, target_T, index in zip(batch.mix_BT, batch.target_GT, batch.index_B, strict=True)
    ]


@pytest.fixture
def clean(write_sources: Write) -> list[Item]:
    return clean_items(read_sources(write_sources(tones())), sample_rate_hz=RATE_HZ, max_s=1.0)


def burst(hz: float, *, at_s: float, length_s: float, duration_s: float = 2.0) -> np.ndarray:
    """Digital silence with a tone at one position."""
    clip_T = np.zeros(round(duration_s * RATE_HZ), np.float32)
    sound_T = tone(hz, duration_s=length_s)
    first = round(at_s * RATE_HZ)
    clip_T[first : first + len(sound_T)] = sound_T
    return clip_T


@pytest.fixture(params=[False, True], ids=["stems", "shares"])
def tracks(write_pass: Write, tmp_path: Path, request: pytest.FixtureRequest) -> list[Item]:
    """Two tracks of each of six clips, of neighbouring labels; their pitches lie above those of the clean clips."""
    stems = []
    for number in range(6):
        for offset in (0, 1):
            label = LABELS[(number + offset) % 6]
            stems.append((f"clip{number}", label, tone(pitch_hz(label, 8 + offset)), SCORES))
    select_tracks(write_pass(stems) / "stems", tmp_path / "tracks", Thresholds())
    return track_items(tmp_path / "tracks", sample_rate_hz=RATE_HZ, share=request.param)


def together(rows: list[tuple[torch.Tensor, torch.Tensor, str]]) -> int:
    """Number of mixtures with two tracks of one clip."""
    num = 0
    for mix_T, *_ in rows:
        clips = [(LABELS.index(label) - (number - 8)) % 6 for label, number in contents(mix_T) if number >= 8]
        num += len(clips) != len(set(clips))
    return num


def named(contents_of: Iterable[tuple[str, int]]) -> list[set[str]]:
    """Labels of the clip of every sound in a mixture."""
    clips = {source: {label for label, _ in sources} for sources in CLIPS.values() for source in sources}
    return [clips.get((label, number), {label}) for label, number in contents_of]


def exact(num_samples: int, *, seed: int) -> np.ndarray:
    """Noise that 24 bits represent exactly."""
    noise_T = np.random.default_rng(seed).uniform(-1, 1, num_samples)
    return np.round(noise_T * 2**20).astype(np.float32) / 2**20


@dataclass(frozen=True)
class Natural:
    """A selection with clips of every kind; all are noise, and no mixture is the sum of its stems."""

    tracks: Path
    stems: dict[tuple[str, str], np.ndarray]
    mixtures: dict[str, np.ndarray]

    def shares(self, clip: str) -> dict[str, np.ndarray]:
        """Parts of a clip by label, straight from :func:`share_mixture`."""
        stems = {label: samples_T for (of, label), samples_T in self.stems.items() if of == clip}
        mixture_T = torch.from_numpy(self.mixtures[clip])
        stems_ST = torch.from_numpy(np.stack(list(stems.values())))
        shared_ST = share_mixture(mixture_T=mixture_T, stems_ST=stems_ST, sample_rate_hz=RATE_HZ)
        return dict(zip(stems, shared_ST.numpy(), strict=True))


KINDS = {  # labels of a clip, and its stems: True if the filter keeps the stem
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
    select_tracks(folder / "stems", tmp_path / "tracks", Thresholds(min_stem_level_db=-20.0))
    return Natural(tmp_path / "tracks", audio, mixtures)


def kept_tracks() -> list[tuple[str, str]]:
    return [(clip, label) for clip, (_, stems) in KINDS.items() for label, good in stems.items() if good]


Group = tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]


@pytest.fixture
def recordings(write_pass: Write, tmp_path: Path) -> dict[str, list[Item]]:
    """Tracks and whole clips of seven recordings; every source has its own pitch."""
    stems = [(clip, label, tone(pitch_hz(label, i)), SCORES) for clip, sources in CLIPS.items() for label, i in sources]
    tracks = tmp_path / "recordings" / "tracks"
    select_tracks(write_pass(stems, folder="recordings/pass") / "stems", tracks, Thresholds())
    return {
        "tracks": track_items(tracks, sample_rate_hz=RATE_HZ),
        "natural": natural_items(tracks, sample_rate_hz=RATE_HZ),
    }


def groups(made: Mixer, num_steps: int) -> list[Group]:
    """Mixture, target and queries of every group of some steps; the queries of a group are of one mixture."""
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


def batch_of(mix_GT: torch.Tensor, target_GT: torch.Tensor, group_B: Sequence[int]) -> Batch:
    """One group for each mixture, all of the same weight."""
    groups_B = torch.tensor(group_B)
    return Batch(
        mix_BT=mix_GT[groups_B],
        index_B=torch.arange(len(groups_B)) % 2,
        group_B=groups_B,
        target_GT=target_GT,
        weight_G=torch.ones(len(target_GT)),
        mixture_G=torch.arange(len(target_GT)),
        is_complete_G=torch.zeros(len(target_GT), dtype=torch.bool),
        rivals=torch.zeros(len(groups_B), 2),
    )


def split(batch: Batch, *, seed: int) -> torch.Tensor:
    """Stems of noise that add up to the target of their group."""
    stems_BT = 0.1 * torch.randn(batch.mix_BT.shape, generator=torch.Generator().manual_seed(seed))
    summed_GT, _ = batch.regroup(stems_BT)
    first_G = [batch.group_B.tolist().index(group) for group in range(len(batch.target_GT))]
    stems_BT[first_G] += batch.target_GT - summed_GT
    return stems_BT


def loss_db(batch: Batch, stems_BT: torch.Tensor) -> float:
    estimate_GT, mix_GT = batch.regroup(stems_BT)
    return float(clearsep_loss(estimate=estimate_GT, reference=batch.target_GT, mixture=mix_GT))


def tone_item(
    label: str, number: int, *, labels_present: tuple[str, ...] = (), estimate_db: float | None = None
) -> Item:
    """A tone as a track of a clip of its own, whose labels are also ``labels_present``."""
    return Item(
        labels=(label,),
        labels_present=frozenset((label, *labels_present)),
        clip=f"{label}-{number}",
        duration_s=1.0,
        load=lambda: tone(pitch_hz(label, number)),
        estimated_si_sdr_db=estimate_db,
    )


def gain_at(whole_T: np.ndarray, crop_T: torch.Tensor, first: int) -> float:
    """Gain of a crop that must equal the part of a signal from ``first`` on, up to that gain."""
    part_T, crop_T = whole_T[first : first + len(crop_T)].astype(np.float64), crop_T.double().numpy()
    gain = float(crop_T @ part_T / (part_T @ part_T))
    np.testing.assert_allclose(crop_T, gain * part_T, atol=1e-6)
    return gain


def pair_item(label: str, gain: float, *, labels_present: tuple[str, ...] = (), at: slice = slice(None)) -> Item:
    """A clip of noise and, as its track, a section of it."""

    def load() -> np.ndarray:
        clip_T = np.random.default_rng(0).normal(0.0, 0.1, 16000).astype(np.float32)
        track_T = np.zeros_like(clip_T)
        track_T[at] = gain * clip_T[at]
        return np.stack([track_T, clip_T])

    names = frozenset((label, *labels_present))
    return Item(labels=(label,), labels_present=names, clip=f"pair-{label}", duration_s=4.0, load=load)


def groups_of(batch: Batch, mixture: int, labels: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]]]:
    return [
        (group, tuple(labels[int(i)] for i in batch.index_B[batch.group_B == group]))
        for group in torch.nonzero(batch.mixture_G == mixture).flatten().tolist()
    ]


NUM_SAMPLES = 4000


def sine(cycles: int, power: float = 1.0) -> torch.Tensor:
    """A sine [T] of mean power ``power`` and whole cycles: sines of different cycles are orthogonal."""
    phase_T = 2 * math.pi * cycles * torch.arange(NUM_SAMPLES, dtype=torch.float64) / NUM_SAMPLES
    return ((2 * power) ** 0.5 * phase_T.sin()).float()


SINES = {"a": sine(50), "b": sine(60, 0.5), "c": sine(70, 2.0), "d": sine(80)}
RIGHT = "cabcd"  # the stems that answer the queries of two_clips


def two_clips(*, weight: float = 1.0, is_complete: bool = True) -> Batch:
    """A remix of a and c whose query is c alone, and a clip of a and b with a clip of c and d."""
    remix, first, second = SINES["a"] + SINES["c"], SINES["a"] + SINES["b"], SINES["c"] + SINES["d"]
    weight_G = torch.tensor([weight, 1.0, 1.0])
    return Batch(
        mix_BT=torch.stack([remix, *[first + second] * 4]),
        index_B=torch.tensor([2, 0, 1, 2, 3]),
        group_B=torch.tensor([0, 1, 1, 2, 2]),
        target_GT=torch.stack([SINES["c"], first, second]),
        weight_G=weight_G / weight_G.mean(),
        mixture_G=torch.tensor([0, 1, 1]),
        is_complete_G=torch.tensor([False, is_complete, is_complete]),
        rivals=torch.zeros(5, 4),
    )


def stems(names: str) -> torch.Tensor:
    """Stems [B, T] that are sines."""
    return torch.stack([SINES[name] for name in names])
