"""Ablation: whole natural clips as targets; the stems of all labels of the clip should add up to it."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from engine.selection.tracks import read_tracks
from engine.settings import Fraction, config
from engine.storage.paths import Name
from train.data.items import Item, load_clip
from train.data.mixer import Mixer
from train.data.pools import Pool, Sound


@config
class NaturalTargets:
    """Settings of the natural targets."""

    fraction: Fraction = 0.25
    """Fraction of remixes whose target is a whole natural clip."""


def natural_items(tracks: Name, *, sample_rate_hz: int) -> list[Item]:
    """Whole clips of a selection of which every label has a stem and at least one stem was kept."""
    index, stems = read_tracks(tracks)
    items: dict[str, Item] = {}
    for row in index.to_pylist():
        if row["num_stems"] >= len(row["labels"]) >= 2:
            labels = tuple(row["labels"])
            items[row["clip_id"]] = Item(
                labels=labels,
                labels_present=frozenset(labels),
                clip=row["clip_id"],
                duration_s=row["num_samples"] / sample_rate_hz,
                load=functools.partial(load_clip, stems, row),
            )
    return list(items.values())


def draw_natural(rng: np.random.Generator, pool: Pool) -> Sound:
    """One whole clip."""
    groups = list(pool.by_label.values())
    group = groups[rng.integers(len(groups))]
    return group[rng.integers(len(group))]


class NaturalTargetMixer(Mixer):
    """Starts some remixes with a whole clip, next to one other sound."""

    def draw_sounds(
        self, rng: np.random.Generator, present: Sequence[str], num_sources: int, *, first: Sequence[Sound] = ()
    ) -> list[Sound]:
        settings, natural = self.config.natural_targets, self.pools["natural"]
        assert settings is not None
        if natural.by_label and rng.random() < settings.fraction:
            sound = draw_natural(rng, natural)
            if not set(sound.item.labels).issuperset(present):  # some label is left to mix it with
                return super().draw_sounds(rng, present, 2, first=[sound])
        return super().draw_sounds(rng, present, num_sources, first=first)
