"""Ablation: remixes of labels that occur together in the corpus, instead of any labels."""

from __future__ import annotations

import functools
from collections import Counter
from itertools import permutations

import numpy as np

from engine.settings import Fraction, config
from train.data.mixer import Mixer
from train.data.pools import Sound


@config
class Plausible:
    """Settings of plausible remixes."""

    fraction: Fraction = 0.5
    """Fraction of remixes whose further labels are drawn by how often they occur together with the first one."""


class PlausibleMixer(Mixer):
    """Draws the partners of a sound in proportion to the clips that have both labels, plus one.

    The clips are all those of the tracks, in memory or not. The first label is drawn as without this setting, and
    sounds of one remix still come from clips without a common label: a label of the first sound's clip is not drawn.
    """

    def partner_order(self, rng: np.random.Generator, first: Sound, order: list[str]) -> list[str]:
        settings = self.config.plausible
        assert settings is not None
        if settings.fraction == 0.0 or rng.random() >= settings.fraction:
            return super().partner_order(rng, first, order)
        weights = [1 + sum(self._together[label, other] for label in first.item.labels) for other in order]
        keys = np.log(weights) + rng.gumbel(size=len(order))  # sorting these keys draws by weight (Gumbel-max)
        return [order[i] for i in np.argsort(-keys)]

    @functools.cached_property
    def _together(self) -> Counter[tuple[str, str]]:
        """Number of clips that have both labels, for each pair of labels in either order."""
        clips = self.pools["tracks"].labels_of.values()
        return Counter(pair for labels in clips for pair in permutations(labels, 2))
