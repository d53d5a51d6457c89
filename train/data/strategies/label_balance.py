"""Ablation: labels drawn by how many sounds they have instead of evenly."""

from __future__ import annotations

from collections import Counter

import numpy as np

from engine.settings import Fraction, config
from train.data.mixer import Mixer
from train.data.pools import Pool


@config
class LabelBalance:
    """Settings of the label balance."""

    balance: Fraction = 0.0
    """1: evenly; 0: in proportion to the number of sounds; between: to that number to the power 1 - balance."""


class LabelBalanceMixer(Mixer):
    """Draws labels by weight."""

    def label_order(self, rng: np.random.Generator, *pools: Pool) -> list[str]:
        settings = self.config.label_balance
        assert settings is not None
        present = self.labels_in(*pools)
        counts = sum((pool.counts for pool in pools), Counter[str]())
        log_weights = (1.0 - settings.balance) * np.log([counts[label] for label in present])
        keys = log_weights + rng.gumbel(size=len(present))  # sorting these keys draws by weight (Gumbel-max)
        return [present[i] for i in np.argsort(-keys)]
