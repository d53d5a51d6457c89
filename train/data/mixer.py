"""Training mixtures made on the fly: remixes of clean clips and tracks, natural clips with one track, silence queries.

The file is the default path; each ablation in ``train/data/strategies`` overrides some of these methods. A batch
depends only on the seed, the rank and the step, so a resumed training sees the same batches as an undisturbed one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from train.data.batch import Batch
from train.data.drawn import DrawnBatch, Target, TrainingMixture, collate
from train.data.pools import Cropper, Pool, Sound
from train.data.query_variation import varied_queries
from train.data.render import Renderer

if TYPE_CHECKING:
    from train.data.config import MixConfig


class Mixer:
    """Draws training mixtures from pools of sounds and renders them on a device.

    ``pools`` has ``clean`` (single-source clips), ``tracks``, ``pairs`` (tracks with their clip) and what the
    ablations that are on need.
    """

    def __init__(
        self,
        pools: Mapping[str, Pool],
        labels: Sequence[str],
        config: MixConfig,
        *,
        sample_rate_hz: int,
        seed: int,
        rank: int,
        vectors_LE: np.ndarray | None = None,
        device: torch.device | None = None,
    ) -> None:
        """``vectors_LE`` are the embeddings of the labels, for a student that reads text."""
        self.pools, self.labels, self.config, self.vectors_LE = pools, tuple(labels), config, vectors_LE
        self.seed, self.rank = seed, rank
        self.cropper = Cropper(config, sample_rate_hz=sample_rate_hz)
        self.render = Renderer(config, sample_rate_hz=sample_rate_hz, device=device or torch.device("cpu"))
        self._positions = {label: position for position, label in enumerate(self.labels)}
        self._sorted_labels = sorted(self.labels)
        self._in_pools: dict[tuple[Pool, ...], list[str]] = {}

    @property
    def num_unusable(self) -> int:
        """Number of sounds so far that could not be read or are silent."""
        return len(set[str]().union(*(pool.unusable for pool in self.pools.values())))

    @property
    def silence_rate(self) -> float:
        """Probability of a silence query."""
        return self.config.silence_rate

    def batch(self, step: int) -> Batch:
        """The batch of a step; raises ``ValueError`` if there are fewer than two labels to mix."""
        return self.render(self.draw(step))

    def draw(self, step: int) -> DrawnBatch:
        """Draw the mixtures of a step, loading the sounds that belong to it."""
        if any([pool.prepare(step) for pool in self.pools.values()]):
            self._in_pools.clear()
        rng = np.random.default_rng([self.seed, 2, self.rank, step])
        mixtures = [self.mixture(rng) for _ in range(self.config.batch_size)]
        names_rivals = rng.random(len(mixtures)) < self.config.rivals_rate
        mixtures = [
            made if named else replace(made, sounding=frozenset())
            for made, named in zip(mixtures, names_rivals, strict=True)
        ]
        drawn = collate(mixtures, self._positions, num_samples=self.render.num_samples)
        if self.vectors_LE is None:
            return drawn
        variation = self.config.query_variation
        query_BE = varied_queries(drawn, mixtures, self._positions, self.vectors_LE, variation, rng)
        rivals_BE = torch.nn.functional.normalize(drawn.rivals @ torch.from_numpy(self.vectors_LE))
        return replace(drawn, query_BE=query_BE, rivals=rivals_BE)

    def mixture(self, rng: np.random.Generator) -> TrainingMixture:
        """A natural clip or a remix; in some, the query names a sound that is not there and the target is silence."""
        made = self.natural_mixture(rng) or self.remix(rng)
        if made.labels_present.issuperset(self.labels) or rng.random() >= self.silence_rate:
            return made
        absent = [label for label in self._sorted_labels if label not in made.labels_present]
        silence = Target(labels=(absent[rng.integers(len(absent))],), crops=())
        return replace(made, targets=(silence,), is_complete=False)

    def natural_mixture(self, rng: np.random.Generator) -> TrainingMixture | None:
        """In ``clip_fraction`` of the mixtures a natural clip, else None."""
        fraction = self.config.clip_fraction if self.pools["pairs"].by_label else 0.0
        return self.clip(rng) if fraction > 0.0 and rng.random() < fraction else None

    def clip(self, rng: np.random.Generator) -> TrainingMixture:
        """A natural clip with one of its tracks as the target."""
        sound = self.draw_from(rng, self.pools["pairs"])
        track, clip = self.cropper.crop(rng, sound)
        present = sound.item.labels_present
        target = Target(labels=sound.item.labels, crops=(track,), weight=self.weight(sound))
        return TrainingMixture(crops=(clip,), labels_present=present, targets=(target,), sounding=present)

    def remix(self, rng: np.random.Generator) -> TrainingMixture:
        """Sounds of different clips; the first one is the target."""
        present = self.labels_in(self.pools["clean"], self.pools["tracks"])
        if len(present) < 2:
            raise ValueError(
                f"training must have readable sounds of two labels or more, got {present}; give more clips or tracks"
            )
        num_sources = 3 if len(present) > 2 and rng.random() < self.config.three_source_fraction else 2
        sounds = self.draw_sounds(rng, present, num_sources)
        crops = tuple(self.cropper.crop(rng, sound)[0] for sound in sounds)
        target = Target(labels=sounds[0].item.labels, crops=crops[:1], weight=self.weight(sounds[0]))
        sounding = frozenset(label for sound in sounds for label in sound.item.labels)
        return TrainingMixture(
            crops=crops, labels_present=_labels_present(sounds), targets=(target,), sounding=sounding
        )

    def draw_sounds(
        self, rng: np.random.Generator, present: Sequence[str], num_sources: int, *, first: Sequence[Sound] = ()
    ) -> list[Sound]:
        """``num_sources`` sounds, beginning with ``first``, of clips that have no label in common.

        Leakage in a track therefore never contradicts a target. Only if that leaves a sound alone (few labels, or clips
        that all have the same labels) the second sound may share its clip's labels, but not its own label.
        """
        sounds = list(first)
        order = self.label_order(rng, self.pools["clean"], self.pools["tracks"])
        for label in order:
            if len(sounds) < num_sources:
                sounds += self._draw(rng, label, without=_labels_present(sounds))
        if len(sounds) == 1:
            alone = sounds[0].item
            others = [label for label in order if label not in alone.labels]
            drawn = [self._draw(rng, label, not_of=alone.clip) for label in others]
            drawn += [self._draw(rng, label) for label in others]
            sounds += next(some for some in drawn if some)
        return sounds

    def _draw(
        self, rng: np.random.Generator, label: str, *, without: frozenset[str] = frozenset(), not_of: str | None = None
    ) -> list[Sound]:
        """One sound of a label, of a clip without some labels and of another clip than ``not_of``; or none."""
        kinds = ("clean", "tracks") if rng.random() < self.config.clean_fraction else ("tracks", "clean")
        for kind in kinds:
            sounds = self.pools[kind].by_label.get(label, [])
            if without or not_of is not None:
                sounds = [
                    sound
                    for sound in sounds
                    if sound.item.clip != not_of and sound.item.labels_present.isdisjoint(without)
                ]
            if sounds:
                return [self.choose(rng, sounds)]
        return []

    def draw_from(self, rng: np.random.Generator, pool: Pool) -> Sound:
        """One sound of a pool: first its label is drawn, then one of its sounds."""
        return self.choose(rng, pool.by_label[self.label_order(rng, pool)[0]])

    def labels_in(self, *pools: Pool) -> list[str]:
        """Labels of which some pool has a sound."""
        if pools not in self._in_pools:
            self._in_pools[pools] = [label for label in self.labels if any(label in pool.by_label for pool in pools)]
        return self._in_pools[pools]

    def label_order(self, rng: np.random.Generator, *pools: Pool) -> list[str]:
        """Labels of some pools in random order."""
        present = self.labels_in(*pools)
        return [present[i] for i in rng.permutation(len(present)).tolist()]

    def choose(self, rng: np.random.Generator, sounds: Sequence[Sound]) -> Sound:
        """One of some sounds of a label."""
        return sounds[int(rng.integers(len(sounds)))]

    def weight(self, sound: Sound) -> float:
        """Weight of a target in the loss."""
        return sound.item.weight


def _labels_present(sounds: Iterable[Sound]) -> frozenset[str]:
    return frozenset[str]().union(*(sound.item.labels_present for sound in sounds))
