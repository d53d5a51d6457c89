"""Ablation: tracks weighted by their estimated SI-SDR, in the loss or in the draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from engine.settings import Number, config
from train.data.items import Item
from train.data.mixer import Mixer
from train.data.pools import Sound


@config
class EstimateWeights:
    """Settings of the weights."""

    use: Literal["loss", "draw"] = "loss"
    """``loss``: a track's weight scales its loss; ``draw``: it scales its chance among the tracks of its label."""
    centre_db: Number = 0.0
    """Estimated SI-SDR of a track with weight one half; at 0 the weight is the fraction of energy that is right."""


def trust(item: Item, *, centre_db: float) -> float:
    """Weight of a sound, 0 to 1; 1 if it has no estimate.

    The expectation of ``1 / (1 + 10 ** ((centre - SI-SDR) / 10))`` over the estimate's normal error (MacKay 1992). For
    a centre of 0 dB that is the fraction of the energy that is right.
    """
    if item.estimated_si_sdr_db is None or math.isnan(item.estimated_si_sdr_db):
        return 1.0
    error = (item.estimated_error_db or 0.0) * math.log(10.0) / 10.0
    narrower = 1.0 / math.sqrt(1.0 + math.pi * error**2 / 8.0)
    return float(1.0 / (1.0 + 10.0 ** (narrower * (centre_db - item.estimated_si_sdr_db) / 10.0)))


class EstimateWeightMixer(Mixer):
    """Weights sounds by their estimated SI-SDR."""

    def _trust(self, sound: Sound) -> float:
        assert self.config.estimate_weights is not None
        return trust(sound.item, centre_db=self.config.estimate_weights.centre_db)

    def choose(self, rng: np.random.Generator, sounds: Sequence[Sound]) -> Sound:
        settings = self.config.estimate_weights
        if settings is None or settings.use != "draw":
            return super().choose(rng, sounds)
        weights = np.array([self._trust(sound) for sound in sounds])
        return sounds[int(rng.choice(len(sounds), p=weights / weights.sum()))]

    def weight(self, sound: Sound) -> float:
        settings = self.config.estimate_weights
        trusted = self._trust(sound) if settings is not None and settings.use == "loss" else 1.0
        return trusted * super().weight(sound)
