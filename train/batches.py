"""Training batches made on the fly: single-source sounds of different clips, cropped where they are active and remixed.

A batch is a function of the config's seed, the rank and the step alone, so a resumed training sees what an undisturbed
one would have seen.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from torch import Tensor

from engine.audio import AudioError, active_mask, active_rms, decode, probe
from engine.corpus import read_sources
from engine.shards import read_audio, read_clip, read_tracks
from train.refine import share_mixture

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
    share_mixture: bool = True
    """Learn from tracks that divide their clip among its labels (``train/refine.py``), not from bare stems."""
    augment: bool = True
    """Change speed (and pitch) by up to a quarter and colour the spectrum by some dB."""
    natural_fraction: float = 0.0
    """Share of mixtures whose target is a whole natural clip: the stems of all its labels should add up to it."""
    eq_db: float = 3.0
    """Standard deviation of the random colouring."""
    pool_s: float = 7200.0
    """Audio held in memory by a worker, of clean clips, tracks and natural clips each; beyond it a pool rotates."""
    refresh_steps: int = 200
    """Steps after which a pool that does not hold everything is filled anew."""

    def __post_init__(self) -> None:
        for name in ("three_source_fraction", "silence_rate", "clean_fraction", "natural_fraction"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a share from 0 to 1")
        for name in ("batch_size", "segment_s", "pool_s", "refresh_steps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give a number above 0")


@dataclass(frozen=True, kw_only=True)
class Item:
    """A sound that can be loaded.

    ``labels`` are what it is, ``heard`` what its clip names: a track may hold some of every sound of its clip.
    """

    labels: tuple[str, ...]
    heard: frozenset[str]
    clip: str
    duration_s: float
    load: Callable[[], np.ndarray]


@dataclass(frozen=True, kw_only=True)
class Sound:
    """A loaded sound with the windows in which it is active."""

    labels: tuple[str, ...]
    heard: frozenset[str]
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
        return Item(labels=(label,), heard=frozenset([label]), clip=source, duration_s=duration_s, load=load)

    return [item(row["path"], row["label"]) for row in read_sources(path, folds=folds).to_pylist()]


def track_items(tracks: str | Path, *, sample_rate_hz: int, share: bool = True) -> list[Item]:
    """The tracks of a selection, shared out of their clips or as separated; ``ValueError`` if of another rate."""
    index, stems = read_tracks(tracks)
    items = []
    for row in index.to_pylist():
        if row["sample_rate_hz"] != sample_rate_hz:
            raise ValueError(
                f"tracks in {tracks} are at {row['sample_rate_hz']} Hz, the separator wants {sample_rate_hz}"
            )
        duration_s = row["num_samples"] / sample_rate_hz
        load = functools.partial(_load_track, stems, row, share)
        heard = frozenset(row["labels"])
        items.append(Item(labels=(row["label"],), heard=heard, clip=row["clip_id"], duration_s=duration_s, load=load))
    return items


def natural_items(tracks: str | Path, *, sample_rate_hz: int) -> list[Item]:
    """The whole clips of which a selection kept a stem, where every label of the clip has one: their truth is known."""
    index, stems = read_tracks(tracks)
    items: dict[str, Item] = {}
    for row in index.to_pylist():
        if row["num_stems"] == len(row["labels"]) >= 2:
            place = {"first_row": row["first_row"], "num_stems": row["num_stems"]}
            load = functools.partial(_load_clip, stems, row["shard"], **place)
            duration_s = row["num_samples"] / sample_rate_hz
            labels = tuple(row["labels"])
            items[row["clip_id"]] = Item(
                labels=labels, heard=frozenset(labels), clip=row["clip_id"], duration_s=duration_s, load=load
            )
    return list(items.values())


def _load_clip(stems: Path, shard: str, *, first_row: int, num_stems: int) -> np.ndarray:
    return read_clip(stems, shard, first_row=first_row, num_stems=num_stems)[0]


def _load_track(stems: Path, row: dict[str, Any], share: bool) -> np.ndarray:
    """A track as it was separated, or its share of the clip where every label of the clip has a stem."""
    if not share or row["num_stems"] < max(2, len(row["labels"])):
        return read_audio(stems, row["shard"], [row["row"]])[0]
    mixture_T, stems_ST = read_clip(stems, row["shard"], first_row=row["first_row"], num_stems=row["num_stems"])
    shared_ST = share_mixture(
        mixture_T=torch.from_numpy(mixture_T),
        stems_ST=torch.from_numpy(stems_ST),
        sample_rate_hz=row["sample_rate_hz"],
    )
    return shared_ST[row["row"] - row["first_row"]].numpy()


class Pool:
    """The sounds in memory, by first label; everything where it fits, else a part that rotates."""

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
        sound = Sound(labels=item.labels, heard=item.heard, clip=item.clip, samples_T=samples_T, active=active)
        self.by_label.setdefault(item.labels[0], []).append(sound)


def _label_by_label(items: Sequence[Item]) -> list[Item]:
    """The same items with the labels taking turns, so that any part of a rotating pool holds as many as it can."""
    seen: dict[str, int] = {}
    turns = []
    for item in items:
        turns.append(seen.get(item.labels[0], 0))
        seen[item.labels[0]] = turns[-1] + 1
    return [items[i] for i in sorted(range(len(items)), key=lambda i: turns[i])]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Queries ``[B]`` of mixtures ``[B, T]``; the stems of a group's queries add up to its target ``[G, T]``.

    Most groups have one query. A natural clip as a target has one for each of its labels.
    """

    mix_BT: Tensor
    index_B: Tensor
    group_B: Tensor
    target_GT: Tensor

    def regroup(self, stems_BT: Tensor) -> tuple[Tensor, Tensor]:
        """The stems added up by group, and the mixture of each group, both ``[G, T]``."""
        summed_GT = torch.zeros_like(self.target_GT).index_add(0, self.group_B, stems_BT)
        mix_GT = torch.zeros_like(self.target_GT).index_copy(0, self.group_B, self.mix_BT)
        return summed_GT, mix_GT

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


class Mixer:
    """Draws training mixtures from single-source clips, tracks and natural clips."""

    def __init__(
        self,
        pools: dict[str, Pool],
        labels: Sequence[str],
        config: MixConfig,
        *,
        sample_rate_hz: int,
        seed: int,
        rank: int,
    ) -> None:
        self.clean, self.tracks, self.natural = (pools[name] for name in ("clean", "tracks", "natural"))
        self.labels, self.config = tuple(labels), config
        self.seed, self.rank, self.sample_rate_hz = seed, rank, sample_rate_hz
        self.num_samples = round(config.segment_s * sample_rate_hz)
        self.resample = {pair: torchaudio.transforms.Resample(*pair) for pair in _SPEEDS[1:]}

    @property
    def num_unusable(self) -> int:
        """How many sounds could not be read or are silent, of those tried so far."""
        return len(self.clean.unusable | self.tracks.unusable | self.natural.unusable)

    def batch(self, step: int) -> Batch:
        """The batch of a step; ``ValueError`` when there are fewer than two labels to mix."""
        for pool in (self.clean, self.tracks, self.natural):
            pool.prepare(step)
        rng = np.random.default_rng([self.seed, 2, self.rank, step])
        mixes, targets, queries = zip(*(self._mixture(rng) for _ in range(self.config.batch_size)), strict=True)
        group_B = torch.tensor([group for group, labels in enumerate(queries) for _ in labels])
        return Batch(
            mix_BT=torch.from_numpy(np.stack(mixes))[group_B],
            index_B=torch.tensor([self.labels.index(label) for labels in queries for label in labels]),
            group_B=group_B,
            target_GT=torch.from_numpy(np.stack(targets)),
        )

    def _mixture(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
        """A mixture, the target in it and the labels whose stems should add up to that."""
        present = [label for label in self.labels if label in self.clean.by_label or label in self.tracks.by_label]
        if len(present) < 2:
            raise ValueError(
                f"training needs readable sounds of two labels at least, found {present}; give more clips or tracks"
            )
        num_sources = 3 if len(present) > 2 and rng.random() < self.config.three_source_fraction else 2
        sounds: list[Sound] = []
        if self.natural.by_label and rng.random() < self.config.natural_fraction:
            natural = self._natural(rng)
            if not set(natural.labels).issuperset(present):  # else there is nothing to mix it with
                sounds, num_sources = [natural], 2
        sounds = self._apart(rng, sounds, [present[i] for i in rng.permutation(len(present))], num_sources)
        sources = [self._segment(rng, sound) for sound in sounds]
        mix_T: np.ndarray = np.stack(sources).sum(axis=0, dtype=np.float32)
        absent = sorted(set(self.labels).difference(*(sound.heard for sound in sounds)))
        if absent and rng.random() < self.config.silence_rate:
            return mix_T, np.zeros_like(mix_T), (absent[rng.integers(len(absent))],)
        return mix_T, sources[0], sounds[0].labels

    def _apart(self, rng: np.random.Generator, sounds: list[Sound], order: list[str], num_sources: int) -> list[Sound]:
        """Sounds of clips that name nothing in common, added label by label.

        What leaked into a track then never contradicts a target. Only where that leaves a sound alone (few labels, or
        clips that all name the same) is one added that shares its clip's labels, though not its own.
        """
        for label in order:
            heard = frozenset[str]().union(*(sound.heard for sound in sounds))
            if len(sounds) < num_sources:
                sounds = sounds + self._draw(rng, label, lambda sound: sound.heard.isdisjoint(heard))  # noqa: B023
        if len(sounds) == 1:
            first = sounds[0]
            others = [label for label in order if label not in first.labels]
            drawn = [self._draw(rng, label, lambda sound: sound.clip != first.clip) for label in others]
            drawn += [self._draw(rng, label, lambda _: True) for label in others]
            sounds = sounds + next(sound for sound in drawn if sound)
        return sounds

    def _natural(self, rng: np.random.Generator) -> Sound:
        pools = list(self.natural.by_label.values())
        pool = pools[rng.integers(len(pools))]
        return pool[rng.integers(len(pool))]

    def _draw(self, rng: np.random.Generator, label: str, fits: Callable[[Sound], bool]) -> list[Sound]:
        """One sound of a label among those that fit, or none."""
        share = self.config.clean_fraction
        pools = [self.clean, self.tracks] if rng.random() < share else [self.tracks, self.clean]
        for pool in pools:
            fitting = [sound for sound in pool.by_label.get(label, []) if fits(sound)]
            if fitting:
                return [fitting[rng.integers(len(fitting))]]
        return []

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
