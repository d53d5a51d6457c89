"""Training batches made on the fly: sounds of different clips remixed where they are active, and natural clips.

A batch is a function of the config's seed, the rank and the step alone, so a resumed training sees what an undisturbed
one would have seen.

Shape legend: B queries, G groups of queries with a target in common, T samples, R rows of a sound (``train/pools.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from train.data.config import MAX_QUERIES, MixConfig
from train.data.pools import KINDS, Cropper, Pool, Sound


@dataclass(frozen=True, kw_only=True)
class Target:
    """Labels of which the stems should add up to a target, and what that counts in the loss."""

    labels: tuple[str, ...]
    target_T: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TrainingMixture:
    """A mixture and what is asked of it; ``whole`` if that is all there is in it."""

    mix_T: np.ndarray
    labels_present: frozenset[str]
    asked: tuple[Target, ...]
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Queries ``[B]`` of mixtures ``[B, T]``; the stems of a group's queries add up to its target ``[G, T]``.

    Most groups have one query. A natural clip as a target has one for each of its labels. The weights have a mean of 1.
    """

    mix_BT: Tensor
    index_B: Tensor
    group_B: Tensor
    target_GT: Tensor
    weight_G: Tensor
    mixture_G: Tensor
    """Which mixture of the batch a group is of, counted from 0."""
    whole_G: Tensor
    """Whether the groups of that mixture ask for all that is in it."""

    def regroup(self, stems_BT: Tensor, group_B: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The stems added up by group, its own or ``group_B``, and the mixture of each group, both ``[G, T]``."""
        groups_B = self.group_B if group_B is None else group_B
        summed_GT = torch.zeros_like(self.target_GT).index_add(0, groups_B, stems_BT)
        mix_GT = torch.zeros_like(self.target_GT).index_copy(0, self.group_B, self.mix_BT)
        return summed_GT, mix_GT

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(**{name: value.to(device) for name, value in vars(self).items()})


def collate(mixtures: Sequence[TrainingMixture], labels: Sequence[str]) -> Batch:
    """The batch of some mixtures for a separator of these labels."""
    groups = [(number, asked) for number, mixture in enumerate(mixtures) for asked in mixture.asked]
    mixture_G = torch.tensor([number for number, _ in groups])
    group_B = torch.tensor([group for group, (_, asked) in enumerate(groups) for _ in asked.labels])
    weight_G = np.array([asked.weight for _, asked in groups])
    return Batch(
        mix_BT=torch.from_numpy(np.stack([mixture.mix_T for mixture in mixtures]))[mixture_G[group_B]],
        index_B=torch.tensor([labels.index(label) for _, asked in groups for label in asked.labels]),
        group_B=group_B,
        target_GT=torch.from_numpy(np.stack([asked.target_T for _, asked in groups])),
        weight_G=torch.from_numpy(weight_G / weight_G.mean()).float(),
        mixture_G=mixture_G,
        whole_G=torch.tensor([mixtures[number].whole for number, _ in groups]),
    )


class Mixer:
    """Draws training mixtures from pools of single-source clips, tracks and natural clips (``pools.KINDS``)."""

    def __init__(
        self,
        pools: Mapping[str, Pool],
        labels: Sequence[str],
        config: MixConfig,
        *,
        sample_rate_hz: int,
        seed: int,
        rank: int,
    ) -> None:
        self.clean, self.tracks, self.natural, self.pairs, self.absent = (pools[kind] for kind in KINDS)
        self.labels, self.config = tuple(labels), config
        self.seed, self.rank, self.sample_rate_hz = seed, rank, sample_rate_hz
        self.cropper = Cropper(config, sample_rate_hz=sample_rate_hz)

    @property
    def pools(self) -> tuple[Pool, ...]:
        """All there are."""
        return self.clean, self.tracks, self.natural, self.pairs, self.absent

    @property
    def num_unusable(self) -> int:
        """How many sounds could not be read or are silent, of those tried so far."""
        return len(set[str]().union(*(pool.unusable for pool in self.pools)))

    def batch(self, step: int) -> Batch:
        """The batch of a step; ``ValueError`` when there are fewer than two labels to mix."""
        for pool in self.pools:
            pool.prepare(step)
        rng = np.random.default_rng([self.seed, 2, self.rank, step])
        return collate([self._mixture(rng) for _ in range(self.config.batch_size)], self.labels)

    def _mixture(self, rng: np.random.Generator) -> TrainingMixture:
        """One mixture of any kind; what is off or has no sounds takes no part, and no draw."""
        config, silence_rate = self.config, self.config.silence_rate
        if config.absent_fraction > 0.0 and self.absent.by_label:
            truly_absent = silence_rate * config.absent_fraction
            if rng.random() < truly_absent:
                return self._absent(rng)
            silence_rate = (silence_rate - truly_absent) / (1.0 - truly_absent)  # of the rest, so that the sum is right
        made = self._natural_mixture(rng) or self._remix(rng)
        absent = sorted(set(self.labels).difference(made.labels_present))
        if absent and rng.random() < silence_rate:
            asked = Target(labels=(absent[rng.integers(len(absent))],), target_T=np.zeros_like(made.mix_T))
            return TrainingMixture(mix_T=made.mix_T, labels_present=made.labels_present, asked=(asked,))
        return made

    def _absent(self, rng: np.random.Generator) -> TrainingMixture:
        """A natural clip, and silence for a label that it names but does not hold."""
        sound = self._sound_of_a_label(rng, self.absent)
        mix_T = self.cropper.crop(rng, sound)[-1]
        return TrainingMixture(
            mix_T=mix_T, labels_present=sound.labels_present, asked=(Target(labels=sound.labels, target_T=0.0 * mix_T),)
        )

    def _natural_mixture(self, rng: np.random.Generator) -> TrainingMixture | None:
        """A natural clip as it is or two of them, in the shares that the config gives; None for a remix."""
        clip_fraction = self.config.clip_fraction if self.pairs.by_label else 0.0
        mixit_fraction = self.config.mixit_fraction if self.natural.by_label else 0.0
        if clip_fraction + mixit_fraction == 0.0:
            return None
        drawn = rng.random()
        if drawn < clip_fraction:
            return self._clip(rng)
        return self._two_clips(rng) if drawn < clip_fraction + mixit_fraction else None

    def _clip(self, rng: np.random.Generator) -> TrainingMixture:
        """A natural clip with one of its tracks as the target; for consistency it is asked for the rest, uncounted."""
        sound = self._sound_of_a_label(rng, self.pairs)
        target_T, mix_T = self.cropper.crop(rng, sound)
        asked = [Target(labels=sound.labels, target_T=target_T, weight=self._weight(sound))]
        rest = tuple(sorted(sound.labels_present.difference(sound.labels)))
        whole = self.config.consistency_weight > 0.0 and set(rest).issubset(self.labels)
        if whole and rest:
            asked.append(Target(labels=rest, target_T=mix_T - target_T, weight=0.0))
        return TrainingMixture(mix_T=mix_T, labels_present=sound.labels_present, asked=tuple(asked), whole=whole)

    def _two_clips(self, rng: np.random.Generator) -> TrainingMixture | None:
        """Two natural clips that name nothing in common, each a target; None if the first has no such partner."""
        first = self._natural(rng)
        partners = [
            sound
            for pool in self.natural.by_label.values()
            for sound in pool
            if sound.labels_present.isdisjoint(first.labels_present)
            and len(sound.labels) + len(first.labels) <= MAX_QUERIES
        ]
        if not partners:
            return None
        both = (first, partners[rng.integers(len(partners))])
        sources = [self.cropper.crop(rng, sound)[0] for sound in both]
        asked = (Target(labels=sound.labels, target_T=crop_T) for sound, crop_T in zip(both, sources, strict=True))
        return TrainingMixture(
            mix_T=sources[0] + sources[1], labels_present=_heard(both), asked=tuple(asked), whole=True
        )

    def _remix(self, rng: np.random.Generator) -> TrainingMixture:
        """Sounds of different clips, the first of them the target."""
        present = self._present(self.clean, self.tracks)
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
        sounds = self._apart(rng, sounds, self._order(rng, self.clean, self.tracks), num_sources)
        sources = [self.cropper.crop(rng, sound)[0] for sound in sounds]
        mix_T: np.ndarray = np.stack(sources).sum(axis=0, dtype=np.float32)
        asked = Target(labels=sounds[0].labels, target_T=sources[0], weight=self._weight(sounds[0]))
        return TrainingMixture(mix_T=mix_T, labels_present=_heard(sounds), asked=(asked,))

    def _apart(self, rng: np.random.Generator, sounds: list[Sound], order: list[str], num_sources: int) -> list[Sound]:
        """Sounds of clips that name nothing in common, added label by label.

        What leaked into a track then never contradicts a target. Only where that leaves a sound alone (few labels, or
        clips that all name the same) is one added that shares its clip's labels, though not its own.
        """
        for label in order:
            labels_present = _heard(sounds)
            if len(sounds) < num_sources:
                sounds = sounds + self._draw(rng, label, lambda sound: sound.labels_present.isdisjoint(labels_present))  # noqa: B023
        if len(sounds) == 1:
            first = sounds[0]
            others = [label for label in order if label not in first.labels]
            drawn = [self._draw(rng, label, lambda sound: sound.clip != first.clip) for label in others]
            drawn += [self._draw(rng, label, lambda _: True) for label in others]
            sounds = sounds + next(sound for sound in drawn if sound)
        return sounds

    def _present(self, *pools: Pool) -> list[str]:
        return [label for label in self.labels if any(label in pool.by_label for pool in pools)]

    def _order(self, rng: np.random.Generator, *pools: Pool) -> list[str]:
        """The labels of some pools as they are drawn one after another, evenly or by how many sounds they have."""
        present = self._present(*pools)
        if self.config.label_balance == 1.0:
            return [present[i] for i in rng.permutation(len(present))]
        counts = sum((pool.counts for pool in pools), Counter[str]())
        log_weights = (1.0 - self.config.label_balance) * np.log([counts[label] for label in present])
        keys = log_weights + rng.gumbel(size=len(present))  # their order is that of draws by weight (Gumbel-max)
        return [present[i] for i in np.argsort(-keys)]

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
                return [self._choice(rng, fitting)]
        return []

    def _sound_of_a_label(self, rng: np.random.Generator, pool: Pool) -> Sound:
        return self._choice(rng, pool.by_label[self._order(rng, pool)[0]])

    def _choice(self, rng: np.random.Generator, sounds: Sequence[Sound]) -> Sound:
        """One of some sounds of a label."""
        if self.config.quality_weight != "draw":
            return sounds[int(rng.integers(len(sounds)))]
        weights = np.array([sound.weight for sound in sounds])
        return sounds[int(rng.choice(len(sounds), p=weights / weights.sum()))]

    def _weight(self, sound: Sound) -> float:
        """What a sound counts as a target."""
        return sound.weight if self.config.quality_weight == "loss" else 1.0


def _heard(sounds: Iterable[Sound]) -> frozenset[str]:
    return frozenset[str]().union(*(sound.labels_present for sound in sounds))
