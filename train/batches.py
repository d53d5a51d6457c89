"""Training batches made on the fly: single-source sounds of different clips, cropped where they are active and remixed.

A batch is a function of the config's seed, the rank and the step alone, so a resumed training sees what an undisturbed
one would have seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchaudio
from torch import Tensor

from engine.audio import AudioError, active_mask, active_rms, decode, probe
from engine.corpus import read_sources
from engine.shards import read_audio, read_tracks

_SPEEDS = ((1, 1), (4, 5), (9, 10), (10, 9), (5, 4))
_WINDOW_S = 0.1


@dataclass(frozen=True, kw_only=True)
class MixConfig:
    """How training mixtures are made."""

    batch_size: int = 16
    """Mixtures in a step, on each worker."""
    segment_s: float = 2.0
    """Length of a training mixture."""
    three_source_fraction: float = 0.25
    """Share of mixtures of three sources; the rest have two."""
    gain_db: float = 5.0
    """Sources are brought to equal level and then moved by up to this, up or down."""
    silence_rate: float = 0.05
    """Share of mixtures whose query names a sound that is not in them and whose target is silence (ClearSep)."""
    clean_fraction: float = 0.5
    """Share of sources drawn from single-source clips where there are tracks too."""
    augment: bool = True
    """Change speed (and pitch) by up to a quarter and colour the spectrum by some dB."""
    eq_db: float = 3.0
    """Standard deviation of the random colouring."""
    pool_s: float = 7200.0
    """Audio held in memory by a worker, for tracks and for clean clips each; beyond it the pool rotates."""
    refresh_steps: int = 200
    """Steps after which a pool that does not hold everything is filled anew."""

    def __post_init__(self) -> None:
        for name in ("three_source_fraction", "silence_rate", "clean_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share from 0 to 1")
        for name in ("batch_size", "segment_s", "pool_s", "refresh_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A sound that can be loaded: its label, where it came from and how long it is."""

    label: str
    clip: str
    duration_s: float
    load: Callable[[], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A loaded sound with the windows in which it is active."""

    label: str
    clip: str
    samples_T: np.ndarray
    active: np.ndarray


def clean_items(
    path: str | Path, *, folds: Sequence[int] | None, sample_rate_hz: int, max_s: float = 30.0
) -> list[Item]:
    """Single-source clips of a CSV ``path,label[,fold]``; only the first ``max_s`` seconds of each are used.

    A clip whose header cannot be read is an item all the same: the pool counts it as unusable.
    """

    def item(source: str, label: str) -> Item:
        try:
            duration_s = min(probe(source).duration_s, max_s)
        except (AudioError, OSError):
            duration_s = 0.0
        load = functools.partial(decode, source, sample_rate_hz=sample_rate_hz, duration_s=max_s)
        return Item(label=label, clip=source, duration_s=duration_s, load=load)

    return [item(row["path"], row["label"]) for row in read_sources(path, folds=folds).to_pylist()]


def track_items(tracks: str | Path, *, sample_rate_hz: int) -> list[Item]:
    """The tracks of a selection; ``ValueError`` if they are of another rate."""
    index, stems = read_tracks(tracks)

    def loader(shard: str, row: int) -> Callable[[], np.ndarray]:
        return lambda: read_audio(stems, shard, [row])[0]

    items = []
    for row in index.select(["shard", "row", "clip_id", "label", "sample_rate_hz", "num_samples"]).to_pylist():
        if row["sample_rate_hz"] != sample_rate_hz:
            raise ValueError(
                f"tracks in {tracks} are at {row['sample_rate_hz']} Hz, the separator wants {sample_rate_hz}"
            )
        duration_s = row["num_samples"] / sample_rate_hz
        load = loader(row["shard"], row["row"])
        items.append(Item(label=row["label"], clip=row["clip_id"], duration_s=duration_s, load=load))
    return items


class Pool:
    """The sounds in memory, by label; everything where it fits, else a part that rotates."""

    def __init__(
        self,
        items: Sequence[Item],
        config: MixConfig,
        *,
        sample_rate_hz: int,
        seed: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        self.config, self.sample_rate_hz = config, sample_rate_hz
        self.rotates = sum(item.duration_s for item in items) > config.pool_s
        order = [items[i] for i in np.random.default_rng([seed, 1]).permutation(len(items))]
        self.items = _label_by_label(order[rank::num_ranks] if self.rotates else order)
        self.turn = -1
        self.by_label: dict[str, list[Sound]] = {}
        self.unusable: set[str] = set()

    def prepare(self, step: int) -> None:
        """Hold what belongs to a step."""
        turn = step // self.config.refresh_steps if self.rotates else 0
        if turn != self.turn and self.items:
            self.turn, self.by_label = turn, {}
            for item in self._part(turn):
                self._add(item)

    def _part(self, turn: int) -> list[Item]:
        if not self.rotates:
            return self.items
        mean_s = sum(item.duration_s for item in self.items) / len(self.items)
        size = max(1, int(self.config.pool_s / mean_s))
        return [self.items[i % len(self.items)] for i in range(turn * size, turn * size + min(size, len(self.items)))]

    def _add(self, item: Item) -> None:
        try:
            samples_T = item.load()
        except (ValueError, OSError):
            self.unusable.add(item.clip)
            return
        active = np.flatnonzero(active_mask(samples_T, sample_rate_hz=self.sample_rate_hz, window_s=_WINDOW_S))
        if not len(active):
            self.unusable.add(item.clip)
            return
        sound = Sound(label=item.label, clip=item.clip, samples_T=samples_T, active=active)
        self.by_label.setdefault(item.label, []).append(sound)


def _label_by_label(items: Sequence[Item]) -> list[Item]:
    """The same items with the labels taking turns, so that any part of a rotating pool holds as many as it can."""
    seen: dict[str, int] = {}
    turns = []
    for item in items:
        turns.append(seen.get(item.label, 0))
        seen[item.label] = turns[-1] + 1
    return [items[i] for i in sorted(range(len(items)), key=lambda i: turns[i])]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Mixtures ``[B, T]``, the target of each and its query's row in the vocabulary ``[B]``."""

    mix_BT: Tensor
    target_BT: Tensor
    index_B: Tensor


class Mixer:
    """Draws training mixtures from the clean pool and the pool of tracks."""

    def __init__(
        self, clean: Pool, tracks: Pool, labels: Sequence[str], config: MixConfig, *, seed: int, rank: int
    ) -> None:
        self.clean, self.tracks, self.labels, self.config = clean, tracks, tuple(labels), config
        self.seed, self.rank, self.sample_rate_hz = seed, rank, clean.sample_rate_hz
        self.num_samples = round(config.segment_s * clean.sample_rate_hz)
        self.resample = {pair: torchaudio.transforms.Resample(*pair) for pair in _SPEEDS[1:]}

    def batch(self, step: int) -> Batch:
        """The batch of a step; ``ValueError`` when there are fewer than two labels to mix."""
        self.clean.prepare(step)
        self.tracks.prepare(step)
        rng = np.random.default_rng([self.seed, 2, self.rank, step])
        rows = [self._mixture(rng) for _ in range(self.config.batch_size)]
        mixes, targets, indices = zip(*rows, strict=True)
        return Batch(
            mix_BT=torch.from_numpy(np.stack(mixes)),
            target_BT=torch.from_numpy(np.stack(targets)),
            index_B=torch.tensor(indices, dtype=torch.long),
        )

    def _mixture(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        present = [label for label in self.labels if label in self.clean.by_label or label in self.tracks.by_label]
        if len(present) < 2:
            raise ValueError(
                f"training needs readable sounds of two labels at least, found {present}; give more clips or tracks"
            )
        num_sources = 3 if len(present) > 2 and rng.random() < self.config.three_source_fraction else 2
        order = [present[i] for i in rng.permutation(len(present))]
        sources: list[np.ndarray] = []
        clips: set[str] = set()
        for label in order[:num_sources]:
            sound = self._draw(rng, label, clips)
            clips.add(sound.clip)
            sources.append(self._segment(rng, sound))
        mix_T: np.ndarray = np.stack(sources).sum(axis=0, dtype=np.float32)
        absent = [label for label in self.labels if label not in order[:num_sources]]
        if absent and rng.random() < self.config.silence_rate:
            return mix_T, np.zeros_like(mix_T), self.labels.index(absent[rng.integers(len(absent))])
        return mix_T, sources[0], self.labels.index(order[0])

    def _draw(self, rng: np.random.Generator, label: str, clips: set[str]) -> Sound:
        """A sound of a label, of another clip than those in the mixture where there is one."""
        clean, tracks = self.clean.by_label.get(label, []), self.tracks.by_label.get(label, [])
        share = self.config.clean_fraction
        pools = [clean, tracks] if rng.random() < share else [tracks, clean]
        mixed = pools if 0.0 < share < 1.0 else pools[:1]
        others = [[sound for sound in pool if sound.clip not in clips] for pool in mixed]
        pool = next(pool for pool in (*others, *pools) if pool)
        return pool[rng.integers(len(pool))]

    def _segment(self, rng: np.random.Generator, sound: Sound) -> np.ndarray:
        """A crop ``[T]`` around an active moment, augmented, at the level that its mixture gives it."""
        up, down = _SPEEDS[rng.integers(len(_SPEEDS))] if self.config.augment else (1, 1)
        wanted = -(-self.num_samples * up // down) + 1
        window = round(_WINDOW_S * self.sample_rate_hz)
        active = int(sound.active[rng.integers(len(sound.active))]) * window
        first = active - int(rng.integers(max(1, wanted - window)))  # the active window lies wholly in the crop
        first = max(0, min(first, len(sound.samples_T) - wanted))
        crop = torch.from_numpy(sound.samples_T[first : first + wanted].copy())
        if up != down:
            crop = self.resample[up, down](crop)
        crop = torch.nn.functional.pad(crop, (0, max(0, self.num_samples - len(crop))))[: self.num_samples]
        samples_T = self._colour(rng, crop.numpy())
        level = active_rms(samples_T, sample_rate_hz=self.sample_rate_hz)
        gain_db = rng.uniform(-self.config.gain_db, self.config.gain_db)
        levelled_T: np.ndarray = samples_T * (0.1 * 10.0 ** (gain_db / 20.0) / max(level, 1e-8))
        return levelled_T.astype(np.float32)

    def _colour(self, rng: np.random.Generator, samples_T: np.ndarray) -> np.ndarray:
        if not self.config.augment:
            return samples_T
        spectrum = torch.fft.rfft(torch.from_numpy(samples_T))
        knots_db = rng.normal(0.0, self.config.eq_db, 8)
        curve_db = np.interp(np.linspace(0.0, 7.0, len(spectrum)), np.arange(8), knots_db).astype(np.float32)
        gains = torch.from_numpy(10.0 ** (curve_db / 20.0))
        coloured: np.ndarray = torch.fft.irfft(spectrum * gains, len(samples_T)).numpy()
        return coloured
