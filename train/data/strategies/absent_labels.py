"""Ablation: silence learned from labels that a clip names but that the filter found absent."""

from __future__ import annotations

import functools

import numpy as np

from engine.selection.tracks import read_absent
from engine.settings import Fraction, config
from engine.storage.paths import Name
from train.data.drawn import Target, TrainingMixture
from train.data.items import Item, check_rate, load_clip, track_item
from train.data.mixer import Mixer


@config
class AbsentLabels:
    """Settings of the absent labels."""

    fraction: Fraction = 0.5
    """Fraction of the silence queries (``silence_rate``) that use an absent label of a natural clip."""


def absent_items(tracks: Name, *, sample_rate_hz: int) -> list[Item]:
    """Clips with a label that the filter found absent, once for each such label.

    Raises ``ValueError`` for a selection of another sample rate.
    """
    index, stems = read_absent(tracks)
    items = []
    for row in index.to_pylist():
        check_rate(tracks, row, sample_rate_hz)
        items.append(track_item(row, functools.partial(load_clip, stems, row)))
    return items


class AbsentLabelMixer(Mixer):
    """Draws some of the silence queries from absent labels."""

    def _absent_rate(self) -> float:
        """Fraction of all mixtures that use an absent label; 0 without any."""
        settings = self.config.absent_labels
        assert settings is not None
        return self.config.silence_rate * settings.fraction if self.pools["absent"].by_label else 0.0

    @property
    def silence_rate(self) -> float:
        """Rate among the other mixtures; of all mixtures, ``config.silence_rate`` then have a silent target."""
        absent_rate = self._absent_rate()
        return (self.config.silence_rate - absent_rate) / (1.0 - absent_rate) if absent_rate < 1.0 else 1.0

    def mixture(self, rng: np.random.Generator) -> TrainingMixture:
        if not self.pools["absent"].by_label or rng.random() >= self._absent_rate():
            return super().mixture(rng)
        sound = self.draw_from(rng, self.pools["absent"])
        crops = tuple(self.cropper.crop(rng, sound))
        silence = Target(labels=sound.item.labels, crops=())
        present = sound.item.labels_present
        return TrainingMixture(crops=crops, labels_present=present, sounding=present, targets=(silence,))
